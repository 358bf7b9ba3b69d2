"""Ranks of a Slurm job that are killed from outside in every phase, one after the other: it still gives the losses of a
job that nobody disturbed.

MEGATUNE_INJECTIONS: how many deaths (default 8), MEGATUNE_SEED: which. A rank's heartbeat says where it is; another
process reads it and kills the rank there. All deaths are in one job, whose agents fork the ranks (warm_agent.py):
imports would take nearly all of a restart's time. 50 deaths take 8 minutes on two busy cores.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatune.training.heartbeat import PHASES
from tests.helpers.runs import losses
from tests.slurm.test_training import START, WARM, Run, make, parts  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]
INJECTIONS = int(os.environ.get("MEGATUNE_INJECTIONS", "8"))
SEED = int(os.environ.get("MEGATUNE_SEED", "5"))
KILLED_IN = ("fetch", "forward", "backward", "reduce", "optimizer", "save", "evaluate")
SAVE_EVERY, EVAL_EVERY = 5, 4
APART = 8  # steps between two deaths: the next start gets further before it dies, too


def ranks(config: Path) -> dict[int, tuple[int, memoryview]]:
    """(process id, heartbeat) of all ranks of the run that live now, on whatever node of this machine."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if str(config).encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
                continue
            # A rank writes to the heartbeat that it has mapped, its agent only reads.
            mapped = re.search(
                r" rw-s .* (/\S*/rank-(\d+)\.beat)$", Path(f"/proc/{pid}/maps").read_text(), re.M
            )
            if mapped is None:
                continue
            # Each node has a /dev/shm of its own.
            with open(f"/proc/{pid}/root{mapped[1]}", "rb") as file:
                memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")
            found[int(mapped[2])] = pid, memory
        except OSError:  # gone meanwhile
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


def resumed(run: Run, job: str) -> list[int]:
    """From which step each start went on."""
    logs = [run.folder / f"logs/slurm-{job}/gen-{number}/rank-00000.log" for number in range(INJECTIONS + 1)]
    found = [re.search(r"resuming from \S+ \(step (\d+)\)", log.read_text(errors="replace")) for log in logs]
    return [int(one[1]) if one else 0 for one in found]


@pytest.fixture
def killed_in() -> Iterator[list[str]]:
    draw = random.Random(SEED)
    phases = [KILLED_IN[number % len(KILLED_IN)] for number in range(INJECTIONS)]
    draw.shuffle(phases)
    yield phases


def test_deaths_in_every_phase(make, killed_in: list[str]) -> None:  # noqa: F811
    steps = APART * (INJECTIONS + 2)
    given = (f"train.steps={steps}", f"checkpoint.every={SAVE_EVERY}", f"train.eval_every={EVAL_EVERY}")
    calm, hurt = make("calm", time=300, **WARM), make("hurt", time=300, **WARM)
    undisturbed = calm.submit(*given).first  # beside the other
    draw = random.Random(SEED)
    job, step, began, saves = hurt.submit(*given).first, 2, time.monotonic(), [0]
    for number, phase in enumerate(killed_in, 1):
        rank = draw.randrange(4)
        at = kill(hurt, job, rank, step, phase)
        print(
            f"{number:3} {time.monotonic() - began:6.1f} s: rank {rank} killed in step {at}, {phase}",
            flush=True,
        )
        step = max(step, at) + APART // 2
        found = [int(path.parent.name[5:]) for path in hurt.folder.glob("checkpoints/step-*/manifest.json")]
        saves.append(max(found, default=0))
    assert hurt.ends(job, 4 * START) == "COMPLETED", hurt.output(job)
    assert calm.ends(undisturbed, 4 * START) == "COMPLETED", calm.output(undisturbed)
    assert hurt.comparable() == calm.comparable()
    assert len(losses(hurt.folder)) == steps
    went_on = resumed(hurt, job)
    assert len(went_on) == INJECTIONS + 1
    assert all(step >= save for step, save in zip(went_on, saves, strict=True)), "a finished save is lost"
    assert hurt.cluster.restarts(job) == 0
