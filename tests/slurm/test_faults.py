"""Ranks of a Slurm job that are killed from outside in every phase, one after the other: it still gives the losses of a
job that nobody disturbed.

MEGATUNE_INJECTIONS: how many deaths (default 8), MEGATUNE_SEED: which. A rank's heartbeat says where it is; another
process reads it and kills the rank there.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatune.training.heartbeat import HEARTBEAT_FILE, PHASES
from tests.slurm.test_training import START, Run, make, parts  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]
INJECTIONS = int(os.environ.get("MEGATUNE_INJECTIONS", "8"))
SEED = int(os.environ.get("MEGATUNE_SEED", "5"))
KILLED_IN = ("fetch", "forward", "backward", "reduce", "optimizer", "save", "evaluate")
SAVE_EVERY, EVAL_EVERY = 5, 4
APART = 10  # steps between two deaths: the next start gets further before it dies, too


def ranks(config: Path) -> dict[int, tuple[int, memoryview]]:
    """(process id, heartbeat) of all ranks of the run that live now, on whatever node of this machine."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if str(config).encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
                continue
            pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            # Each node has a /dev/shm of its own.
            with open(f"/proc/{pid}/root{env[HEARTBEAT_FILE]}", "rb") as file:
                memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")
            found[int(env["RANK"])] = pid, memory
        except (OSError, KeyError):  # no rank, or gone meanwhile
            continue
    return found


def kill(run: Run, job: str, rank: int, step: int, phase: str) -> int:
    """Kill `rank` in `phase`, at `step` or as soon after as it is seen there; returns the step."""
    wanted, deadline = PHASES.index(phase), time.monotonic() + START
    watched: tuple[int, memoryview] | None = None
    while True:
        assert time.monotonic() < deadline, f"rank {rank} was not seen in {phase}\n{run.output(job)}"
        if watched is None or not os.path.exists(f"/proc/{watched[0]}"):
            watched = ranks(run.config).get(rank)
            time.sleep(0.05)
            continue
        for _ in range(5_000):
            word = watched[1][0]
            if word >> 8 >= step and word & 0xFF == wanted:
                os.kill(watched[0], signal.SIGKILL)
                return word >> 8
            time.sleep(0.0001)  # a phase that was missed comes again in the next step


@pytest.fixture
def killed_in() -> Iterator[list[str]]:
    draw = random.Random(SEED)
    phases = [KILLED_IN[number % len(KILLED_IN)] for number in range(INJECTIONS)]
    draw.shuffle(phases)
    yield phases


def test_deaths_in_every_phase(make, killed_in: list[str]) -> None:  # noqa: F811
    steps = APART * (INJECTIONS + 2)
    given = (f"train.steps={steps}", f"checkpoint.every={SAVE_EVERY}", f"train.eval_every={EVAL_EVERY}")
    calm, hurt = make("calm"), make("hurt")
    job = calm.submit(*given).first
    assert calm.ends(job) == "COMPLETED", calm.output(job)
    draw = random.Random(SEED)
    job, step, newest = hurt.submit(*given).first, 2, 0
    for phase in killed_in:
        at = kill(hurt, job, draw.randrange(4), step, phase)
        step = max(step, at) + APART // 2
        saved = [int(path.parent.name[5:]) for path in hurt.folder.glob("checkpoints/step-*/manifest.json")]
        assert max(saved, default=0) >= newest, "a finished save is lost"
        newest = max(saved, default=0)
    assert hurt.ends(job) == "COMPLETED", hurt.output(job)
    assert hurt.comparable() == calm.comparable()
    starts = list(hurt.folder.glob("logs/slurm-*/gen-*"))
    assert len(starts) == INJECTIONS + 1
