"""Megatron-Core's `torch_dist` checkpoints: torch.distributed.checkpoint with names of its own, and no layout.

A step's folder holds `metadata.json` (written last), the index and data of DCP, and what is no tensor: `common.pt`, or
a blob `common_state/shard_0_1` in newer versions. Both are read; `common.pt`, which every version reads, is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from megatune.checkpoint.convert.base import Format, Line, Opened, Options
from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.dcp_metadata import METADATA
from megatune.checkpoint.convert.megatron_config import hf_config, like_config
from megatune.checkpoint.convert.megatron_legacy_optimizer import Unproven
from megatune.checkpoint.convert.megatron_names import EMBEDDING, FromMegatron, MegatronTable
from megatune.checkpoint.convert.pickles import Opaque, open_pickle
from megatune.checkpoint.convert.torch_dist_buckets import bucket_keys, bucket_states
from megatune.checkpoint.convert.torch_dist_keys import EXTRA, StoredMegatron, trained
from megatune.checkpoint.convert.torch_dist_write import COMMON, LATEST, MARK, TorchDistTarget
from megatune.checkpoint.sources import TensorSource, read_json
from megatune.errors import CheckpointError
from megatune.models.registry import family_for

KIND = "torch_dist"
_STEP = re.compile(r"^iter_(\d{7,})$")
_STATE = re.compile(r"^((?:chained_\d+\.)?optimizer\.state\.)(fp32_param|param|exp_avg|exp_avg_sq)\.")
_SLOTS = {"fp32_param": "master", "param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
# Entries that belong to a run, not to a model.
_OF_A_RUN = re.compile(
    r"^(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|common_state)\b"
)
_FLAT = re.compile(r"^(chained_\d+\.)?optimizer\.distributed\.")
_MTP = re.compile(r"^mtp\.")
_ADVICE = "save with --dist-ckpt-optim-fully-reshardable"


def detect(path: Path) -> bool:
    return bool(_steps(path)) or _is_step(path)


def open_torch_dist(path: Path, options: Options) -> Opened:
    """A step of a `torch_dist` checkpoint, or the newest (or `options.step`) of a folder of them."""
    folder = step_folder(path, options.step)
    _check_backend(folder)
    stored = DcpFolder(folder)
    common = _common(stored)
    prefix = _prefix(stored)
    padded = stored.shape(prefix + EMBEDDING)[0]
    args = _attributes(common.get("args"))
    config, lines = hf_config(args, _config(path, folder, options), padded, str(folder))
    family = family_for(config)
    table = MegatronTable(family.spec(config))
    weights = StoredMegatron(table, stored, (prefix,))
    model = _Model(table, weights)
    lines += _padding(weights, table)
    found, known = _states(table, weights, stored, prefix, options)
    lines += _left(stored, weights.keys | known.keys(), prefix)
    lines += [Line(name, "skipped", why) for name, why in sorted(known.items()) if why]
    step = common.get("iteration")
    number = _STEP.match(folder.name)
    return Opened(
        KIND,
        path,
        config,
        model,
        {slot: FromMegatron(table, view) for slot, view in found.items()},
        step=int(number[1]) if number else step if isinstance(step, int) and step > 0 else None,
        extras=_extras(path, folder, options),
        report=lines,
    )


class _Model(FromMegatron):
    """The weights; what Megatron's file lacks is named as Megatron names it."""

    def __init__(self, table: MegatronTable, source: StoredMegatron) -> None:
        missing = sorted(table.tensors.keys() - source.names())
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} of {len(table.tensors)} parameters are missing, the first is {missing[0]}; "
                "does the config belong to it?"
            )
        super().__init__(table, source)


def step_folder(path: Path, step: int | None) -> Path:
    """The folder with the tensors: `path` itself, or one of its steps (default: what Megatron calls the latest, or the
    newest that is whole). CheckpointError where there is none."""
    if _is_step(path):
        return path
    steps = _steps(path)
    if step is not None:
        if step not in steps:
            there = ", ".join(str(number) for number in sorted(steps) if number >= 0) or "no step"
            raise CheckpointError(f"{path}: has no whole step {step}; there is {there}")
        return steps[step]
    if not steps:
        raise CheckpointError(f"{path}: holds no whole step (a folder iter_* with {MARK} and {METADATA})")
    latest = _latest(path)
    return steps.get(latest, steps[max(steps)]) if latest is not None else steps[max(steps)]


def _latest(path: Path) -> int | None:
    try:
        text = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return -1 if text == "release" else int(text) if text.isdecimal() and len(text) < 12 else None


def _steps(path: Path) -> dict[int, Path]:
    """Whole steps by number; `release` is -1."""
    if not path.is_dir():
        return {}
    found = {}
    for item in path.iterdir():
        number = _STEP.match(item.name)
        if (number or item.name == "release") and _is_step(item):
            found[int(number[1]) if number else -1] = item
    return found


def _is_step(path: Path) -> bool:
    return (path / MARK).is_file() and (path / METADATA).is_file()


def _check_backend(folder: Path) -> None:
    backend = read_json(folder / MARK).get("sharded_backend")
    if backend != KIND:
        raise CheckpointError(
            f"{folder / MARK}: the tensors are stored by {backend!r}; load it with the Megatron that wrote it and save "
            "it with --ckpt-format torch_dist"
        )


def _common(stored: DcpFolder) -> dict[str, Any]:
    """What is no tensor: arguments, iteration. Empty where there is none."""
    path = stored.folder / COMMON
    found: Any = {}
    if path.is_file():
        found = open_pickle(path)
    else:
        blobs = [name for name in stored.index.blobs if name.startswith("common_state/")]
        if blobs:
            found = stored.blob(blobs[0])
            found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: does not hold a state dict; copy the folder again")
    return found


def _attributes(args: Any) -> Mapping[str, Any]:
    """The arguments (a Namespace) as a mapping."""
    return args.attributes if isinstance(args, Opaque) else args if isinstance(args, dict) else {}


def _config(path: Path, folder: Path, options: Options) -> dict[str, Any] | None:
    """The config that says more than arguments can: `--like`, or a config.json that lies in the folder."""
    like = like_config(options)
    if like is not None:
        return like
    home = _home(path, folder)
    return None if home is None else read_json(home / "config.json")


def _home(path: Path, folder: Path) -> Path | None:
    """Where config.json and tokenizer lie beside a step, if they do."""
    places = (path, folder, folder.parent, folder / "hf", path / "hf")
    return next((place for place in places if (place / "config.json").is_file()), None)


def _extras(path: Path, folder: Path, options: Options) -> Path | None:
    if options.like is not None:
        like = Path(options.like)
        return like if like.is_dir() else like.parent
    return _home(path, folder)


def _prefix(stored: DcpFolder) -> str:
    """What stands before the model's keys: nothing, or NeMo's `module.`."""
    names = stored.names()
    for prefix in ("", "module.", "model."):
        if prefix + EMBEDDING in names:
            return prefix
    raise CheckpointError(
        f"{stored}: has no {EMBEDDING}, so it is no GPT model of Megatron-Core (the first key is "
        f"{min(names, default='none')})"
    )


def _padding(weights: StoredMegatron, table: MegatronTable) -> list[Line]:
    lines = []
    for name in sorted(weights.names()):
        tensor = table.tensors[name]
        more = weights.shape(name)[0] - tensor.shape[0] if tensor.vocab else 0
        if more:
            lines.append(Line(tensor.pieces[0].hf_name, "trimmed", f"{more} rows of padded vocabulary"))
    return lines


def _optimizer(table: MegatronTable, stored: DcpFolder, prefix: str) -> dict[str, StoredMegatron]:
    """Slot -> states, of those slots that are there for every weight in the weight's shape."""
    found: dict[str, StoredMegatron] = {}
    starts: dict[str, set[str]] = {}
    for name in stored.names():
        match = _STATE.match(name)
        if match:
            starts.setdefault(_SLOTS[match[2]], set()).add(match[0] + prefix)
    for slot, prefixes in sorted(starts.items()):
        view = StoredMegatron(table, stored, sorted(prefixes), states=True)
        if view.names() >= trained(table):
            found[slot] = view
    return found


def _states(
    table: MegatronTable, weights: StoredMegatron, stored: DcpFolder, prefix: str, options: Options
) -> tuple[Mapping[str, TensorSource], dict[str, str]]:
    """(Slot -> states, the tensors of the folder that have to do with it -> why each is left out, or nothing)."""
    states = {name for name in stored.names() if _STATE.match(name)}
    flat = {name for name in stored.names() if _FLAT.match(name)}
    if not options.optimizer:
        return {}, dict.fromkeys(states | flat, "not asked for")
    why = dict.fromkeys(states, "not stored in the shape of its weight, or not for every weight")
    why |= dict.fromkeys(flat, f"flat buckets of one layout, of an old form: {_ADVICE}")
    found: Mapping[str, TensorSource] = _optimizer(table, stored, prefix)
    used = {key for view in found.values() for key in view.keys}
    if not found and (buckets := bucket_keys(stored)):
        try:
            found, used = bucket_states(table, weights, stored), buckets
        except Unproven as error:
            why |= dict.fromkeys(buckets, f"flat buckets of one layout (dp_reshardable): {error}; {_ADVICE}")
    return found, why | dict.fromkeys(used, "")


def _left(stored: DcpFolder, known: Set[str], prefix: str) -> list[Line]:
    """A line for each tensor and blob that is not used; CheckpointError for one that may be a weight."""
    lines = []
    for name in sorted(stored.names() - known):
        if _OF_A_RUN.match(name):
            why = "state of the run"
        elif _MTP.match(name.removeprefix(prefix)):
            why = "layers for multi-token prediction, which megatune's models have not"
        elif EXTRA in name:
            why = "state of Transformer Engine's layers"
        else:
            raise CheckpointError(
                f"{stored}: {name} {list(stored.shape(name))} belongs to no parameter of the model that the config "
                "describes; leaving it out would change the model"
            )
        lines.append(Line(name, "skipped", why))
    return lines


FORMAT = Format(KIND, "Megatron-Core torch_dist", detect, open_torch_dist, TorchDistTarget)
