"""Conversions against the disk: each reads every byte once and writes it once, so no copy can be faster.

    python -m benchmarks.convert [--gigabytes 2] [--rounds 3] [--workers N] [--folder DIR] [--out FILE]

A Llama of about that size in bf16 goes from a Hugging Face folder to a checkpoint of megatune and back. `limit` copies
the same bytes with the same number of processes in portions of 16 MiB, synced at the end, and does nothing else. Files
are dropped from the page cache before each round. `rival`: transformers loads the folder and saves it. Memory: sum over
all processes of the resident set with shared pages counted once (PSS), sampled ten times a second, less what one idle
process with the same imports has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, device_name, drop_cached
from megatune.checkpoint.safetensors_file import SafetensorsWriter

ROOT = Path(__file__).parents[1]
PORTION = 16 << 20
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "heads": 32, "kv_heads": 8, "vocab_size": 32000}

_CONVERT = """
import sys
from megatune.checkpoint.convert.core import convert
if __name__ == "__main__":
    source, destination, to, workers = sys.argv[1:]
    result = convert(source, destination, to, workers=int(workers))
    print(result.seconds)
"""
_RIVAL = """
import sys, time, torch
from transformers import AutoModelForCausalLM
began = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
print(time.perf_counter() - began)
"""
_IDLE = (
    "import sys, megatune.checkpoint.convert.core, megatune.checkpoint.convert.megatune_run; sys.stdin.read()"
)


def make_model(folder: Path, gigabytes: float) -> int:
    """Write a Llama of about that size; returns its bytes."""
    hidden, mlp, vocab = (SHAPE[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // SHAPE["heads"] * SHAPE["kv_heads"]
    block = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    one = 2 * sum(a * (b[0] if b else 1) for a, *b in block.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / one))
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    top = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes = top | shapes | {"lm_head.weight": (vocab, hidden)}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(
        folder / "model.safetensors", [(n, torch.bfloat16, s) for n, s in shapes.items()]
    ) as writer:
        for name, shape in shapes.items():
            bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
            writer.write(name, (bits & -0x4001).view(torch.bfloat16))  # no NaN, no infinity
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv_heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def _copy(source: Path, target: Path, start: int, stop: int, reads: bool, writes: bool) -> None:
    buffer = bytearray(PORTION)
    if writes and not reads:
        buffer[:] = os.urandom(PORTION)
    here = os.open(source, os.O_RDONLY)
    there = os.open(target, os.O_WRONLY | os.O_CREAT)
    for offset in range(start, stop, PORTION):
        view = memoryview(buffer)[: min(PORTION, stop - offset)]
        if reads:
            os.preadv(here, [view], offset)
        if writes:
            os.pwrite(there, view, offset)
    if writes:
        os.fdatasync(there)
    os.close(here)
    os.close(there)


def disk(source: Path, folder: Path, workers: int, *, reads: bool = True, writes: bool = True) -> float:
    """Seconds to read, write, or copy the bytes of a file, whole again on disk."""
    drop_cached(source.parent)
    folder.mkdir(exist_ok=True)
    target, size = folder / "copy", source.stat().st_size
    cuts = [size * i // workers for i in range(workers + 1)]
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_copy, source, target, a, b, reads, writes) for a, b in itertools.pairwise(cuts)]
        for job in jobs:
            job.result()
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from _family(int(child))


def _pss(pid: int) -> int:
    """Bytes of a process and those that it started, shared pages counted once."""
    total = 0
    for one in _family(pid):
        text = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += int(text.split("\nPss:", 1)[1].split()[0]) * 1024
    return total


def timed(code: str, *words: object) -> tuple[float, int, float]:
    """(seconds that the program says it took, peak bytes of it and its processes, their processor seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, _pss(process.pid))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue  # a process ended while it was looked at
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the program ended with code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(process.stdout.read().split()[-1]), peak, used


def idle_bytes() -> int:
    """What one process with the imports has."""
    process = subprocess.Popen([sys.executable, "-c", _IDLE], cwd=ROOT, stdin=subprocess.PIPE)
    last, now = -1, 0
    while now != last or now < 50 << 20:
        time.sleep(1.5)
        last, now = now, _pss(process.pid)
    process.communicate(b"")
    return now


@contextmanager
def workplace(folder: str | None) -> Iterator[Path]:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="convert-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def line(
    name: str, seconds: Sequence[float], limit: float, size: int, peak: int | None = None
) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "name": name,
        "seconds": [round(one, 2) for one in seconds],
        "gigabytes_per_second": round(size / middle / 1e9, 3),
        "share_of_limit": round(limit / middle, 2),
        "peak_mib_beyond_imports": None if peak is None else round(peak / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", help="where to write; default: the folder for temporary files")
    parser.add_argument("--rival", action="store_true", help="also time transformers")
    parser.add_argument("--out", help="result file; default: benchmarks/results/convert.json")
    chosen = parser.parse_args()
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    processor: dict[str, list[float]] = {}
    with workplace(chosen.folder) as place:
        size = make_model(place / "hf", chosen.gigabytes)
        idle = idle_bytes()
        weights = place / "hf/model.safetensors"
        for _ in range(chosen.rounds):
            for name, options in (("copy", {}), ("read", {"writes": False}), ("write", {"reads": False})):
                times.setdefault(name, []).append(disk(weights, place / "raw", chosen.workers, **options))
            for name, source, to in (
                ("hf -> megatune", "hf", "megatune"),
                ("megatune -> hf", "megatune", "hf"),
            ):
                target = place / (to if to == "megatune" else "back")
                drop_cached(place / source)
                seconds, peak, used = timed(_CONVERT, place / source, target, to, chosen.workers)
                times.setdefault(name, []).append(seconds)
                processor.setdefault(name, []).append(used)
                peaks[name] = max(peaks.get(name, 0), peak - idle)
            for name in ("megatune", "back"):
                shutil.rmtree(place / name)
            if chosen.rival:
                drop_cached(place / "hf")
                seconds, peak, _ = timed(_RIVAL, place / "hf", place / "rival")
                times.setdefault("transformers load + save", []).append(seconds)
                peaks["transformers load + save"] = max(peaks.get("transformers load + save", 0), peak - idle)
                shutil.rmtree(place / "rival")
    limit = statistics.median(times["copy"])
    rows = [line(name, seconds, limit, size, peaks.get(name)) for name, seconds in times.items()]
    for one in rows:
        if one["name"] in processor:
            one["processor_seconds"] = [round(used, 1) for used in processor[one["name"]]]
        print("  ".join(f"{key} {value}" for key, value in one.items()))
    facts = {"bytes": size, "largest_tensor_bytes": SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2}
    content = {"benchmark": "convert", "device": device_name(), "torch": torch.__version__}
    # Other work on the machine slows what computes more than what waits for the disk.
    facts["load_average"] = round(os.getloadavg()[0], 1)
    content |= {**facts, "workers": chosen.workers, "rows": rows}
    path = Path(chosen.out) if chosen.out else RESULTS / "convert.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
