"""What the benchmarks share: a trainer of ours on given tokens, rivals' models, timing, and result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatune import models, ops, parallel
from megatune.config.schema import Config
from megatune.data.batch import Batch
from megatune.ops import Segments, Targets
from megatune.parallel.shard import Parts
from megatune.training import Trainer
from megatune.training.assemble import assemble, training_parts

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The GPU's name, or the processor's with the number of cores used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{name}{amx}, {torch.get_num_threads()} threads"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_step(step: Callable[[], Any], warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` calls, device work included."""
    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def trainer(
    config: Config, spec: models.DecoderSpec, dtype: torch.dtype, fill: Callable[[dict[str, Parts]], None]
) -> Trainer:
    """Our trainer in this process as `megatune train` wires it; `fill` gives it its weights."""
    world = parallel.init(config.parallel)
    ops.configure(config.ops.backend, world.device)
    built = assemble(spec, config, world, dtype)
    fill(built.zero.weights())
    built.zero.publish()
    optimizer, pipeline, _ = training_parts(built, config, world, dtype)
    return Trainer(built.model, built.zero, optimizer, pipeline, world, config, total_steps=1000)


def batch_of(documents: Sequence[Sequence[int]], scored: Sequence[Sequence[bool]]) -> Batch:
    """One packed micro-batch. `scored`: per token, whether it is a target (it is predicted by the token before)."""
    tokens, index, labels, start = [], [], [], 0
    for document, mask in zip(documents, scored, strict=True):
        tokens.extend(document)
        for position in range(1, len(document)):
            if mask[position]:
                index.append(start + position - 1)
                labels.append(document[position])
        start += len(document)
    return Batch(
        tokens=torch.tensor(tokens),
        segments=Segments.from_lengths([len(d) for d in documents]),
        targets=Targets(torch.tensor(index), torch.tensor(labels)),
        sequence_ids=(0,),
        sample_ids=tuple(range(len(documents))),
    )


def row(name: str, seconds: Sequence[float], tokens: int, **more: Any) -> dict[str, Any]:
    """One line of a result table; tokens/s from the median step."""
    middle = statistics.median(seconds)
    return {
        "name": name,
        "tokens_per_second": round(tokens / middle, 1),
        "step_seconds_median": round(middle, 4),
        "step_seconds_min": round(min(seconds), 4),
        "step_seconds_max": round(max(seconds), 4),
        **more,
    }


def report(title: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any], out: str | None) -> None:
    """Print the table and write it to benchmarks/results/ (or to `out`)."""
    for line in rows:
        extra = "  ".join(f"{k} {v}" for k, v in line.items() if k not in ("name", "tokens_per_second"))
        print(f"{line['name']:<44} {line['tokens_per_second']:>10,.0f} tokens/s  {extra}")
    path = Path(out) if out else RESULTS / f"{title}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": title,
        "device": device_name(),
        "torch": torch.__version__,
        **facts,
        "rows": list(rows),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def drop_cached(folder: Path) -> None:
    """Put a folder's files on disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
