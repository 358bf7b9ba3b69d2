"""What `megatune doctor` measures between nodes: who came, all-reduce of pairs, clocks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatune.errors import ParallelError
from megatune.launch.codes import USER_ERROR
from megatune.launch.doctor_checks import Pair

_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # of one all-reduce
_PINGS = 8


def meet(device: torch.device, timeout: float) -> tuple[int, int]:
    """Start the process group with the others of torchrun's variables; returns (rank, world size).

    Raises ParallelError that names the ranks which did not come within `timeout` seconds, or what keeps them apart.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    limit = timedelta(seconds=timeout)
    if size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return rank, size
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    host = socket.gethostname()
    # torchrun's agent has opened the store already.
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, None, opens, limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"rank {rank} on {host} does not reach rank 0 at {address}:{port} ({_first_line(error)}); is rank 0 up, "
            f"does this machine know that name, is the port open?"
        ) from error
    store = dist.PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _wait_for_all(store, rank, size, host, timeout)
    try:
        # Without a device: a communicator is made when two nodes first use it, not for all at once.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=limit
        )
    except RuntimeError as error:
        raise ParallelError(
            f"all ranks came, but {host} cannot connect to the others ({_first_line(error)}); set GLOO_SOCKET_IFNAME "
            f"and NCCL_SOCKET_IFNAME to the interface that leads to them"
        ) from error
    return rank, size


def _wait_for_all(store: dist.Store, rank: int, size: int, host: str, timeout: float) -> None:
    store.set(f"here/{rank}", host)
    if rank:
        store.wait(["all"], timedelta(seconds=timeout + 10))
        verdict = store.get("all").decode()
    else:
        deadline = time.monotonic() + timeout
        missing = list(range(size))
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([f"here/{other}"])]
            time.sleep(0.02)
        verdict = ", ".join(map(str, missing)) or "came"
        store.set("all", verdict)
    if verdict != "came":
        if rank:
            raise SystemExit(USER_ERROR)  # rank 0 says it
        raise ParallelError(
            f"of {size} ranks these did not come within {timeout:g} s: {verdict}; see their nodes (not started, no way "
            f"to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, or still waiting for a file system)"
        )


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of `count` players in as few rounds as can be (the circle method), each player in one pair at most in a
    round. An even number takes count - 1 rounds; an odd one takes count, in each of which one rests."""
    if count < 2:
        return []
    players: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def measure_pairs(
    hosts: Sequence[str],
    device: torch.device,
    *,
    note: Callable[[str], None] = lambda text: None,
    all_reduce: Callable[..., Any] = dist.all_reduce,
) -> list[Pair]:
    """Bus bandwidth within each node that has several ranks, and between all pairs of nodes, all pairs of a round at a
    time; every rank calls it. `hosts`: of each rank. Returns this rank's pairs; its node's first rank says them."""
    rank = dist.get_rank()
    members: dict[str, list[int]] = {}
    for number, host in enumerate(hosts):
        members.setdefault(host, []).append(number)
    nodes, mine = list(members), hosts[rank]
    found = []
    if len(members[mine]) > 1:
        found.append(_measure(mine, mine, members[mine], device, all_reduce))
    for number, pairs in enumerate(rounds(len(nodes)), 1):
        note(f"all-reduce between nodes: round {number} of {len(rounds(len(nodes)))}")
        for a, b in pairs:
            if mine in (nodes[a], nodes[b]):
                ranks = sorted(members[nodes[a]] + members[nodes[b]])
                found.append(_measure(nodes[a], nodes[b], ranks, device, all_reduce))
        barrier()
    return found if members[mine][0] == rank else []


def _measure(
    a: str,
    b: str,
    ranks: Sequence[int],
    device: torch.device,
    all_reduce: Callable[..., Any],
    repeats: int = 4,
) -> Pair:
    data = torch.ones(_BYTES[device.type] // 4, device=device)
    group = None
    try:
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        best = float("inf")
        for number in range(repeats):
            data.fill_(1.0)
            _synchronize(device)
            began = time.perf_counter()
            all_reduce(data, group=group)
            _synchronize(device)
            if number:  # the first one connects
                best = min(best, time.perf_counter() - began)
        wrong = int((data != len(ranks)).sum())
    except RuntimeError as error:
        return Pair(a, b, problem=_first_line(error))
    finally:
        if group is not None:
            dist.destroy_process_group(group)
    if wrong:
        return Pair(a, b, problem=f"{wrong} of {data.numel()} sums are wrong")
    return Pair(a, b, data.nbytes / best * 2 * (len(ranks) - 1) / len(ranks))


def clock_offsets(hosts: Sequence[str], clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Seconds that each node's clock is ahead of the first one's, on rank 0 (else empty): the first rank of each node
    answers pings, and the quickest round trip counts. Every rank calls it."""
    rank = dist.get_rank()
    first: dict[str, int] = {}
    for number, host in enumerate(hosts):
        first.setdefault(host, number)
    found = {hosts[0]: 0.0} if rank == 0 else {}
    for host, other in first.items():
        if other == 0:
            continue
        if rank == 0:
            found[host] = min((_ping(other, clock) for _ in range(_PINGS)), key=lambda one: one[0])[1]
        elif rank == other:
            for _ in range(_PINGS):
                dist.recv(torch.zeros(1, dtype=torch.float64), src=0)
                dist.send(torch.tensor([clock()], dtype=torch.float64), dst=0)
    return found


def _ping(other: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(seconds of the round trip, seconds that the other is ahead)."""
    answer = torch.zeros(1, dtype=torch.float64)
    began, sent = time.perf_counter(), clock()
    dist.send(torch.zeros(1, dtype=torch.float64), dst=other)
    dist.recv(answer, src=other)
    took = time.perf_counter() - began
    return took, answer.item() - (sent + took / 2)


def everyone(value: Any) -> list[Any]:
    """Each rank's JSON-like value, by rank, on all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def said_by_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def merged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for one in found for name, value in one.items()}


def barrier() -> None:
    """Wait for all ranks, on the host."""
    dist.all_reduce(torch.zeros(1))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
