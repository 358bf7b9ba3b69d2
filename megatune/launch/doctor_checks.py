"""What `megatune doctor` makes of what it measured: pure functions from facts to findings. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

GIB = 2**30
OK, NOTE, WARNING, NO_GO = "ok", "note", "warning", "no go"

VERSIONS = ("megatune", "torch", "python", "cuda", "nccl", "driver")
# A pair of nodes, or a GPU, that has less than this share of the median holds all others up.
_SLOW, _SLOWISH = 0.5, 0.8
_CLOCK_OFF, _CLOCK_WRONG = 0.1, 5.0  # seconds
_FILES, _FEW_FILES = 4096, 1024
_SHARED_MEMORY = GIB  # containers come with 64 MiB; NCCL and data workers take more
_SLOW_DISK = 50e6  # bytes/s
_SLOW_SYNC = 0.5  # seconds
_LATE = 1.0  # seconds until a file is seen on another node
_SPARE = 1.1  # memory that the allocator wastes, and space for what is small


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level`: ok, note, warning, no go."""

    level: str
    check: str
    text: str


@dataclass(frozen=True)
class Gpu:
    """`memory`, `free`: bytes. `errors`: uncorrected ECC errors since the driver was loaded, None where unknown."""

    name: str
    memory: int
    free: int
    errors: int | None = None


@dataclass(frozen=True)
class Node:
    """What one machine says of itself. `versions`: by name, see VERSIONS; empty where there is none. `driver_cuda`: the
    newest CUDA that the driver serves, (12, 8), None without one; `torch_gpus`: how many torch sees.

    Limits: `open_files` a process, `locked_memory` bytes (-1: no limit), `shared_memory`: bytes of /dev/shm;
    `infiniband`: adapters; `own_address`: what the host's own name resolves to. `mistakes`: what in the configuration
    does not fit here.
    """

    host: str
    ranks: int
    cores: int
    memory: int
    versions: Mapping[str, str]
    gpus: Sequence[Gpu] = ()
    torch_gpus: int = 0
    driver_cuda: tuple[int, int] | None = None
    open_files: int = -1
    locked_memory: int = -1
    shared_memory: int = 64 * GIB
    infiniband: int = 0
    own_address: str = ""
    mistakes: Sequence[str] = ()


@dataclass(frozen=True)
class Storage:
    """What one node found in the run's folder. `problem`: what failed, with the reason; `seconds` for `written` bytes;
    `sync`: seconds for a small file to be on disk; `seen`: seconds until rank 0's file was there, None: never."""

    host: str
    problem: str = ""
    written: int = 0
    seconds: float = 0.0
    sync: float = 0.0
    seen: float | None = 0.0


@dataclass(frozen=True)
class Pair:
    """All-reduce between the ranks of two nodes (or of one: `a` is `b`). `speed`: bus bandwidth in bytes/s: bytes times
    2 (n - 1) / n over the time; `problem`: why there is none."""

    a: str
    b: str
    speed: float = 0.0
    problem: str = ""

    @property
    def name(self) -> str:
        return self.a if self.a == self.b else f"{self.a} - {self.b}"


@dataclass(frozen=True)
class Needs:
    """What the configuration will take. Bytes: `checkpoint`: one; `disk`: all that will lie there beside what lies
    there already; `process`: memory of the dearest process."""

    processes: int
    checkpoint: int
    disk: int
    process: int


@dataclass
class Facts:
    """All that was measured. `clocks`: seconds that a node is ahead of the first; `rates`: FLOP/s by (host, rank);
    `free`: bytes free in the run's folder."""

    nodes: list[Node] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    clocks: dict[str, float] = field(default_factory=dict)
    storage: list[Storage] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    folder: str = ""
    free: int | None = None
    needs: Needs | None = None
    mistakes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(facts: Facts) -> list[Finding]:
    """Every finding, in the order of the report."""
    return [
        *_versions(facts.nodes),
        *_gpus(facts.nodes),
        *_rates(facts.rates),
        *_limits(facts.nodes),
        *_names(facts.nodes),
        *_clocks(facts.clocks),
        *_pairs(facts.pairs),
        *_configuration(facts),
        *_memory(facts),
        *_storage(facts),
        *_space(facts),
    ]


def is_go(findings: Sequence[Finding]) -> bool:
    return all(finding.level != NO_GO for finding in findings)


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    for name in VERSIONS:
        where: dict[str, list[str]] = defaultdict(list)
        for node in nodes:
            where[node.versions.get(name, "") or "none"].append(node.host)
        if len(where) > 1:
            said = "; ".join(f"{version} on {_some(hosts)}" for version, hosts in where.items())
            yield Finding(NO_GO, "versions", f"{name} differs: {said}. Install one version on all nodes")
    first = nodes[0].versions
    said = ", ".join(f"{name} {first[name]}" for name in VERSIONS if first.get(name))
    yield Finding(OK, "versions", f"{said}; {count(len(nodes), 'node')}")


def _gpus(nodes: Sequence[Node]) -> Iterator[Finding]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        yield from _gpus_of(node)
        names = sorted({gpu.name for gpu in node.gpus})
        kinds[f"{len(node.gpus)} x {' and '.join(names)}" if node.gpus else "no GPU"].append(node.host)
    said = "; ".join(f"{kind} on {_some(hosts)}" for kind, hosts in kinds.items())
    yield Finding(
        WARNING if len(kinds) > 1 else OK, "GPUs", said + (" (they differ)" if len(kinds) > 1 else "")
    )


def _gpus_of(node: Node) -> Iterator[Finding]:
    if not node.gpus:
        return
    built, served = node.versions.get("cuda", ""), node.driver_cuda
    if not built:
        text = f"{node.host} has {count(len(node.gpus), 'GPU')}, but torch is a build for CPUs; install torch for CUDA"
        yield Finding(NO_GO, "GPUs", text)
        return
    needed = tuple(int(part) for part in built.split(".")[:2])
    if served is not None and served[0] < needed[0]:
        text = (
            f"{node.host}: torch is built for CUDA {built}, the driver serves CUDA {served[0]}.{served[1]} and older; "
            f"update the driver, or install torch for CUDA {served[0]}"
        )
        yield Finding(NO_GO, "GPUs", text)
    elif served is not None and served < needed:
        text = f"{node.host}: torch is built for CUDA {built}, the driver for {served[0]}.{served[1]}"
        yield Finding(NOTE, "GPUs", f"{text}; that works, but kernels that are compiled at run time may not")
    if node.torch_gpus < len(node.gpus):
        text = f"{node.host}: torch sees {node.torch_gpus} of {len(node.gpus)} GPUs; see nvidia-smi and dmesg there"
        yield Finding(NO_GO, "GPUs", text)
    if node.ranks > len(node.gpus):
        text = f"{node.host} runs {node.ranks} ranks on {count(len(node.gpus), 'GPU')}; start one a GPU"
        yield Finding(NO_GO, "GPUs", text)
    for index, gpu in enumerate(node.gpus):
        if gpu.errors:
            text = f"{node.host}: GPU {index} has {gpu.errors} uncorrected memory errors; reset it or drop the node"
            yield Finding(NO_GO, "GPUs", text)
        if gpu.free < 0.95 * gpu.memory:
            used = gpu.memory - gpu.free
            yield Finding(WARNING, "GPUs", f"{node.host}: GPU {index} has {_size(used)} in use by others")


def _rates(rates: Mapping[str, float]) -> Iterator[Finding]:
    if not rates:
        return
    usual = median(rates.values())
    for who, rate in rates.items():
        if rate < _SLOWISH * usual:
            level = NO_GO if rate < _SLOW * usual else WARNING
            text = f"{who} computes {rate / 1e12:.0f} TFLOP/s, the median is {usual / 1e12:.0f}"
            yield Finding(level, "speed", f"{text}: all wait for it (see its clocks and temperature)")
    yield Finding(OK, "speed", f"matrix products at {usual / 1e12:.0f} TFLOP/s a GPU (bf16, median)")


def _limits(nodes: Sequence[Node]) -> Iterator[Finding]:
    good = True
    for node in nodes:
        for level, text in _limits_of(node):
            good = good and level == NOTE
            yield Finding(level, "limits", f"{node.host}: {text}")
    if good:
        yield Finding(OK, "limits", "open files, locked memory and /dev/shm suffice")


def _limits_of(node: Node) -> Iterator[tuple[str, str]]:
    if 0 <= node.open_files < _FILES:
        level = NO_GO if node.open_files < _FEW_FILES else WARNING
        yield level, f"a process may open {node.open_files} files; raise it: ulimit -n {_FILES} or more"
    if node.infiniband and node.locked_memory != -1:
        size = f"{node.locked_memory / 2**20:.0f} MiB"
        yield (
            NO_GO,
            f"InfiniBand needs locked memory, the limit is {size}: ulimit -l unlimited (limits.conf, slurmd)",
        )
    if node.shared_memory < _SHARED_MEMORY:
        size = f"/dev/shm has {node.shared_memory / 2**20:.0f} MiB"
        yield (
            (NO_GO if node.gpus else WARNING),
            f"{size}; NCCL wants more: --shm-size (docker) or mount it larger",
        )


def _names(nodes: Sequence[Node]) -> Iterator[Finding]:
    if len(nodes) < 2:
        return
    wrong = [node.host for node in nodes if node.own_address.startswith("127.")]
    if wrong:
        text = (
            f"the name of {_some(wrong)} is a loopback address there, which gloo would take; set GLOO_SOCKET_IFNAME to "
            f"the interface that leads to the others, or mend /etc/hosts"
        )
        yield Finding(WARNING, "network", text)


def _clocks(clocks: Mapping[str, float]) -> Iterator[Finding]:
    for host, ahead in clocks.items():
        if abs(ahead) > _CLOCK_OFF:
            text = f"{host} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the first node"
            level = NO_GO if abs(ahead) > _CLOCK_WRONG else WARNING
            yield Finding(level, "clocks", f"{text}: start NTP there (reports and logs are ordered by time)")
    if len(clocks) > 1:
        off = max(map(abs, clocks.values()))
        yield Finding(OK if off <= _CLOCK_OFF else NOTE, "clocks", f"at most {1000 * off:.1f} ms apart")


def _pairs(pairs: Sequence[Pair]) -> Iterator[Finding]:
    for pair in pairs:
        if pair.problem:
            yield Finding(NO_GO, "network", f"{pair.name}: all-reduce failed: {pair.problem}")
    within = [pair for pair in pairs if pair.a == pair.b and not pair.problem]
    between = [pair for pair in pairs if pair.a != pair.b and not pair.problem]
    for kind, found in (("within a node", within), ("between two nodes", between)):
        if not found:
            continue
        usual = median(pair.speed for pair in found)
        slow = [pair for pair in found if pair.speed < _SLOWISH * usual]
        for pair in slow:
            level = NO_GO if pair.speed < _SLOW * usual else WARNING
            yield Finding(
                level, "network", f"{pair.name}: {_speed(pair.speed)}, the median is {_speed(usual)}"
            )
        yield from _slow_node(found, slow)
        yield Finding(
            OK, "network", f"all-reduce {kind}: {_speed(usual)} (median of {len(found)}, bus bandwidth)"
        )


def _slow_node(found: Sequence[Pair], slow: Sequence[Pair]) -> Iterator[Finding]:
    """Where one node is in all of several slow pairs, it is the node and not the cables."""
    hosts = {host for pair in slow for host in (pair.a, pair.b)}
    for host in sorted(hosts):
        its = [pair for pair in found if host in (pair.a, pair.b)]
        if len(its) > 2 and all(pair in slow for pair in its):
            yield Finding(NO_GO, "network", f"{host} is slow with every other node: leave it out")


def _configuration(facts: Facts) -> Iterator[Finding]:
    found: dict[str, list[str]] = defaultdict(list)
    for node in facts.nodes:
        for mistake in node.mistakes:
            found[mistake].append(node.host)
    for mistake in facts.mistakes:
        yield Finding(NO_GO, "config", mistake)
    for mistake, hosts in found.items():
        where = f" (on {_some(hosts)})" if len(hosts) < len(facts.nodes) else ""
        yield Finding(NO_GO, "config", mistake + where)


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.needs is None:
        return
    needed = _SPARE * facts.needs.process
    share = min((gpu.memory for node in facts.nodes for gpu in node.gpus), default=0)
    what = "the smallest GPU has"
    if not share:
        on_node = max(1, facts.needs.processes // len(facts.nodes))
        share, what = min(node.memory for node in facts.nodes) // on_node, "a process's share of the host is"
    said = f"a process needs about {_size(needed)} (estimate), {what} {_size(share)}"
    if needed > share:
        advice = "parallel.zero=3, recompute=selective or full, tensor, pipeline; more processes"
        yield Finding(NO_GO, "memory", f"{said}: {advice}")
    else:
        yield Finding(WARNING if needed > 0.9 * share else OK, "memory", said)


def _storage(facts: Facts) -> Iterator[Finding]:
    if not facts.storage:
        return
    where = f"checkpoint.folder {facts.folder}"
    for one in facts.storage:
        if one.problem:
            yield Finding(NO_GO, "storage", f"{where}, on {one.host}: {one.problem}")
        elif one.seen is None:
            text = f"{where}: {one.host} does not see what the first node wrote; use a file system that all nodes share"
            yield Finding(NO_GO, "storage", text)
        elif one.seen > _LATE:
            yield Finding(WARNING, "storage", f"{where}: {one.host} saw a new file after {one.seen:.1f} s")
    good = [one for one in facts.storage if not one.problem and one.seconds]
    if not good:
        return
    total = sum(one.written for one in good) / max(one.seconds for one in good)
    sync = max(one.sync for one in good)
    said = f"{_speed(total)} from {count(len(good), 'node')} at once, a small file is on disk in {1000 * sync:.1f} ms"
    if facts.needs is not None:
        one = facts.needs.checkpoint
        said += f"; a checkpoint of {_size(one)} takes about {one / total:.1f} s"
    level = WARNING if total < _SLOW_DISK or sync > _SLOW_SYNC else OK
    yield Finding(level, "storage", f"{where}: {said}" + (" (slow)" if level == WARNING else ""))


def _space(facts: Facts) -> Iterator[Finding]:
    if facts.free is None or facts.needs is None:
        return
    needed = int(_SPARE * facts.needs.disk)
    said = f"{facts.folder}: {_size(facts.free)} free, checkpoints and exports need {_size(needed)}"
    if needed > facts.free:
        advice = "free space, choose another checkpoint.folder, or lower checkpoint.keep_last"
        yield Finding(NO_GO, "space", f"{said}: {advice}")
    else:
        yield Finding(OK, "space", said)


def _speed(bytes_per_second: float) -> str:
    rate = bytes_per_second / 1e9
    return f"{rate:.1f} GB/s" if rate >= 1 else f"{1000 * rate:.0f} MB/s"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _some(hosts: Sequence[str], most: int = 4) -> str:
    """Their names, as many as one can read."""
    rest = len(hosts) - most
    return ", ".join(hosts[:most]) + (f" and {rest} more" if rest > 0 else "")
