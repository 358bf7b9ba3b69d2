"""How the op benchmark measures: device time, host time, memory, and the limits that this device reaches itself.

Device time is that of a CUDA graph of many calls, replayed until the replays agree: the median replay over the number
of calls, so that no launch is waited for. The calls go over enough sets of inputs (and each call writes outputs of its
own) that the second level cache holds nothing of the next one's. What takes longer than `LONG_MS`, or cannot be in a
graph, is timed with events while the host is ahead of the device. On a CPU: the median call.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_cases import Work

Call = Callable[[], Any]
Product = tuple[str, int, int, int]
LONG_MS = 3.0
GRAPH_MS = 3.0  # of work in one graph
MOST_CALLS = 64
SPREAD = 0.005  # of the middle half of the measurements, where they are enough
REPLAYS = (4, 12)  # at least, at most
HOT_MS = 150.0  # of work before anything is measured that runs into the device's limit of power
LARGE_COPY = 2**31
LARGE_PRODUCT = ("NT", 8192, 8192, 8192)
CLEARING = (
    1.5e11  # bytes a second at which memory given back is surely cleared: an H200's driver takes 4.5e11
)
SMALL_MS = 0.03  # work whose limit is below that is held against a copy of its own size, too


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of what a function gives: one, several or none."""
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value or () if isinstance(part, Tensor)]


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one call; how they were taken: with a "graph", "events" or a "clock"."""

    ms: float
    how: str


@dataclass
class Device:
    """Where the benchmark runs. On CUDA all of it is on the current stream, which must not be the default one (graphs
    are made of another)."""

    type: str
    cache: int = 0  # bytes of the second level cache
    memory: int = 0  # bytes of the device's own
    copy: float = 0.0  # bytes a second of a large copy, read and written
    copies: dict[str, float] = field(default_factory=dict)  # the same of each way to copy
    products: dict[str, float] = field(default_factory=dict)  # ms of each bare product
    small_copies: dict[int, float] = field(default_factory=dict)  # bytes read and written -> ms
    launch_ms: float = 0.0  # of an empty kernel between others in a graph
    spent: dict[str, float] = field(default_factory=dict)  # seconds of the wall clock, by what they went into

    @classmethod
    def here(cls, type_: str) -> Device:
        if type_ == "cpu":
            return cls(type_)
        facts = torch.cuda.get_device_properties(0)
        return cls(type_, facts.L2_cache_size, facts.total_memory)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes are needed for none of them to be in the cache when it is used."""
        return 1 if self.type == "cpu" else max(2, min(MOST_CALLS, -(-3 * self.cache // max(size, 1))))

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Adds the wall time of what is done within to `spent`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began

    # ---- time

    def milliseconds(self, calls: Sequence[Call], graph: bool = True) -> Timed:
        """Of one call; `calls` do the same on different inputs. `graph`: whether all that a call does would be in a
        graph."""
        for call in calls:
            call()
        self.synchronize()
        if self.type == "cpu":
            return Timed(statistics.median(_clock(call) for call in calls), "clock")
        estimate = self._events(calls) / len(calls)
        if estimate < LONG_MS and graph:
            rounds = max(1, min(MOST_CALLS, round(GRAPH_MS / max(estimate, 1e-3))) // len(calls))
            try:
                return Timed(self._graph([*calls] * rounds, len(calls)), "graph")
            except RuntimeError:  # something in it waits for the device: no graph of it
                torch.cuda.synchronize()
        turn = iter(range(10**9))
        return Timed(_settled(lambda: self._events([calls[next(turn) % len(calls)]]), 3, 7), "events")

    def steady(self, calls: Sequence[Call]) -> list[float]:
        """Median milliseconds of each, all in turn, once the device has been at it for a while. Products reach its
        limit of power: what follows a rest, or lighter work, runs at a higher clock than a training step's does."""
        if self.type == "cpu":
            return [_clock(call) for call in calls]
        for call in calls:
            call()
        rounds = max(5, min(200, round(HOT_MS / self._events(calls))))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds * len(calls) + 1)]
        torch.cuda._sleep(4_000_000)  # the host gets ahead
        marks[0].record()
        for number, mark in enumerate(marks[1:]):
            calls[number % len(calls)]()
            mark.record()
        torch.cuda.synchronize()
        times = [began.elapsed_time(ended) for began, ended in pairwise(marks)][rounds * len(calls) :]
        return [statistics.median(times[number :: len(calls)]) for number in range(len(calls))]

    def _events(self, calls: Sequence[Call]) -> float:
        """Milliseconds of all calls."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        began.record()
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
        self._events([graph.replay])
        found = _settled(lambda: self._events([graph.replay]), *REPLAYS)
        alive.clear()
        graph.reset()
        return found / len(calls)

    def host_microseconds(self, call: Call, repeats: int) -> float:
        """Of the host's time in one plain call, which has been called before; the device's is not waited for."""
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

    def measure_limits(self, size: int = LARGE_COPY) -> None:
        """Bytes a second of a copy of `size` bytes, by the driver and by a kernel: the better one is the limit. And
        what a kernel takes that does nothing."""
        source = torch.randint(100, (size // 4,), dtype=torch.int32, device=self.type)
        target = torch.empty_like(source)
        ways = {
            "memcpy": lambda: target.copy_(source),
            "kernel": lambda: torch.bitwise_not(source, out=target),
        }
        for name, call in ways.items():
            call()
            ms = (
                _clock(call)
                if self.type == "cpu"
                else _settled(lambda call=call: self._events([call]), 5, 15)
            )
            self.copies[name] = 2 * source.nbytes / ms * 1e3
        self.copy = max(self.copies.values())
        if self.type == "cuda":
            self.launch_ms = self._graph([lambda: torch.cuda._sleep(0)] * 256, 1)

    def small_copy_ms(self, size: int) -> float:
        """Of a copy that reads and writes `size` bytes together, none of them in the cache."""
        if size not in self.small_copies:
            half = max(16, size // 2)
            sets = self.sets(half)
            pairs = [torch.zeros(2, -(-half // 4), dtype=torch.int32, device=self.type) for _ in range(sets)]
            ways = (
                [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs],
                [lambda pair=pair: torch.bitwise_not(pair[0], out=pair[1]) for pair in pairs],
            )
            self.small_copies[size] = min(self.milliseconds(calls).ms for calls in ways)
        return self.small_copies[size]

    def _random_operands(self, product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[m, k] and [k, n], row by row (NN), or of B or of A transposed (NT, TN)."""
        kind, m, n, k = product
        a = torch.randn((m, k) if kind[0] == "N" else (k, m), dtype=dtype, device=self.type)
        b = torch.randn((k, n) if kind[1] == "N" else (n, k), dtype=dtype, device=self.type)
        return a if kind[0] == "N" else a.t(), b if kind[1] == "N" else b.t()

    def bare_products(self, work: Work, dtype: torch.dtype, inputs: Sequence[Tensor] = ()) -> list[Call]:
        """The products of a case with these inputs, each by itself."""
        if work.operands is not None:
            pairs = work.operands(*inputs)
        else:
            pairs = [self._random_operands(product, dtype) for product in work.products]
        outputs = [a.new_empty(a.shape[0], b.shape[1]) for a, b in pairs]
        return [partial(torch.mm, a, b, out=out) for (a, b), out in zip(pairs, outputs, strict=True)]

    def beside_products(
        self, call: Call, work: Work, dtype: torch.dtype, inputs: Sequence[Tensor]
    ) -> tuple[Timed, float]:
        """A call's time and that of all its bare products, taken in turn and, where the work says which, with the same
        numbers: products of random ones take 5 to 10 % longer than those of gradients, as clocks fall further."""
        products = self.bare_products(work, dtype, inputs)
        ms, *bare = self.steady([call, *products])
        for product, one in zip(work.products, bare, strict=True):
            self.products[name_of(product)] = one
        return Timed(ms, "clock" if self.type == "cpu" else "events"), sum(bare)

    def forget(self) -> None:
        """Where much of the memory is taken: frees what Python has not freed yet. The driver then clears it in the
        background, and until that is done everything takes a tenth longer: waits for it."""
        reserved = torch.cuda.memory_reserved() if self.type == "cuda" else 0
        if reserved > self.memory // 4:
            gc.collect()
            torch.cuda.empty_cache()
            time.sleep((reserved - torch.cuda.memory_reserved()) / CLEARING)

    def limit_ms(self, work: Work, dtype: torch.dtype) -> float:
        """The time that work without products of its own takes at the rates measured here."""
        if not work.flops:
            return work.size / self.copy * 1e3
        large = LARGE_PRODUCT if self.type == "cuda" else ("NT", 64, 64, 64)
        name = name_of(large)
        if name not in self.products:
            (self.products[name],) = self.steady(self.bare_products(Work(products=(large,)), dtype))
        return work.flops * self.products[name] / (2 * math.prod(large[1:]))

    def with_limit(
        self, calls: Sequence[Call], work: Work, dtype: torch.dtype, inputs: Sequence[Tensor], graph: bool
    ) -> tuple[Timed, float]:
        """How long one of the calls takes, and the milliseconds that are the limit. `inputs`: the first call's."""
        if work.products:
            return self.beside_products(calls[0], work, dtype, inputs)
        return self.milliseconds(calls, graph), self.limit_ms(work, dtype)


def name_of(product: Product) -> str:
    kind, m, n, k = product
    return f"{kind} {m} x {n} x {k}"


def _settled(once: Call, least: int, most: int) -> float:
    """The median of `once`, called until the middle half of what it gives is close together."""
    times: list[float] = []
    while len(times) < most:
        times.append(once())
        ordered = sorted(times)
        quarter = len(times) // 4
        if (
            len(times) >= least
            and ordered[-1 - quarter] - ordered[quarter] <= SPREAD * ordered[len(times) // 2]
        ):
            break
    return statistics.median(times)


def _clock(call: Call) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
