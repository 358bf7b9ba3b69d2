"""`megatune slurm ...` against commands that only remember what they were told; and what the job's script starts."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from megatune.cli import commands
from megatune.config import load_config
from megatune.launch.slurm import client, logs
from megatune.launch.slurm.script import render
from megatune.launch.slurm.status import _duration
from megatune.launch.slurm.submission import Submission, submissions


class FakeSlurm:
    """`states`: job -> Slurm's word; `calls`: every command line; `refuses`: what sbatch says instead of an id."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.calls: list[tuple[str, ...]] = []
        self.accounted = ""
        self.refuses = ""

    def __call__(self, *argv: str, environ: Any = None) -> subprocess.CompletedProcess[str]:
        self.calls.append(argv)
        out, code, error = "", 0, ""
        if argv[0] == "sbatch" and self.refuses:
            code, error = 1, self.refuses
        elif argv[0] == "sbatch":
            job = str(100 + len(self.states))
            self.states[job] = "PENDING"
            out = f"{job};cluster\n"
        elif argv[0] == "squeue":
            out = "".join(
                f"{job}|{state}|2|Priority|n[1-2]|1:00|9:00|0|\n" for job, state in self.states.items()
            )
        elif argv[0] == "sacct":
            out = self.accounted
        return subprocess.CompletedProcess(argv, code, out, error)

    def told(self, name: str) -> list[tuple[str, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(client, "call", fake)
    # No Slurm need be installed.
    monkeypatch.setattr(client.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    return fake


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(**slurm: Any) -> Path:
        settings = {"model": {"path": "m"}, "data": {"train": ["t"]}, "checkpoint": {"folder": "run"}}
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({**settings, "train": {"steps": 40}, "slurm": slurm}))
        return path

    return write


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(commands, ["slurm", *words])
    assert done.exit_code == code, f"{done.output}{done.exception}"
    return done.output


def test_what_is_rendered_is_what_is_submitted(slurm: FakeSlurm, config, tmp_path: Path) -> None:
    path = str(config(chain=3, nodes=2))
    rendered = CliRunner().invoke(commands, ["slurm", "render", path, "train.seed=3"]).stdout_bytes
    said = call("submit", path, "train.seed=3", "--after", "afterok:7")
    assert "jobs 100, 101, 102" in said
    script = tmp_path / "run/slurm/100/job.sbatch"
    assert script.read_bytes() == rendered
    first, second, third = slurm.told("sbatch")
    assert first[:2] == ("--parsable", "--dependency=afterok:7") and len(first) == 3
    assert second == ("--parsable", "--dependency=afterany:100", str(script), "2", "100")
    assert third == ("--parsable", "--dependency=afterany:101", str(script), "3", "100")
    (submission,) = submissions(tmp_path / "run")
    assert submission.jobs == ["100", "101", "102"]
    assert "would write into one folder" in call("submit", path, code=2).replace("\n", " ")


def test_what_sbatch_refuses_is_said_in_its_words(slurm: FakeSlurm, config, tmp_path: Path) -> None:
    slurm.refuses = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    )
    said = call("submit", str(config()), code=2)
    assert "megatune: sbatch refused the job: sbatch: error: invalid partition specified: x" in said
    assert not list((tmp_path / "run/slurm").iterdir())
    assert "was submitted yet" in call("status", str(config()), code=2)


def test_stop_and_requeue(slurm: FakeSlurm, config, tmp_path: Path) -> None:
    path = str(config(chain=2))
    call("submit", path)
    submission = Submission(tmp_path / "run", "100")
    assert "waits in the queue already" in call("requeue", path, code=2)
    slurm.states["100"] = "RUNNING"
    assert "asked to save" in call("requeue", path)
    assert submission.marked("requeue")
    assert slurm.told("scancel") == [("--batch", "--signal=USR1", "100")]
    slurm.calls.clear()
    assert call("stop", path) == "job 101: cancelled\njob 100: asked to save and stop\n"
    assert slurm.told("scancel") == [("101",), ("--batch", "--signal=USR1", "100")]
    assert submission.marked("stop")
    slurm.calls.clear()
    slurm.states["101"] = "CANCELLED"
    assert call("stop", path, "--now") == "job 100: cancelled\n"
    assert slurm.told("scancel") == [("100",)]
    slurm.states["100"] = "CANCELLED"
    assert call("stop", path) == "no job of this run waits or runs\n"
    assert call("requeue", path) == "job 101: requeued\n"
    assert slurm.told("scontrol") == [("requeue", "101")]
    assert not submission.marked("stop")
    submission.mark("done")
    assert "the run is done" in call("requeue", path, code=2)
    submission.unmark("done")
    slurm.states.clear()
    assert "Slurm has forgotten the job" in call("requeue", path, code=2)


def test_states_come_from_the_accounting_where_the_controller_has_forgotten(slurm: FakeSlurm) -> None:
    slurm.states = {"5": "RUNNING"}
    slurm.accounted = "6|CANCELLED by 1000|n1|00:01:00|0:15\n77|COMPLETED|n1|1|0:0\n"
    found = client.states(["5", "6", "7"])
    assert found["5"].state == "RUNNING" and found["5"].restarts == 2 and found["5"].nodes == "n[1-2]"
    assert found["6"].state == "CANCELLED" and not found["6"].is_alive
    assert found["7"].state == "UNKNOWN" and not found["7"].is_alive


def test_a_jobs_own_variables_are_not_passed_on() -> None:
    environ = {"PATH": "p", "SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "5", "SLURM_CONF": "c", "SBATCH_PARTITION": "x",
               "SBATCH_ACCOUNT": "a", "SBATCH_EXCLUSIVE": "1", "SLURMD_NODENAME": "n"}  # fmt: skip
    assert client.submission_environment({"partition"}, environ) == {
        "PATH": "p", "SLURM_CONF": "c", "SBATCH_ACCOUNT": "a"
    }  # fmt: skip


def test_status(slurm: FakeSlurm, config, tmp_path: Path) -> None:
    path = str(config())
    call("submit", path)
    run = tmp_path / "run"
    said = call("status", path)
    assert (
        said
        == "job 100: PENDING, n[1-2], 1:00 used, 9:00 left, restarted 2 times, waits for: Priority\nstep 0 of 40\n"
    )
    rows = [{"step": n, "loss": 3.0 - n / 10, "step_seconds": 2.0} for n in range(1, 11)] + [
        {"step": 10, "eval_loss": 2.5}
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "lo')
    for step in (999_998, 1_000_000):
        (run / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step-{step:06d}/manifest.json").write_text("{}")
    Submission(run, "100").mark("failed")
    lines = call("status", path).splitlines()
    assert lines[1] == "step 10 of 40, loss 2.0000, held-out loss 2.5000, 1 min 0 s left at the present pace"
    assert lines[2].startswith("newest checkpoint: step-1000000, ")
    assert lines[3] == "given up: megatune slurm logs says why"
    found = json.loads(call("status", path, "--json"))
    assert found["step"] == 10 and found["jobs"][0]["state"] == "PENDING" and found["finished"] is False
    assert [_duration(seconds) for seconds in (3, 75, 7300, 200_000)] == [
        "3 s",
        "1 min 15 s",
        "2 h 1 min",
        "2 d 7 h",
    ]


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    """Two jobs; the first was started twice."""
    found = Submission(tmp_path, "8")
    (found.state / "jobs").mkdir(parents=True)
    for job, number in (("8", 1), ("12", 2)):
        (found.state / "jobs" / job).write_text(f"{number}\n")
    for job, generation, text in (
        ("8", 0, "a0\na1\n"),
        ("8", 10, "c0\n"),
        ("8", 2, "b0\nb1"),
        ("12", 0, "d0\nd1\n"),
    ):
        folder = tmp_path / f"logs/slurm-{job}/gen-{generation}"
        folder.mkdir(parents=True)
        (folder / "rank-00000.log").write_text(text)
    return found


def shown(
    submission: Submission, lines: int = 50, names: Any = (("rank-00000.log", "rank 0"),), **options: Any
) -> str:
    out = io.BytesIO()
    settings = {"follow": False, "is_over": lambda: True, **options}
    logs.show(submission, names, lines=lines, out=out, **settings)
    return out.getvalue().decode()


def test_logs_are_those_of_the_newest_start(submission: Submission, tmp_path: Path) -> None:
    assert [path.read_text() for path in logs.files(submission, "rank-00000.log")] == [
        "a0\na1\n", "b0\nb1", "c0\n", "d0\nd1\n"
    ]  # fmt: skip
    assert shown(submission) == "d0\nd1\n"
    assert shown(submission, lines=1) == "d1\n"
    assert shown(submission, lines=0) == ""
    log = tmp_path / "logs/slurm-12/gen-0/rank-00000.log"
    log.write_bytes(b"\x1b[31mred\x1b[0m \x07\x1b]0;title\x07 10%\r20%\nnot ended")
    assert shown(submission) == "red ]0;title 10%\n20%\nnot ended\n"
    log.write_text("".join(f"{number}\n" for number in range(1000)))
    assert shown(submission, lines=3) == "997\n998\n999\n"
    with pytest.raises(Exception, match="no log of rank 7"):
        shown(submission, names=[("rank-00007.log", "rank 7")])


def test_logs_follow_over_starts_and_jobs(submission: Submission, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(logs, "_PAUSE", 0.0)
    last = tmp_path / "logs/slurm-12/gen-0/rank-00000.log"
    later = tmp_path / "logs/slurm-12/gen-1/rank-00000.log"
    happens = iter([
        lambda: last.write_text("d0\nd1\nd2 is ha"),
        lambda: last.write_text("d0\nd1\nd2 is half"),
        lambda: (later.parent.mkdir(), later.write_text("e0\n")),
        lambda: later.write_text("e0\ne1"),
    ])  # fmt: skip

    def is_over() -> bool:
        step = next(happens, None)
        if step is not None:
            step()
        return step is None

    assert shown(submission, 1, follow=True, is_over=is_over) == "d1\nd2 is half\ne0\ne1\n"


FAKES = {
    "scontrol": """
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show node") echo "NodeName=$4 Arch=x NodeAddr=$ADDRESS NodeHostName=$4 Version=1" ;;
esac""",
    "getent": '[[ $2 == known ]] && printf "127.0.1.1 STREAM known\\n10.0.0.7 STREAM known\\n"',
    "squeue": "echo RUNNING",
    "srun": """
printf '%s\\0' "$@" >"$OUT/srun"
env -0 >"$OUT/environment"
while [[ $1 != bash ]]; do shift; done
for node in n2 n1; do SLURMD_NODENAME=$node "$@" || exit; done""",
    "apptainer": 'printf "%s\\0" "$@" >"$OUT/apptainer-$SLURMD_NODENAME"',
    "an interpreter": 'printf "%s\\0" "$@" >"$OUT/python-$SLURMD_NODENAME"',
}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a rendered script here, with stand-ins for Slurm's commands; gives what each was told."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, text in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(address: str = "10.1.2.3", **slurm: Any) -> dict[str, list[str]]:
        settings = {"model": {"path": "m"}, "data": {"train": ["t"]}, "checkpoint": {"folder": "run"}}
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({**settings, "slurm": {"env": {"A": "x y,z"}, **slurm}}))
        environ = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": f"{tmp_path}/out", "ADDRESS": address,
            "SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_CPUS_PER_NODE": "16(x2),4", "SLURM_GPUS_ON_NODE": "8", "SLURMD_NODENAME": "n1",
        }  # fmt: skip
        script = render(load_config(path), path).script
        done = subprocess.run(
            ["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 and "megatune: done" in done.stdout, done.stdout + done.stderr
        found = {}
        for name in (tmp_path / "out").iterdir():
            found[name.name] = name.read_bytes().decode().split("\0")[:-1]
        return found

    return run


def test_what_srun_is_told(start, tmp_path: Path) -> None:
    told = start(python=f"{tmp_path}/bin/an interpreter", srun_options=["--network=a b"])
    srun = told["srun"]
    assert srun[: srun.index("bash")] == [
        "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--mpi=none", "--export=ALL",
        "--kill-on-bad-exit=0", "--wait=300", "--network=a b",
    ]  # fmt: skip
    for rank in (0, 1):
        assert told[f"python-n{rank + 1}"] == [
            "-m", "megatune", "agent", "--nodes", "2", "--node-rank", str(rank), "--nproc", "8",
            "--endpoint", f"10.1.2.3:{20000 + (31 * 7 + 2) % 12000}", "--run-id", "slurm-31", "--generation", "2",
            "--logs", f"{tmp_path}/run/logs/slurm-31", "--", "train", f"{tmp_path}/c.yaml",
        ]  # fmt: skip
    assert "A=x y,z" in told["environment"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.1.2.3", "10.1.2.3"), ("fd00::7", "[fd00::7]"), ("known", "10.0.0.7")],
)
def test_where_the_agents_meet(start, tmp_path: Path, address: str, expected: str) -> None:
    told = start(address=address, python=f"{tmp_path}/bin/an interpreter")["python-n1"]
    assert told[told.index("--endpoint") + 1].rpartition(":")[0] == expected


def test_a_pyxis_container(start, tmp_path: Path) -> None:
    container = {
        "runtime": "pyxis",
        "image": "docker://a b#c:1",
        "mounts": ["/d"],
        "options": ["--container-writable"],
    }
    srun = start(container=container, python=f"{tmp_path}/bin/an interpreter")["srun"]
    words = [word for word in srun[: srun.index("bash")] if word.startswith("--container")]
    assert words == [
        "--container-image=docker://a b#c:1",
        f"--container-workdir={tmp_path}",
        "--container-env=PYTHONUNBUFFERED,MEGATUNE_SECRET,SLURM_JOB_ID,SLURMD_NODENAME,A",
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/d:/d",
        "--container-writable",
    ]


def test_an_apptainer_container(start, tmp_path: Path) -> None:
    container = {
        "runtime": "apptainer",
        "image": "/i m.sif",
        "mounts": ["/d:/e:ro"],
        "options": ["--cleanenv"],
    }
    told = start(container=container)
    for node in ("n1", "n2"):
        words = told[f"apptainer-{node}"]
        assert words[: words.index("-m")] == [
            "exec", "--pwd", str(tmp_path), "--nv", "--bind", f"{tmp_path}:{tmp_path}",
            "--bind", f"{tmp_path}/run:{tmp_path}/run", "--bind", "/d:/e:ro", "--cleanenv", "/i m.sif", "python",
        ]  # fmt: skip
    environment = told["environment"]
    for name in ("APPTAINERENV_A", "SINGULARITYENV_A", "A"):
        assert f"{name}=x y,z" in environment
    (secret,) = [word for word in environment if word.startswith("MEGATUNE_SECRET=")]
    assert f"APPTAINERENV_{secret}" in environment


def test_doctor_says_no_go_without_slurm(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin/nowhere:/bin")
    monkeypatch.setattr("shutil.which", lambda *_a, **_k: None)
    said = call("doctor", str(config()), code=1)
    assert "sbatch is not on this machine's PATH" in said
    assert said.splitlines()[-1] == "no go: controller"
    assert call("doctor", str(config(partition="a\nb")), code=1).splitlines()[-1] == "no go: script"
