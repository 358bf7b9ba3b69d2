"""`megatune doctor`: what would spoil a long job, found in a minute. On all ranks of torchrun, srun or mpirun, on those
that it starts here, or alone.

Facts are measured by `doctor_probe` (one machine) and `doctor_net` (between machines); `doctor_checks` judges them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from megatune.config.schema import Config
from megatune.errors import MegatuneError
from megatune.launch import doctor_net as net
from megatune.launch import doctor_probe as probe
from megatune.launch.codes import USER_ERROR
from megatune.launch.doctor_checks import NO_GO, NOTE, OK, WARNING, Facts, Finding, count, is_go, judge

_COLOURS = {OK: "green", NOTE: "cyan", WARNING: "yellow", NO_GO: "bold red"}


def doctor(config: Config | None, *, as_json: bool = False, timeout: float = 120.0) -> int:
    """Examine the machines of this process group and print what was found, on rank 0. `timeout`: seconds to wait for
    all ranks, and for one all-reduce.

    Returns 2 on rank 0 where a long job should not be started, else 0 (a launcher ends the others when one of them
    returns anything else, and rank 0 may not have said all). Raises ParallelError where ranks do not come together.
    """
    # A collective that hangs then raises here, and does not end the process behind our back.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.device_count() > local else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, _ = net.meet(device, timeout)
    try:
        facts = examine(config, device, note=_note if rank == 0 else _silent)
        net.barrier()
    finally:
        dist.destroy_process_group()
    if rank:
        return 0
    findings = judge(facts)
    _print_json(facts, findings) if as_json else _print(facts, findings)
    return 0 if is_go(findings) else USER_ERROR


def examine(
    config: Config | None,
    device: torch.device,
    *,
    host: str = "",
    note: Callable[[str], None] = lambda text: None,
    **replaced: Any,
) -> Facts:
    """Measure everything; complete on rank 0. Every rank of the process group calls it. `host`: this machine's name;
    `replaced`: `all_reduce`, `clock` and `free` instead of the real ones."""
    rank = dist.get_rank()
    hosts = net.everyone(host or socket.gethostname())
    host, counts = hosts[rank], Counter(hosts)
    is_first = hosts.index(host) == rank  # of its node
    note(f"{len(hosts)} ranks on {len(counts)} nodes: versions, GPUs, limits")
    nodes = net.everyone(probe.look_at_node(host, counts[host], config) if is_first else None)
    facts = Facts(nodes=[node for node in nodes if node is not None])
    note("clocks")
    facts.clocks = net.clock_offsets(hosts, **_only(replaced, "clock"))
    if device.type == "cuda":
        note("matrix products")
        name = f"{host}, GPU {device.index}"
        facts.rates = net.merged(net.everyone({name: probe.compute_rate(device)}))
    note("all-reduce")
    pairs = net.measure_pairs(hosts, device, note=note, **_only(replaced, "all_reduce"))
    # A pair is known by both of its nodes.
    facts.pairs = list({(pair.a, pair.b): pair for some in net.everyone(pairs) for pair in some}.values())
    if config is not None:
        note(f"storage: {config.checkpoint.folder}")
        _storage(facts, config, host, is_first, **_only(replaced, "free"))
        if rank == 0:
            _needs(facts, config, device)
    return facts


def _only(replaced: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: replaced[name]} if name in replaced else {}


def _storage(
    facts: Facts, config: Config, host: str, is_first: bool, free: Callable[[], int] | None = None
) -> None:
    rank = dist.get_rank()
    folder = probe.RunFolder(config.checkpoint.folder, net.said_by_rank_0(secrets.token_hex(4)))
    problem = net.said_by_rank_0(folder.open() if rank == 0 else None)
    found = None
    if is_first:
        found = probe.Storage(host, problem) if problem else folder.measure(host)
    facts.storage = [one for one in net.everyone(found) if one is not None]
    facts.folder = str(folder.folder)
    if rank == 0:
        folder.close()
        facts.free = (free or folder.free)()


def _needs(facts: Facts, config: Config, device: torch.device) -> None:
    # One task a node is how Slurm starts agents; the run will use all GPUs.
    processes = sum(max(node.ranks, len(node.gpus) if node.ranks == 1 else 0) for node in facts.nodes)
    try:
        facts.needs = probe.needs_of(config, processes, device)
    except MegatuneError as error:
        facts.mistakes.append(str(error))


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"  {text} ...", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """Rank 0 says it."""


def _print_json(facts: Facts, findings: Sequence[Finding]) -> None:
    found = [{"level": one.level, "check": one.check, "text": one.text} for one in findings]
    print(
        json.dumps({"go": is_go(findings), "findings": found, "facts": facts.as_dict()}, indent=1), flush=True
    )


def _print(facts: Facts, findings: Sequence[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for one in findings:
        text = Text.assemble((f"{one.level:8}", _COLOURS[one.level]), f" {one.check:9} {one.text}")
        console.print(text)
    reasons = [one for one in findings if one.level == NO_GO]
    ranks = count(sum(node.ranks for node in facts.nodes), "rank")
    where = f"{ranks} on {count(len(facts.nodes), 'node')}"
    if not reasons:
        console.print(f"[bold green]go[/] ({where})")
        return
    console.print(f"[bold red]no go[/] ({where}); to be mended:")
    for one in reasons:
        console.print(f"  {one.check}: {one.text}", markup=False)
