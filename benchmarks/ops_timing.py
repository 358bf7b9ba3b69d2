"""How the op benchmark measures: device time, host time, memory, and the limits that this device reaches itself.

Device time is that of a CUDA graph of many calls, replayed several times: the median replay over the number of calls,
so that no launch is waited for. The calls go over enough sets of inputs (and each call writes outputs of its own) that
the second level cache holds nothing of the next one's. What takes longer than `LONG_MS` is timed call by call with
events: there the host is no limit. On a CPU: the median call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_cases import Work

Call = Callable[[], Any]
LONG_MS = 3.0
GRAPH_MS = 4.0  # of work in one graph
MOST_CALLS = 64
REPLAYS = 9
LARGE_PRODUCT = ("NT", 8192, 8192, 8192)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of what a function gives: one, several or none."""
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value or () if isinstance(part, Tensor)]


@dataclass
class Device:
    """Where the benchmark runs. On CUDA all of it is on the current stream, which must not be the default one (graphs
    are made of another)."""

    type: str
    cache: int = 0  # bytes of the second level cache
    products: dict[str, float] = field(default_factory=dict)  # measured bare products: ms
    copy: float = 0.0  # bytes a second of a large copy, read and written

    @classmethod
    def here(cls, type_: str) -> Device:
        cache = torch.cuda.get_device_properties(0).L2_cache_size if type_ == "cuda" else 0
        return cls(type_, cache)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes are needed for none of them to be in the cache when it is used."""
        return 1 if self.type == "cpu" else max(2, min(16, -(-4 * self.cache // max(size, 1))))

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    # ---- time

    def milliseconds(self, calls: Sequence[Call]) -> tuple[float, str]:
        """(time of one call, taken with a "graph", "events" or a "clock"); `calls` do the same on different inputs."""
        for call in calls:
            call()
        self.synchronize()
        if self.type == "cpu":
            return statistics.median(_clock(call) for call in [*calls] * 3), "clock"
        estimate = self._events(calls, 1) / len(calls)
        if estimate < LONG_MS:
            rounds = max(1, min(MOST_CALLS, round(GRAPH_MS / max(estimate, 1e-3))) // len(calls))
            try:
                return self._graph([*calls] * rounds, len(calls)), "graph"
            except RuntimeError:  # something in it waits for the device: no graph of it
                torch.cuda.synchronize()
        once = [self._events([calls[i % len(calls)]], 1) for i in range(5 if estimate > 20 else 11)]
        return statistics.median(once), "events"

    def _events(self, calls: Sequence[Call], rounds: int) -> float:
        """Milliseconds of all calls, `rounds` times."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(rounds):
            for call in calls:
                call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    def _graph(self, calls: Sequence[Call], sets: int) -> float:
        graph = torch.cuda.CUDAGraph()
        alive: deque[Any] = deque(maxlen=sets)  # outputs of a round are not each other's memory
        gc.disable()  # nothing that belongs to another graph may be freed while this one is made
        try:
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                for call in calls:
                    alive.append(call())
            finally:
                graph.capture_end()
        finally:
            gc.enable()
        times = []
        for _ in range(REPLAYS + 2):
            times.append(self._events([graph.replay], 1) / len(calls))
        alive.clear()
        graph.reset()
        return statistics.median(times[2:])

    def host_microseconds(self, call: Call, repeats: int = 30) -> float:
        """Of the host's time in one plain call, the device's not waited for."""
        call()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        spent = time.perf_counter() - began
        self.synchronize()
        return spent / repeats * 1e6

    def peak_bytes(self, call: Call) -> int:
        """What a call needs beyond what is there before, its results included."""
        if self.type == "cpu":
            return 0
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    # ---- limits

    def measure_copy(self, size: int = 2**31) -> float:
        """Bytes a second, read and written, of a copy from device memory to device memory."""
        source = torch.randint(100, (size,), dtype=torch.uint8, device=self.type)
        target = torch.empty_like(source)
        if self.type == "cpu":
            taken, _ = self.milliseconds([lambda: target.copy_(source)])
        else:
            self._events([lambda: target.copy_(source)], 2)
            taken = statistics.median(self._events([lambda: target.copy_(source)], 1) for _ in range(11))
        self.copy = max(self.copy, 2 * size / taken * 1e3)
        return self.copy

    def product_ms(self, product: tuple[str, int, int, int], dtype: torch.dtype) -> float:
        """[m, k] x [k, n], bare: of A and B row by row (NN), of B or of A transposed (NT, TN)."""
        kind, m, n, k = product
        name = f"{kind} {m} x {n} x {k}"
        if name not in self.products:
            a = torch.randn((m, k) if kind[0] == "N" else (k, m), dtype=dtype, device=self.type)
            b = torch.randn((k, n) if kind[1] == "N" else (n, k), dtype=dtype, device=self.type)
            left = a if kind[0] == "N" else a.t()
            right = b if kind[1] == "N" else b.t()
            out = torch.empty(m, n, dtype=dtype, device=self.type)
            self.products[name], _ = self.milliseconds([lambda: torch.mm(left, right, out=out)])
        return self.products[name]

    def limit_ms(self, work: Work, dtype: torch.dtype) -> float:
        """The time that the work takes at the rates measured here."""
        if work.products:
            return sum(self.product_ms(product, dtype) for product in work.products)
        if work.flops:
            _, m, n, k = LARGE_PRODUCT if self.type == "cuda" else ("NT", 256, 256, 256)
            rate = 2 * m * n * k / self.product_ms(("NT", m, n, k), dtype)
            return work.flops / rate
        return work.size / self.copy * 1e3


def _clock(call: Call) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
