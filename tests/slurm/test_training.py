"""Training under a real Slurm, 2 nodes x 2 ranks over gloo: whatever ends a job, the losses are those of a run that
nothing interrupted.

The model has SmolLM2's shape (tied embeddings, 9 query heads on 3 of keys and values), made tiny.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatune.config.loader import dump_config, load_config
from megatune.launch.slurm import Submission, submit
from tests.helpers.runs import losses, metrics, tiny_config
from tests.helpers.tiny import make_data, make_llama
from tests.slurm.cluster import Cluster, until
from tests.slurm.warm_agent import PACE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 60
START = 240.0  # seconds that a start may take where other tests run beside it
# For `make`: ranks are forked from agents that have imported everything (warm_agent.py).
WARM = {
    "python": str(Path(__file__).with_name("warm_python.sh")),
    "env": {"OMP_NUM_THREADS": 1, "WARM_PYTHON": sys.executable},
}


@dataclass
class Run:
    cluster: Cluster
    config: Path
    folder: Path

    def submit(self, *overrides: str) -> Submission:
        return submit(load_config(self.config, overrides), self.config, overrides)

    def output(self, job: str) -> str:
        logs = sorted((self.folder / "logs").rglob("node-*.log"))
        parts = [self.folder / "slurm" / f"{job}.out", *logs]
        return "\n".join(
            f"== {part}\n{part.read_text(errors='replace')[-4000:]}" for part in parts if part.exists()
        )

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def reaches(self, step: int, job: str) -> None:
        until(lambda: self.steps() >= step, START, lambda: f"step {step} not reached\n{self.output(job)}")

    def ends(self, job: str, seconds: float = START) -> str:
        return self.cluster.wait(job, seconds=seconds)

    def comparable(self) -> list[tuple[Any, ...]]:
        return [
            (row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss"))
            for row in metrics(self.folder)
        ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("parts")
    model = make_llama(base / "model", hidden=72, heads=9, kv_heads=3, mlp=192, layers=2, tied=True)
    return model, make_data(base / "data")


@pytest.fixture
def make(cluster: Cluster, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.chdir(tmp_path)

    def one(name: str = "run", **slurm: Any) -> Run:
        model, data = parts
        config = tiny_config(
            model, data, tmp_path / name,
            train__steps=STEPS, train__eval_every=25, checkpoint__every=10, train__global_batch_size=8,
            data__seq_length=64,
            launch={"nproc": 2},
            slurm={"nodes": 2, "time": 30, "env": {"OMP_NUM_THREADS": 1}, **slurm},
        )  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config))
        return Run(cluster, path, tmp_path / name)

    return one


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """What the first test fills in for the others."""
    return {}


@pytest.fixture
def oracle(uninterrupted: dict[str, Any], make) -> list[tuple[Any, ...]]:
    """(step, loss, grad_norm, eval_loss) of a run on both nodes that nothing interrupts."""
    if not uninterrupted:
        run = make("oracle")
        job = run.submit().first
        assert run.ends(job) == "COMPLETED", run.output(job)
        assert run.cluster.restarts(job) == 0
        uninterrupted.update(rows=run.comparable(), losses=losses(run.folder))
    return uninterrupted["rows"]


@pytest.mark.slow
def test_two_nodes_train_as_one_does(oracle, uninterrupted, make) -> None:
    alone = make("alone")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatune", "train", str(alone.config), "--nproc", "2"],
        env=environ, capture_output=True, text=True, timeout=START, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(alone.folder) == pytest.approx(uninterrupted["losses"], rel=1e-5)
    assert len(uninterrupted["losses"]) == STEPS
    assert uninterrupted["losses"][-1] < 0.8 * uninterrupted["losses"][0]


@pytest.mark.slow
def test_a_notice_and_a_preemption_cost_no_step(oracle, make) -> None:
    run = make()
    job = run.submit().first
    run.reaches(5, job)
    run.cluster.call("scancel", "--signal=USR1", "--batch", job)
    run.cluster.wait(job, "PENDING", seconds=120)
    saved = run.steps()
    assert (run.folder / "checkpoints" / f"step-{saved:06d}" / "manifest.json").exists(), run.output(job)
    run.reaches(saved + 5, job)  # the metrics go on: nothing was done twice
    urgent = run.cluster.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    ).strip()
    assert run.cluster.wait(urgent, seconds=START) == "COMPLETED"
    assert run.ends(job) == "COMPLETED", run.output(job)
    assert run.cluster.restarts(job) == 2, run.output(job)
    assert run.comparable() == oracle


@pytest.mark.slow
def test_a_signal_to_the_agents_alone(oracle, make) -> None:
    """`scancel --signal=USR1` without --batch reaches the tasks of the step only."""
    run = make()
    job = run.submit().first
    run.reaches(8, job)
    run.cluster.call("scancel", "--signal=USR1", job)
    assert run.ends(job) == "COMPLETED", run.output(job)
    assert run.cluster.restarts(job) == 1, run.output(job)
    assert run.comparable() == oracle


@pytest.mark.slow
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_job_waits_for_a_lost_node_and_goes_on(oracle, make, node: str) -> None:
    """node1 runs the job's script, node2 only an agent."""
    run = make()
    job = run.submit().first
    run.reaches(15, job)
    run.cluster.kill_node(node)
    run.cluster.wait(job, "PENDING", seconds=120)
    run.cluster.start_node(node)
    assert run.ends(job) == "COMPLETED", run.output(job)
    assert run.cluster.restarts(job) >= 1
    assert run.comparable() == oracle


@pytest.mark.slow
def test_a_job_goes_on_with_the_node_that_is_left(oracle, uninterrupted, make) -> None:
    run = make(min_nodes=1)
    job = run.submit().first
    run.reaches(15, job)
    run.cluster.kill_node("node2")
    assert run.ends(job) == "COMPLETED", run.output(job)
    said = (run.folder / "slurm" / f"{job}.out").read_text()
    assert said.count("2 nodes x 2 processes") == said.count("1 nodes x 2 processes") == 1, said
    assert losses(run.folder) == pytest.approx(uninterrupted["losses"], rel=1e-5)


@pytest.mark.slow
def test_a_chain_of_three_jobs_equals_one(oracle, make) -> None:
    run = make(chain=3)
    submission = run.submit()
    jobs = submission.jobs
    for job in jobs[:2]:
        run.reaches(run.steps() + 8, job)
        run.cluster.call("scancel", "--signal=USR1", "--batch", job)
        assert run.ends(job) == "COMPLETED", run.output(job)
    assert run.ends(jobs[2]) == "COMPLETED", run.output(jobs[2])
    assert [run.cluster.restarts(job) for job in jobs] == [0, 0, 0]
    assert run.comparable() == oracle


@pytest.mark.slow
def test_a_chain_of_three_that_the_time_limit_moves_on_equals_one_long_job(make, tmp_path: Path) -> None:
    """Three minutes each: Slurm's own notice before the limit ends the first two, which nobody else signals. A step of
    theirs takes two seconds at least, so that they cannot be done by then, however fast the machine is."""
    steps, pace = 200, tmp_path / "pace"
    pace.write_text("2")
    environment = {**WARM["env"], PACE: str(pace)}
    run, whole = (
        make("chain", chain=3, time=3, grace=20, **{**WARM, "env": environment}),
        make("whole", **WARM),
    )
    jobs = run.submit(f"train.steps={steps}").jobs
    alone = whole.submit(f"train.steps={steps}").first  # beside the chain
    run.cluster.call("scontrol", "update", f"JobId={jobs[2]}", "TimeLimit=30")  # it ends by itself
    done = [0]
    for job in jobs[:2]:
        assert run.ends(job, 2 * START) == "COMPLETED", run.output(job)
        assert " TimeLimit=00:03:00 " in run.cluster.call("scontrol", "show", "job", "-o", job)
        done.append(len(losses(run.folder)))
        assert done[-2] < done[-1] < steps, run.output(job)
    pace.unlink()
    assert run.ends(jobs[2], 2 * START) == "COMPLETED", run.output(jobs[2])
    for job, step in zip(jobs[1:], done[1:], strict=True):  # all that was finished was saved
        assert f"(step {step})" in (run.folder / f"logs/slurm-{job}/gen-0/rank-00000.log").read_text()
    assert [run.cluster.restarts(job) for job in jobs] == [0, 0, 0]
    assert [len(list(run.folder.glob(f"logs/slurm-{job}/gen-*"))) for job in jobs] == [1, 1, 1]
    assert whole.ends(alone, 2 * START) == "COMPLETED", whole.output(alone)
    assert run.comparable() == whole.comparable()
    assert len(losses(run.folder)) == steps


@pytest.mark.slow
def test_the_script_for_people_does_the_same(oracle, make) -> None:
    run = make()
    root = Path(__file__).parents[2]
    job = run.cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--export=ALL,PYTHON={sys.executable}",
        f"--output={run.folder}-%j.out",
        str(root / "launch/slurm.sbatch"), str(run.config),
    ).strip()  # fmt: skip
    run.reaches(5, job)
    run.cluster.call("scancel", "--signal=USR1", "--batch", job)
    said = Path(f"{run.folder}-{job}.out")
    assert run.ends(job) == "COMPLETED", said.read_text() + run.output(job)
    assert run.cluster.restarts(job) == 1, said.read_text()
    assert run.comparable() == oracle
