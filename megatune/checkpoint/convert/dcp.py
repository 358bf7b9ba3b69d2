"""Folders of torch.distributed.checkpoint: torchtitan's, and those of FSDP with models of transformers.

Any layout that wrote them is fine: the index knows every tensor as a whole. They carry no config, so `--like` says
which model it is (or a config.json beside them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megatune.checkpoint.convert.base import Format, Line, Opened, Options
from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.dcp_metadata import METADATA
from megatune.checkpoint.convert.dcp_names import TITAN_EMBEDDING, DcpModel
from megatune.checkpoint.convert.megatron_config import like_config
from megatune.checkpoint.pretrained import IGNORED, base_map
from megatune.checkpoint.sources import read_json
from megatune.errors import CheckpointError
from megatune.models.families.base import Family
from megatune.models.registry import family_for
from megatune.models.spec import DecoderSpec

Shapes = Mapping[str, tuple[int, ...]]

_STEP = re.compile(r"^step-(\d+)$")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Entries that belong to a run, not to a model.
_OF_A_RUN = re.compile(
    r"(^|\.)(optimizer|optim|optimizers|state|param_groups|lr_scheduler|scheduler|dataloader|train_state|rng|rng_state|"
    r"epoch|step|global_step)(\.|$)"
)
_BUFFERS = (*IGNORED, "freqs_cis", "rope_cache", "tokens_per_expert", "rope.cache")


def detect(path: Path) -> bool:
    return (path / METADATA).is_file() or bool(_steps(path))


def open_dcp(path: Path, options: Options) -> Opened:
    """A folder with `.metadata`, or of a folder of steps (`step-120`) the newest or `options.step`."""
    folder = _step_folder(path, options.step)
    stored = DcpFolder(folder)
    config = _config(path, folder, options)
    family = family_for(config)
    spec = family.spec(config)
    shapes, embed = _shapes(family, spec)
    before = _before(stored, family, embed)
    weights = DcpModel(stored, family, spec, shapes, before)
    if not weights.names():
        raise CheckpointError(
            f"{folder}: holds no tensor of the {family.name} model that the config describes"
        )
    states = _optimizer(stored, family, spec, shapes, before) if options.optimizer else {}
    known = weights.keys | {key for state in states.values() for key in state.keys}
    lines = _left(stored, known, before)
    return Opened(
        "dcp",
        path,
        config,
        weights,
        states,
        step=_step(stored, folder),
        extras=_home(path, folder, options),
        report=lines,
    )


def _steps(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    found = ((_STEP.match(item.name), item) for item in path.iterdir())
    return {int(match[1]): item for match, item in found if match and (item / METADATA).is_file()}


def _step_folder(path: Path, step: int | None) -> Path:
    if (path / METADATA).is_file():
        return path
    steps = _steps(path)
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"{path}: has no step {step}; there is {there}")
    if not steps:
        raise CheckpointError(f"{path}: has no {METADATA} and no whole step-* folder")
    return steps[max(steps) if step is None else step]


def _config(path: Path, folder: Path, options: Options) -> dict:
    like = like_config(options)
    if like is not None:
        return like
    home = _home(path, folder, options)
    if home is None:
        raise CheckpointError(
            f"{folder}: does not say which model it is; give the Hugging Face folder that training started from with "
            "--like"
        )
    return read_json(home / "config.json")


def _home(path: Path, folder: Path, options: Options) -> Path | None:
    """Where config.json and tokenizer lie."""
    if options.like is not None:
        like = Path(options.like)
        return like if like.is_dir() else like.parent
    places = (folder, path, folder.parent)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _shapes(family: Family, spec: DecoderSpec) -> tuple[Shapes, str]:
    """Shapes of a model's tensors by Hugging Face name, and the embedding's name. Of a tied pair, the head is there
    too: models in memory have both."""
    mapped = base_map(spec)
    shapes = {name: shape for item in mapped.values() for name, shape in item.hf_shapes().items()}
    embed = mapped["embed.weight"].pieces[0].hf_name
    if spec.tied_embeddings:
        head = family.name_map(replace(spec, tied_embeddings=False))["head.weight"][0].hf_name
        shapes[head] = shapes[embed]
    return shapes, embed


def _before(stored: DcpFolder, family: Family, embed: str) -> str:
    """What stands before the model's keys: nothing, `model.`, `app.model.`, ... CheckpointError where no key ends as an
    embedding's does."""
    names = [name for name in stored.names() if not _is_state(name)]
    for ending in (embed, TITAN_EMBEDDING):
        found = sorted((name for name in names if name == ending or name.endswith("." + ending)), key=len)
        if found:
            return found[0].removesuffix(ending)
    raise CheckpointError(
        f"{stored}: has neither {embed} nor {TITAN_EMBEDDING}, so it holds no {family.name} model under a name that "
        f"megatune knows (its first key is {min(stored.names(), default='none')})"
    )


def _is_state(name: str) -> bool:
    return name.endswith(tuple(f".{moment}" for moment in _MOMENTS))


def _optimizer(
    stored: DcpFolder, family: Family, spec: DecoderSpec, shapes: Shapes, before: str
) -> dict[str, DcpModel]:
    """AdamW's moments, where every weight of the model has them (`optimizer.state.<weight>.exp_avg`)."""
    starts = {
        name[: match.end()]
        for name in stored.names()
        if _is_state(name) and (match := re.match(r"^(?:[\w]+\.)*?state\.", name))
    }
    for start in sorted(starts):
        for inside in dict.fromkeys((before, "")):
            found = {
                moment: DcpModel(stored, family, spec, shapes, start + inside, f".{moment}", torch.float32)
                for moment in _MOMENTS
            }
            if all(_is_whole(state, shapes, spec) for state in found.values()):
                return found
    return {}


def _is_whole(state: DcpModel, shapes: Shapes, spec: DecoderSpec) -> bool:
    """Whether all weights that AdamW trains have a state: not a router's correction, and one of a tied pair."""
    untrained = (
        ("e_score_correction_bias", "lm_head.weight") if spec.tied_embeddings else ("correction_bias",)
    )
    return all(name.endswith(untrained) for name in shapes.keys() - state.names())


def _left(stored: DcpFolder, known: set[str], before: str) -> list[Line]:
    """A line for each tensor that is not used; CheckpointError for one that may be a weight."""
    lines = []
    for name in sorted(stored.names() - known):
        inner = name.removeprefix(before)
        if inner.endswith(_BUFFERS):
            why = "a buffer, computed anew when the model is loaded"
        elif _OF_A_RUN.search(name) or _is_state(name):
            why = "state of the run"
        else:
            raise CheckpointError(
                f"{stored}: {name} {list(stored.shape(name))} belongs to no parameter of the model that the config "
                "describes; leaving it out would change the model"
            )
        lines.append(Line(name, "skipped", why))
    return lines


def _step(stored: DcpFolder, folder: Path) -> int | None:
    """Finished steps: torchtitan's counter, or the folder's name."""
    for name in ("train_state.step", "step", "trainer.step"):
        if name in stored.names() and stored.shape(name) == ():
            return int(stored.box(name, (), ()))
    match = _STEP.match(folder.name)
    return int(match[1]) if match else None


FORMAT = Format("dcp", "torch.distributed.checkpoint (FSDP, torchtitan)", detect, open_dcp)
