"""What a rank does for its agent before anything else, and the agent's verb."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatune.config import load_config
from megatune.errors import ParallelError
from megatune.launch import wire
from megatune.launch.agent import Job, run_job
from megatune.launch.network import split_endpoint
from megatune.launch.watch import Limits
from megatune.training.heartbeat import HEARTBEAT_FILE, heartbeat


def is_watched() -> bool:
    """Whether an agent started this process."""
    return HEARTBEAT_FILE in os.environ


def prepare_rank() -> None:
    """Say that this process lives, and write the stacks of all threads to the log when the agent asks (SIGUSR2)."""
    heartbeat()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def run_agent(
    words: Sequence[str],
    *,
    nodes: int,
    node_rank: int,
    nproc: int,
    endpoint: str,
    run_id: str,
    generation: int,
    logs: str,
) -> int:
    """`megatune agent`: run `megatune *words` on this node's ranks; returns the job's exit code. Raises ParallelError
    and ConfigError before anything is started, on all nodes alike."""
    if node_rank >= nodes:
        raise ParallelError(f"--node-rank {node_rank}: {nodes} nodes are numbered 0 to {nodes - 1}")
    if words[0] != "train" or len(words) < 2:
        raise ParallelError(f"an agent runs `train CONFIG [KEY=VALUE]...`, not `{' '.join(words)}`")
    launch = load_config(words[1], words[2:]).launch
    job = Job(
        command=[sys.executable, "-m", "megatune", *words],
        nproc=nproc,
        logs=Path(logs),
        nodes=nodes,
        node=node_rank,
        endpoint=split_endpoint(endpoint),
        run_id=run_id,
        secret=os.environ.get(wire.SECRET, ""),
        generation=generation,
        restarts=launch.restarts,
        limits=Limits(launch.hang_timeout, launch.timeout),
        join_timeout=launch.join_timeout,
    )
    return run_job(job)
