"""Checkpoints of megatune: a run's folder, one of its steps, or a folder that was converted to this format.

What `--to megatune` writes: `checkpoints/step-000120/`, a checkpoint as runs save them, and beside it the model's
config.json and tokenizer, so that the folder is a `model.path`. With optimizer states its weights are the fp32 masters
and the folder is also a `checkpoint.start`, from which a run goes on with moments and step; without, the weights keep
their dtypes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune import __version__
from megatune.adapters import attach
from megatune.checkpoint import files, store
from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.convert.base import SLOTS, Format, Job, Line, Opened, Options, copy_extras
from megatune.checkpoint.convert.digest import PORTION_BYTES, bytes_of
from megatune.checkpoint.convert.disk import ahead, write_at
from megatune.checkpoint.convert.disk import opened as opened_file
from megatune.checkpoint.convert.names import Cast, main_dtype, model_map
from megatune.checkpoint.convert.run_source import Fallback, HfView, StepTensors
from megatune.checkpoint.hf import FP32, write_json
from megatune.checkpoint.manifest import (
    BLOCK_BYTES,
    DTYPE_NAMES,
    MANIFEST,
    RUN,
    BlockChecksums,
    Chunk,
    Manifest,
    TensorEntry,
    dump_manifest,
    file_from_json,
    file_to_json,
    read_manifest,
)
from megatune.checkpoint.manifest import read_json as read_own_json
from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.peft import adapter_config
from megatune.checkpoint.peft_names import adapter_map
from megatune.checkpoint.pretrained import base_map
from megatune.checkpoint.resolve import ModelFolder, resolve_model
from megatune.checkpoint.safetensors_file import DTYPES, header_of
from megatune.checkpoint.sources import TensorSource, read_json
from megatune.config.schema import LoraMethod
from megatune.config.yaml_reader import read_yaml
from megatune.errors import CheckpointError, ConfigError
from megatune.models.build import build
from megatune.models.registry import family_for
from megatune.parallel.shard import Box

# What one job writes: a file.
FILE_BYTES = 256 << 20
_CHECKPOINTS = "checkpoints"
_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def detect(path: Path) -> bool:
    return ((path / MANIFEST).is_file() and (path / RUN).is_file()) or bool(store.steps(path / _CHECKPOINTS))


def open_run(path: Path, options: Options) -> Opened:
    """A run's folder (its newest whole checkpoint, or `options.step`), a step folder, or a converted folder. Weights
    that were not trained come from the base model; adapters are merged into it."""
    step = _step_folder(path, options.step)
    manifest = read_manifest(step)
    extra = _extra(step, manifest)
    root = step.parent.parent if step.parent.name == _CHECKPOINTS else step
    if extra.get("converted"):
        return _open_converted(step, manifest, extra["converted"], root)
    config = _config(root)
    base = resolve_model(str(options.like or config["model"]["path"]))
    wanted = _COMPUTE.get(config["model"].get("dtype", "auto"))
    if config["method"].get("type") == "lora":
        return _open_lora(step, manifest, base, config["method"])
    mapped = base_map(base.spec)
    weights = StepTensors(step, manifest, "model/")
    trained = {name: item for name, item in mapped.items() if name in weights.names()}
    optimizer = _moments(step, manifest, trained)
    own = base.tensors()
    dtype = wanted or main_dtype(own)
    view = HfView(weights, trained)
    dtypes = {name: torch.float32 if name.endswith(FP32) else dtype for name in view.names()}
    others = {n for item in mapped.values() for n in item.hf_shapes()} - view.names()
    lines = [Line(name, "mapped", f"not trained: from {base.path}") for name in sorted(others)]
    if not optimizer:
        name = config.get("optim", {}).get("name", "an optimizer")
        why = f"are of {name} (optim.name) and not AdamW's two moments in fp32, which alone have a place elsewhere"
        lines.append(Line("optimizer states", "skipped", why))
    return Opened(
        "megatune",
        step,
        base.hf_config,
        Fallback(Cast(view, dtypes), _found(own, others, base), others) if others else Cast(view, dtypes),
        optimizer,
        manifest.step,
        base.path,
        lines,
    )


def _moments(step: Path, manifest: Manifest, trained: Mapping[str, Mapped]) -> dict[str, TensorSource]:
    """AdamW's states by slot; none where another optimizer trained any of the weights. Lion's `exp_avg` is no moment of
    AdamW's, though it is called so."""
    wanted = {
        name
        for name, item in trained.items()
        if not all(hf_name.endswith(FP32) for hf_name in item.hf_shapes())
    }
    masters = HfView(StepTensors(step, manifest, "model/"), trained)
    # Those of adamw_bf16 are bf16: fp32 is what they become elsewhere, and holds the same numbers.
    found: dict[str, TensorSource] = {"master": Cast(masters, dict.fromkeys(masters.names(), torch.float32))}
    for slot in SLOTS[1:]:
        states = StepTensors(step, manifest, _prefix(slot))
        there = {name: trained[name] for name in states.names() if name in trained}
        if not wanted <= there.keys():
            return {}
        found[slot] = HfView(states, there)
    return found


def _found(source: TensorSource, names: set[str], base: ModelFolder) -> TensorSource:
    """The base's tensors, which must be there under these names."""
    if missing := sorted(names - source.names()):
        raise CheckpointError(
            f"{base.path}: has no tensor {missing[0]}, which the run did not train; is it the base?"
        )
    return source


def _open_lora(step: Path, manifest: Manifest, base: ModelFolder, method: Mapping[str, Any]) -> Opened:
    """A run that trained LoRA adapters: merged into its base."""
    from megatune.checkpoint.convert.peft import with_adapter

    try:
        lora = LoraMethod.model_validate(method)
    except ValueError as error:
        raise CheckpointError(
            f"{step}: the run's config.yaml describes no LoRA ({error}); restore it"
        ) from error
    model = build(base.spec)
    attach(model, lora)
    adapters = StepTensors(step, manifest, "model/")
    mapped = adapter_map(model)
    if missing := sorted(mapped.keys() - adapters.names()):
        raise CheckpointError(
            f"{step}: has no tensor {missing[0]}; it was saved from another model or method"
        )
    opened = Opened("megatune", step, base.hf_config, base.tensors(), {}, manifest.step, base.path)
    config = adapter_config(model, lora, str(base.path.resolve()))
    lines = [
        Line("optimizer states", "skipped", "are of the adapters, for which no other format has a place")
    ]
    merged = with_adapter(opened, HfView(adapters, mapped), config)
    return replace(merged, report=[*merged.report, *lines])


def _open_converted(step: Path, manifest: Manifest, notes: Mapping[str, Any], root: Path) -> Opened:
    config = read_json(root / "config.json")
    mapped = base_map(family_for(config).spec(config))
    view = HfView(StepTensors(step, manifest, "model/"), mapped)
    try:
        default = DTYPES[notes["dtype"]]
        others = {name: DTYPES[kind] for name, kind in notes["others"].items()}
        count = None if notes["step"] is None else int(notes["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{step / RUN}: does not say what was converted; convert again") from error
    weights = Cast(view, {name: others.get(name, default) for name in view.names()})
    optimizer = {}
    if any(name.startswith("optim/") for name in manifest.tensors):
        optimizer = {slot: HfView(StepTensors(step, manifest, _prefix(slot)), mapped) for slot in SLOTS}
    return Opened("megatune", step, config, weights, optimizer, count, root)


def digest_of(folder: Path) -> str:
    """Tells converted folders apart as `weights_digest` does model folders: of the checksums of all bytes."""
    return hashlib.sha256((_step_folder(folder, None) / MANIFEST).read_bytes()).hexdigest()


def _prefix(slot: str) -> str:
    """How names of a slot begin in a checkpoint."""
    return "model/" if slot == "master" else f"optim/{slot}/"


def _step_folder(path: Path, step: int | None) -> Path:
    if (path / MANIFEST).is_file():
        return path
    folder = path / _CHECKPOINTS
    if step is not None:
        found = next((one for one in store.steps(folder) if int(one.name.rpartition("-")[2]) == step), None)
        if found is None:
            raise CheckpointError(f"{folder}: has no checkpoint of step {step}")
        return found
    skipped: list[str] = []
    newest = store.newest(folder, skipped.append)
    if newest is None:
        raise CheckpointError(f"{folder}: holds no whole checkpoint ({'; '.join(skipped) or 'it is empty'})")
    return newest


def _extra(step: Path, manifest: Manifest) -> dict[str, Any]:
    """What run.json says beyond versions, once its checksum is right."""
    text = (step / RUN).read_bytes()
    entry = manifest.files[RUN]
    if len(text) != entry.size or not all(
        entry.is_right(block, text[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
        for block in range(len(entry.checksums))
    ):
        raise CheckpointError(f"{step / RUN}: is damaged; use another checkpoint")
    try:
        extra = read_own_json(text)["extra"]
        extra.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{step / RUN}: is no description of a run; use another checkpoint") from error
    return extra


def _config(root: Path) -> dict[str, Any]:
    """config.yaml of a run; it may come from anyone."""
    path = root / "config.yaml"
    try:
        config, _ = read_yaml(path.read_text("utf-8"), str(path))
        model, kinds = config["model"], (config["method"], config.get("optim", {}))
        is_one = isinstance(model["path"], str) and isinstance(model.get("dtype", ""), str)
        if not is_one or not all(isinstance(one, dict) for one in kinds):
            raise ValueError("other values than a configuration has")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the run's folder, or a step inside of it"
        ) from error
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no configuration of a run; restore it") from error
    return config


class MegatuneTarget:
    """A checkpoint without a layout: our tensors, each whole in one file, a manifest with their checksums."""

    def __init__(self, opened: Opened, options: Options) -> None:
        self.report: list[Line] = []
        self._opened = opened
        _, _, self._mapped = model_map(opened)
        self._sources = self._chosen(opened)
        self._step = f"{_CHECKPOINTS}/step-{opened.step or 0:06d}"
        self._files: dict[str, list[tuple[str, str]]] = {}
        self._jobs: list[Job] = []
        self._plan()

    def _chosen(self, opened: Opened) -> dict[str, TensorSource]:
        """Where the tensors of a checkpoint come from, by the beginnings of their names."""
        wanted = {name for item in self._mapped.values() for name in item.hf_shapes()}
        lacking = [slot for slot in SLOTS[1:] if slot not in opened.optimizer]
        slots = {slot: opened.optimizer[slot] for slot in SLOTS if slot in opened.optimizer}
        for slot, source in slots.items():
            if missing := sorted(wanted - source.names()):
                lacking.append(f"{slot} of {missing[0]}")
        if not lacking:
            slots.setdefault("master", Cast(opened.weights, dict.fromkeys(wanted, torch.float32)))
            return {_prefix(slot): slots[slot] for slot in SLOTS}
        if slots:
            self.report.append(Line("optimizer states", "skipped", f"the source lacks {', '.join(lacking)}"))
        return {"model/": opened.weights}

    def _plan(self) -> None:
        entries, size = [], 0
        for name, item in self._mapped.items():
            for prefix, source in self._sources.items():
                kinds = {source.dtype(hf_name) for hf_name in item.hf_shapes()}
                if len(kinds) > 1:
                    raise CheckpointError(
                        f"{source}: {', '.join(sorted(item.hf_shapes())[:3])} have different dtypes and are one tensor "
                        "here; convert with --dtype"
                    )
                own = math.prod(item.shape) * kinds.pop().itemsize
                if entries and size + own > FILE_BYTES:
                    self._add(entries, size)
                    entries, size = [], 0
                entries.append((prefix, name))
                size += own
        self._add(entries, size)

    def _add(self, entries: list[tuple[str, str]], size: int) -> None:
        file = f"part-{len(self._files):05d}.safetensors"
        self._files[file] = sorted(entries, key=lambda one: -self._dtype(*one).itemsize)
        self._jobs.append(Job(f"{self._step}/{file}", size))

    def _dtype(self, prefix: str, name: str) -> torch.dtype:
        return self._sources[prefix].dtype(self._mapped[name].pieces[0].hf_name)

    def jobs(self) -> list[Job]:
        return self._jobs

    def make(self, job: Job, folder: Path) -> None:
        path = folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._files[path.name]
        named = [(p + name, self._dtype(p, name), self._mapped[name].shape) for p, name in entries]
        checksums = BlockChecksums()
        with opened_file(path) as descriptor:
            end = 0
            for data in ahead(self._bytes(header_of(named)[0], entries), len):
                checksums.add(data)
                end = write_at(descriptor, data, end)
        note = json.dumps(file_to_json(checksums.entry())).encode()
        files.write_whole(path.with_name(f".{path.name}.json"), note)

    def _bytes(self, header: bytes, entries: list[tuple[str, str]]) -> Iterator[memoryview]:
        yield memoryview(header)
        for prefix, name in entries:
            for values in _in_portions(self._mapped[name], self._sources[prefix]):
                yield bytes_of(values.contiguous())

    def finish(self, folder: Path) -> None:
        step = folder / self._step
        if not (step / MANIFEST).is_file():  # else cut between here and the end
            run = json.dumps(self._run(), indent=1).encode()
            checksums = BlockChecksums()
            checksums.add(run)
            entries = {RUN: checksums.entry()}
            tensors: dict[str, TensorEntry] = {}
            for file, names in self._files.items():
                entries[file] = file_from_json(read_json(step / f".{file}.json"))
                for prefix, name in names:
                    shape, key = self._mapped[name].shape, prefix + name
                    chunk = Chunk(file, key, whole_box(shape))
                    tensors[key] = TensorEntry(self._dtype(prefix, name), shape, (chunk,))
            files.write_whole(step / RUN, run)
            files.write_whole(
                step / MANIFEST, dump_manifest(Manifest(self._opened.step or 0, tensors, entries))
            )
        for file in self._files:
            files.remove_file(step / f".{file}.json")
        copy_extras(self._opened, folder)
        config = {key: value for key, value in self._opened.hf_config.items() if key != "quantization_config"}
        for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = str(main_dtype(self._opened.weights)).removeprefix("torch.")
        write_json(folder / "config.json", config)

    def _run(self) -> dict[str, Any]:
        """run.json: a run that starts here has done `step` steps, and knows nothing of what they were."""
        weights, step = self._opened.weights, self._opened.step
        default = main_dtype(weights)
        kinds = {name: weights.dtype(name) for name in sorted(weights.names())}
        others = {name: DTYPE_NAMES[kind] for name, kind in kinds.items() if kind != default}
        notes = {"from": self._opened.kind, "step": step, "dtype": DTYPE_NAMES[default], "others": others}
        extra = {"converted": notes, "progress": {"step": step or 0}}
        versions = {"megatune": __version__, "torch": str(torch.__version__)}
        return {"step": step or 0, "versions": versions, "extra": extra}


def _in_portions(item: Mapped, source: TensorSource) -> Iterator[Tensor]:
    """Our tensor from the beginning to the end, from a source with Hugging Face names; every byte is read once."""
    row = math.prod(item.shape[1:]) * source.dtype(item.pieces[0].hf_name).itemsize
    step = max(1, PORTION_BYTES // max(1, row * item.group_rows)) * item.group_rows
    if item.pieces[0].transpose and not item.stacked:
        step = item.shape[0]  # our rows are the file's columns: every portion would read all of it
    rest = item.shape[1:]
    for start in range(0, item.shape[0], step):
        stop = min(item.shape[0], start + step)
        yield item.read_box(source, Box((start, *(0 for _ in rest)), (stop - start, *rest)))


FORMAT = Format("megatune", "megatune checkpoint", detect, open_run, MegatuneTarget)
