"""A run that is killed or stopped goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatune.config.loader import dump_config
from megatune.training import STOPPED_EXIT_CODE
from tests.helpers.dist import run_ranks
from tests.helpers.runs import LORA, losses, metrics, tiny_config
from tests.helpers.warm import Warm

STEPS = 12


def start(config, path: Path, *, cold: bool = False) -> subprocess.Popen | Warm:
    """`megatune train` of the configuration; `cold`: and its ranks, as processes of their own from the first import."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(config))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not cold:
        return Warm(["train", str(path)], path.with_suffix(".out"), env)
    return subprocess.Popen(
        [sys.executable, "-m", "megatune", "train", str(path)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen | Warm, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = (
            (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        )
        if len(lines) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached in {seconds} s")


@pytest.fixture(scope="module", params=["full", "lora"])
def uninterrupted(request, tiny_llama, tiny_data, tmp_path_factory):
    import megatune

    method = {"type": "full"} if request.param == "full" else LORA
    base = tmp_path_factory.mktemp("uninterrupted")

    def make(folder):
        return tiny_config(
            tiny_llama,
            tiny_data,
            folder,
            method=method,
            train__steps=STEPS,
            train__eval_every=5,
            train__global_batch_size=4,
            checkpoint={"folder": str(folder), "every": 3},
        )

    megatune.train(make(base / "run"))
    return make, base / "run"


def comparable(folder):
    return [
        (row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss")) for row in metrics(folder)
    ]


@pytest.mark.parametrize("kill_at", [2, 5, 10])
def test_killed_run_resumes_bitwise(uninterrupted, kill_at, tmp_path):
    make, whole = uninterrupted
    config = make(tmp_path / "run")
    process = start(config, tmp_path / "run.yaml")
    wait_for_step(tmp_path / "run", kill_at, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = start(config, tmp_path / "run.yaml")
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert comparable(tmp_path / "run") == comparable(whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_at_the_steps_edge(uninterrupted, signum, tmp_path):
    make, whole = uninterrupted
    config = make(tmp_path / "run")
    config.checkpoint.every = 0
    process = start(config, tmp_path / "run.yaml")
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    done = len(losses(tmp_path / "run"))
    if done < STEPS:  # a very fast machine may have finished
        assert process.returncode == STOPPED_EXIT_CODE, output
        assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    again = start(config, tmp_path / "run.yaml")
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert comparable(tmp_path / "run") == comparable(whole)


def _until(rank, world_size, config, step):
    """The run, asked to stop (as by a signal) when it has done `step` steps."""
    import megatune
    from megatune.training.step import Trainer

    plain = Trainer.step

    def stopping(self, batches, target_tokens, *, stop=False, **more):
        return plain(self, batches, target_tokens, stop=stop or self.optim.steps + 1 >= step, **more)

    Trainer.step = stopping
    return megatune.train(config).step


def test_resume_on_other_numbers_of_processes(uninterrupted, tmp_path):
    make, whole = uninterrupted
    config = make(tmp_path / "run")
    for step, processes in ((2, 1), (5, 2), (9, 4), (STEPS, 2)):
        assert run_ranks(_until, processes, config, step) == [step] * processes
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    make, whole = uninterrupted
    before = (whole / "metrics.jsonl").read_bytes()
    process = start(make(whole), whole.parent / "run.yaml", cold=True)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "is done" in output
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_last_checkpoint(tiny_llama, tiny_data, tmp_path):
    import megatune

    def run(steps):
        config = tiny_config(
            tiny_llama, tiny_data, tmp_path, train__steps=steps, optim__schedule="constant", optim__warmup=0
        )
        return megatune.train(config)

    assert run(2).step == 2
    assert run(4).step == 4
    assert len(losses(tmp_path)) == 4


def test_another_runs_folder_is_refused(tiny_llama, tiny_data, tmp_path):
    import megatune

    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path))
    with pytest.raises(megatune.ConfigError, match=r"another run.*optim\.lr: 0\.001 there, 0\.5 here"):
        megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, optim__lr=0.5))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["lr"] == 0.001


def test_two_ranks_stop_on_a_signal_and_resume_after_a_kill(uninterrupted, tmp_path):
    """SIGTERM to the launcher, then kill -9 of one rank: the run ends each time and goes on to the same losses."""
    make, whole = uninterrupted
    config = make(tmp_path / "run")
    config.launch.nproc = 2
    process = start(config, tmp_path / "run.yaml")
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode in (0, STOPPED_EXIT_CODE), output
    assert any((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
    process = start(config, tmp_path / "run.yaml")
    workers = _children(process)
    if workers:  # a very fast machine may be done
        os.kill(workers[-1], signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode in (0, 128 + signal.SIGKILL), output
    output = start(config, tmp_path / "run.yaml", cold=True).communicate(timeout=120)[0]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6), output


def _children(process: Warm) -> list[int]:
    """The worker processes of a launcher, once there are two."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        found = [int(pid) for pid in path.read_text().split()]
        if len(found) == 2:
            return found
        time.sleep(0.01)
    return []


def test_a_start_that_failed_leaves_the_folder_free(tiny_llama, tiny_data, tmp_path):
    import megatune

    wrong = tiny_config(tmp_path / "nowhere", tiny_data, tmp_path / "run", train__steps=1)
    with pytest.raises(megatune.MegatuneError, match="nowhere"):
        megatune.train(wrong)
    assert megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path / "run", train__steps=1)).step == 1


def test_fewer_steps_than_are_done_is_refused(tiny_llama, tiny_data, tmp_path):
    import megatune

    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, train__steps=3))
    with pytest.raises(megatune.CheckpointError, match=r"step 3, train\.steps is 2"):
        megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, train__steps=2))


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(tiny_llama, tiny_data, tmp_path):
    import megatune

    def run(steps, **checkpoint):
        settings = {"folder": str(tmp_path / "run"), "every": 2, **checkpoint}
        changes = {"train__steps": steps, "optim__schedule": "constant", "optim__warmup": 0}
        return megatune.train(
            tiny_config(tiny_llama, tiny_data, tmp_path / "run", checkpoint=settings, **changes)
        )

    run(4)
    expected = losses(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000004" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    run(5, keep_last=1)
    left = sorted(path.name.split(".")[0] for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["damaged-step-000004", "step-000005"]
    assert losses(tmp_path / "run")[:4] == expected
