"""Best-fit packing and its index on one core: documents a second, how full the bins are, bytes of memory a document.

    python -m benchmarks.pack [--documents 10000000] [--repeats 5] [--out FILE]

The best of `repeats` by the thread's own processor time, so that other programs on the machine count little. Memory:
the growth of resident memory from before the call to its peak within, the result's 8 bytes included. Each length
distribution runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
CAPACITY = 4096


def lengths_of(name: str, documents: int) -> np.ndarray:
    """int64 [documents]. text: log-normal with median 400 and mean 820 tokens, as web text has; the adversarial ones:
    every bin takes two (half of all bins wait with one amount of room), bins come to wait out of order, and bins that
    almost never close."""
    random = np.random.default_rng(0)
    if name == "uniform":
        return random.integers(1, CAPACITY + 1, documents)
    if name == "text":
        return np.clip(random.lognormal(np.log(400), 1.2, documents), 1, CAPACITY).astype(np.int64)
    if name == "adversarial: pairs":
        return np.where(np.arange(documents) % 2 == 0, 2400, 1600)
    if name == "adversarial: out of order":
        # Rounds of three lengths whose bins come to the same amount of room from two sides.
        return random.choice(np.array([1500, 1400, 1300, 1200, 1100, 700, 600, 500, 3]), documents)
    assert name == "adversarial: all different rooms"
    return random.integers(CAPACITY // 3, CAPACITY // 2 + 200, documents)


DISTRIBUTIONS = (
    "uniform",
    "text",
    "adversarial: pairs",
    "adversarial: out of order",
    "adversarial: all different rooms",
)


def best(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(repeats):
        del result
        began = time.thread_time()
        result = function()
        seconds.append(time.thread_time() - began)
    return min(seconds), result


def resident(key: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most since `forget_peak` (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, documents: int, repeats: int) -> dict[str, Any]:
    from megatune.data import packing

    if packing._pack is None:
        raise SystemExit("benchmarks.pack measures megatune._pack, and it is not built")
    lengths = lengths_of(name, documents)
    forget_peak()
    before = resident("VmRSS")
    bins = packing.best_fit(lengths, CAPACITY)
    memory = resident("VmHWM") - before
    del bins
    seconds, bins = best(lambda: packing.best_fit(lengths, CAPACITY), repeats)
    count = int(bins.max()) + 1
    index_seconds, _ = best(lambda: packing.sequence_index(bins, lengths, lengths, count), repeats)
    return {
        "lengths": name,
        "documents": documents,
        "pack_seconds": round(seconds, 4),
        "documents_per_second": round(documents / seconds),
        "pack_bytes_per_document": round(memory / documents, 1),
        "index_seconds": round(index_seconds, 4),
        "both_documents_per_second": round(documents / (seconds + index_seconds)),
        "bins": count,
        "full": round(float(lengths.sum()) / CAPACITY / count, 5),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "pack.json")
    args = parser.parse_args()
    rows = []
    for name in DISTRIBUTIONS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, name, args.documents, args.repeats).result())
        print(json.dumps(rows[-1]))
    result = {
        "benchmark": "pack",
        "device": f"{processor()}, 1 core, processor time, best of {args.repeats}",
        "capacity": CAPACITY,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
