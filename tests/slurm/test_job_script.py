"""The job's script under a real Slurm, with an agent that trains nothing: every way in which a job goes on or ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from megatune.cli import commands
from megatune.launch.slurm.submission import newest
from tests.slurm.cluster import Cluster, until

pytestmark = pytest.mark.slurm
STUB = Path(__file__).with_name("stub_agent.sh")
# What no layer on the way (YAML, bash, sbatch, srun, the task's shell) may change.
ODD = "a 'b' \"c\" $(touch pwned) `touch pwned` \\ \n\t%j * ~ ; & | < > # größe 日本 \x7f -x --y=1 "


@dataclass
class Run:
    """A run of the stub: `submit` and the other verbs as a person calls them."""

    cluster: Cluster
    base: Path
    config: Path
    folder: Path
    stubs: Path

    def call(self, *words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(commands, ["slurm", words[0], str(self.config), *words[1:]])
        assert done.exit_code == code, f"{done.output}{done.exception}"
        return done

    def submit(self, *words: str) -> str:
        """Id of the first job."""
        self.call("submit", *words)
        return newest(self.folder).first

    def output(self, job: str) -> str:
        return (self.folder / "slurm" / f"{job}.out").read_text(errors="replace")

    def waits(self, job: str, start: int = 0) -> None:
        """Wait until both agents of that start are up."""
        marks = [self.stubs / f"{job}-{start}-{node}.waits" for node in (0, 1)]
        until(lambda: all(mark.exists() for mark in marks), 60, lambda: self.output(job))

    def words(self, job: str, start: int, node: int, kind: str) -> list[str]:
        data = (self.stubs / f"{job}-{start}-{node}.{kind}").read_bytes()
        return data.decode("utf-8", "surrogateescape").split("\0")[:-1]

    def arguments(self, job: str, start: int, node: int) -> dict[str, str]:
        words = self.words(job, start, node, "args")
        options = words[3 : words.index("--")]
        return dict(zip(options[::2], options[1::2], strict=True))

    @property
    def starts(self) -> int:
        return len(list(self.stubs.glob("*-0.args")))


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a run: its plan (see stub_agent.sh) and changes to the section `slurm`."""
    monkeypatch.chdir(tmp_path)

    def make(plan: str, name: str = "run", **slurm: Any) -> Run:
        folder, stubs = tmp_path / name, tmp_path / "stubs"
        stubs.mkdir()
        environment = {"STUB_FOLDER": str(stubs), "STUB_PLAN": plan, "STUB_RUN": str(folder)}
        settings = {
            "model": {"path": "m"},
            "data": {"train": ["t.jsonl"]},
            "checkpoint": {"folder": str(folder)},
            "launch": {"cpu_nproc": 2},
            "slurm": {"nodes": 2, "time": 10, "python": str(STUB), **slurm},
        }
        settings["slurm"]["env"] = {**environment, **slurm.get("env", {})}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings, allow_unicode=True))
        return Run(cluster, tmp_path, config, folder, stubs)

    return make


def test_a_job_that_ends_well_and_what_its_agents_are_told(run) -> None:
    one = run(
        "done", name=" odd 100% 'run' $(touch pwned)", env={"ODD": ODD}, options={"comment": 'x "y" \\ # z'}
    )
    rendered = one.call("render", f"data.system={json.dumps(ODD)}").stdout_bytes
    job = one.submit(f"data.system={json.dumps(ODD)}")
    assert one.cluster.wait(job) == "COMPLETED", one.output(job)
    assert (one.folder / "slurm" / job / "job.sbatch").read_bytes() == rendered
    one.cluster.call("scontrol", "write", "batch_script", job, str(one.base / "stored"))
    # scontrol adds the NUL that ends the text in Slurm's memory.
    assert (one.base / "stored").read_bytes().rstrip(b"\0\n") == rendered.rstrip(b"\n")
    for node in (0, 1):
        words = one.words(job, 0, node, "args")
        assert words[:3] == ["-m", "megatune", "agent"]
        assert words[words.index("--") + 1 :] == ["train", str(one.config), f"data.system={json.dumps(ODD)}"]
        told = one.arguments(job, 0, node)
        assert told.pop("--node-rank") == str(node)
        assert told == {
            "--nodes": "2",
            "--nproc": "2",
            "--endpoint": told["--endpoint"],
            "--run-id": f"slurm-{job}",
            "--generation": "0",
            "--logs": str(one.folder / "logs" / f"slurm-{job}"),
        }
        address, _, port = told["--endpoint"].rpartition(":")
        assert address.startswith("10.77.") and address.endswith(".11")  # node1's, though no DNS knows it
        assert 20000 <= int(port) < 32000
        environment = dict(word.partition("=")[::2] for word in one.words(job, 0, node, "env"))
        assert environment["ODD"] == ODD
        assert environment["SLURMD_NODENAME"] == f"node{node + 1}"
        assert len(environment["MEGATUNE_SECRET"]) == 64
        assert environment["MEGATUNE_SECRET"] not in one.output(job) + rendered.decode()
    assert 'Comment=x "y" \\ # z' in one.cluster.call("scontrol", "show", "job", job)
    assert not list(one.base.rglob("pwned"))
    assert "done" in one.call("status").output
    assert one.call("logs", "--rank", "1").output == "a line of rank 1\n"
    assert one.call("logs", "--node", "0", "--node", "1").output == (
        "[node 0] node 0 of start 0\n[node 1] node 1 of start 0\n"
    )


def test_a_signal_saves_and_requeues_until_done(run) -> None:
    one = run("wait code1 wait done")
    job = one.submit()
    one.waits(job)
    assert "already" not in one.call("status").output
    refused = one.call("submit", code=2)
    assert "jobs that wait or run" in refused.output
    one.cluster.call("scancel", "--signal=USR1", "--batch", job)  # as the time limit's notice comes
    until(
        lambda: one.starts == 3, 60, lambda: one.output(job)
    )  # the second start failed, and was tried again
    one.waits(job, 2)
    one.cluster.call("scancel", "--signal=USR1", "--full", job)  # to the script and to the agents: twice
    assert one.cluster.wait(job) == "COMPLETED", one.output(job)
    assert one.starts == 4 and one.cluster.restarts(job) == 3
    ports = {one.arguments(job, start, 1)["--endpoint"] for start in range(4)}
    assert len(ports) == 4
    assert [one.arguments(job, start, 0)["--generation"] for start in range(4)] == ["0", "1", "2", "3"]
    assert one.output(job).count("requeued") == 3  # appended to, over all starts
    assert one.call("logs", "--node", "1").output.endswith("node 1 of start 3\n")
    found = json.loads(one.call("status", "--json").output)
    assert found["jobs"][0]["restarts"] == 3 and found["marks"] == ["done"]


def test_stopping_saves_and_does_not_requeue(run) -> None:
    one = run("wait wait done", chain=2)
    job = one.submit()
    one.waits(job)
    following = newest(one.folder).jobs[1]
    lines = one.call("stop").output.splitlines()
    assert lines == [f"job {following}: cancelled", f"job {job}: asked to save and stop"]
    assert one.cluster.wait(job) == "FAILED"  # it is not complete: exit code 75
    assert one.cluster.state(following) == "CANCELLED"
    assert one.starts == 1
    assert list(one.folder.glob("checkpoints/*/manifest.json"))
    assert "stopped as asked" in one.call("status").output
    again = one.call("requeue").output  # and on from there
    assert again == f"job {following}: requeued\n" or again == f"job {job}: requeued\n"
    one.call("stop", "--now")


def test_a_cancelled_job_is_not_requeued_by_its_script(run) -> None:
    one = run("wait", chain=2)
    job = one.submit()
    one.waits(job)
    one.cluster.call("scancel", job)
    assert one.cluster.wait(job) == "CANCELLED"
    following = newest(one.folder).jobs[1]
    assert one.cluster.wait(following) == "FAILED", one.output(following)
    assert "stopped as asked" in one.output(following)
    assert one.cluster.state(job) == "CANCELLED" and one.starts == 1


def test_a_chain_hands_over_and_ends_early(run) -> None:
    one = run("wait sleep", chain=3)
    first = one.submit()
    one.waits(first)
    one.cluster.call("scancel", "--signal=USR1", "--batch", first)
    assert one.cluster.wait(first) == "COMPLETED", one.output(first)
    _, second, third = newest(one.folder).jobs
    assert one.cluster.wait(second) == "COMPLETED", one.output(second)
    assert one.cluster.wait(third) == "CANCELLED"
    assert one.starts == 2
    assert "job 2 of 3 goes on" in one.output(first)


@pytest.mark.slow
def test_the_time_limit_itself_moves_a_chain_on(run) -> None:
    """A minute each: Slurm's own notice comes, 15 to 75 seconds before the limit."""
    one = run("wait wait sleep", chain=3, time=1)
    one.submit()
    jobs = newest(one.folder).jobs
    for job in jobs:
        assert one.cluster.wait(job, seconds=120) == "COMPLETED", one.output(job)
        assert one.cluster.restarts(job) == 0
    assert one.starts == 3
    assert "job 3 of 3 goes on" in one.output(jobs[1])


@pytest.mark.slow
def test_a_node_that_is_lost_again_and_again_is_left(run) -> None:
    one = run("lose", min_nodes=1)
    job = one.submit()
    assert one.cluster.wait(job, seconds=120) == "COMPLETED", one.output(job)
    assert one.starts == 3 and one.cluster.restarts(job) == 2, one.output(job)
    said = "node2: lost 2 times in a row, the job stays away from now on (slurm.exclude_after)"
    assert one.output(job).count(said) == one.output(job).count("1 nodes x") == 1, one.output(job)
    assert " ExcNodeList=node2 " in one.cluster.call("scontrol", "show", "job", "-o", job)


@pytest.mark.slow
def test_a_node_is_kept_where_the_job_cannot_do_without(run) -> None:
    one = run("lose lose done")
    job = one.submit()
    assert one.cluster.wait(job, seconds=120) == "COMPLETED", one.output(job)
    assert one.starts == 3 and "the partition has not enough other nodes" in one.output(job)


@pytest.mark.slow
def test_a_preempted_job_of_a_chain_comes_back_itself(run) -> None:
    one = run("wait sleep", chain=2)
    job = one.submit()
    one.waits(job)
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    urgent = one.cluster.call("sbatch", "--parsable", *words).strip()
    assert one.cluster.wait(urgent) == "COMPLETED"
    assert one.cluster.wait(job) == "COMPLETED", one.output(job)
    assert one.cluster.restarts(job) == 1 and one.starts == 2
    assert one.cluster.wait(newest(one.folder).jobs[1]) == "CANCELLED"


@pytest.mark.parametrize(
    ("plan", "starts", "code"),
    [("code2", 1, 2), ("code77", 1, 77), pytest.param("code1", 3, 1, marks=pytest.mark.slow)],
)
def test_what_would_not_help_is_not_tried_again(run, plan: str, starts: int, code: int) -> None:
    one = run(plan, retries=2, chain=2)
    job = one.submit()
    assert one.cluster.wait(job) == "FAILED"
    assert one.starts == starts, one.output(job)
    assert f"ExitCode={code}:0" in one.cluster.call("scontrol", "show", "job", job)
    assert one.cluster.wait(newest(one.folder).jobs[1]) == "CANCELLED"
    assert "given up" in one.call("status").output
