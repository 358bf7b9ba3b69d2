"""Which nodes a job leaves: the functions of the job's script under bash, beside commands that stand for Slurm's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatune.launch.slurm.quoting import bash_word
from megatune.launch.slurm.script import CODE

Start = dict[str, int | None]  # node -> what its agent ended with; None: it had no word
LOST: Start = {"a1": 76, "b2": None}
FINE: Start = {"a1": 75, "b2": 75}
JOB = "7"


@pytest.fixture
def job(tmp_path: Path):
    """Run the script's `command` in a job that had those starts before; (what it said, Slurm's commands)."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    (tmp_path / "slurm" / JOB).mkdir(parents=True)
    answers = {
        "scontrol": 'case "$1 $2" in "show hostnames") printf "a1\\nb2\\n";; "show node") ;; '
        '"show job") echo " ExcNodeList=x ";; *) echo "scontrol $*" >>"$CALLS";; esac',
        "squeue": "echo RUNNING",
        "sinfo": 'printf "%s\\n" $NODES',
        "srun": 'echo srun >>"$CALLS"; for rank in 0 1; do echo 0 >"$ENDS/$rank"; done',
        "scancel": ":",
    }
    for name, text in answers.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)

    def run(
        command: str, starts: list[Start], after: int = 2, nodes: str = "a1 b2 c3"
    ) -> tuple[str, list[str]]:
        calls.write_text("")
        for number, start in enumerate(starts):
            ends = tmp_path / f"logs/slurm-{JOB}/ends-{number}"
            ends.mkdir(parents=True, exist_ok=True)
            (ends / ".nodes").write_text("".join(f"{name}\n" for name in start))
            for rank, code in enumerate(start.values()):
                if code is not None:
                    (ends / str(rank)).write_text(f"{code}\n")
        code = CODE.read_text().removesuffix("main\n") + command
        values = f"folder={bash_word(str(tmp_path), 'x')} exclude_after={after} fewest_nodes=2 requeue=true chain=1 "
        values += "retries=3 workdir=/ setup='' processes=1 container='' environment=() srun_options=() overrides=()\n"
        done = subprocess.run(
            ["bash", "-c", values + code],
            env={
                "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "NODES": nodes,
                "ENDS": str(tmp_path / f"logs/slurm-{JOB}/ends-{len(starts)}"), "SLURM_JOB_ID": JOB,
                "SLURM_RESTART_COUNT": str(len(starts)), "SLURM_JOB_PARTITION": "p", "SLURM_JOB_NODELIST": "[a1,b2]",
            },
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert not done.stderr or "not enough" in done.stderr, done.stderr
        return done.stdout + done.stderr, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("starts", "lost"),
    [
        ([LOST, LOST], "b2\n"),
        ([FINE, LOST, LOST], "b2\n"),
        ([{"a1": None, "b2": 76}] * 2, "a1\n"),  # the node of the first agent
        ([{"a1": 76, "b2": 137}] * 2, "b2\n"),  # its agent was killed
        ([LOST, LOST, {"a1": 1}], "b2\n"),  # it took no part in the last start
        ([LOST], ""),
        ([LOST, FINE], ""),
        ([LOST, FINE, LOST], ""),
        ([LOST, {"a1": None, "b2": 76}], ""),  # not the same
        ([{"a1": None, "b2": None}] * 2, ""),  # Slurm ended all: nobody says who was lost
        ([{"a1": 137, "b2": 137}] * 2, ""),  # a rank was killed, and the agents say so
    ],
)
def test_nodes_lost_in_a_row(job, starts: list[Start], lost: str) -> None:
    assert job("lost_nodes", starts) == (lost, [])


def test_a_job_is_kept_away_from_them(job) -> None:
    said, calls = job("requeue_job", [LOST, LOST])
    assert calls == [f"scontrol requeue {JOB}", f"scontrol update JobId={JOB} ExcNodeList=x,b2"]
    assert said.splitlines()[-1] == (
        "megatune: b2: lost 2 times in a row, the job stays away from now on (slurm.exclude_after)"
    )
    assert job("requeue_job", [LOST, LOST])[1] == [f"scontrol requeue {JOB}"]  # it has tried that


@pytest.mark.parametrize(("after", "nodes"), [(0, "a1 b2 c3"), (3, "a1 b2 c3"), (2, "a1 b2")])
def test_or_not(job, after: int, nodes: str) -> None:
    """Never; not yet; where too few are left."""
    said, calls = job("requeue_job", [LOST, LOST], after=after, nodes=nodes)
    assert calls == [f"scontrol requeue {JOB}"]
    assert ("not enough other nodes" in said) == (after == 2)


def test_slurm_may_have_given_the_same_nodes_again(job) -> None:
    """A dead node is noticed by Slurm, which requeues without asking the script."""
    _, calls = job("main", [LOST, LOST])
    assert calls == [f"scontrol requeue {JOB}", f"scontrol update JobId={JOB} ExcNodeList=x,b2"]
    said, calls = job("main", [LOST, LOST])  # it was tried, in vain
    assert calls == ["srun"] and said.endswith("megatune: done\n")
