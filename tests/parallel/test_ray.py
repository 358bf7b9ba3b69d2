"""`launch.backend: ray`: what is decided without Ray, and, where it is installed, real runs on two cores of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatune import __version__
from megatune.config.loader import dump_config
from megatune.config.schema import Config
from megatune.errors import ParallelError
from megatune.launch import ray as backend
from megatune.launch.ray import Part, Place, parts_of
from tests.helpers.runs import losses, tiny_config

ROOT = Path(__file__).parents[2]
PLACE = Place("1", "10.0.0.1", "a", ("0",), __version__, sys.executable)


def test_bundles_of_a_machine_are_one_agents_ranks() -> None:
    places = [
        PLACE,
        replace(PLACE, node="2", host="b", gpus=("3",)),
        replace(PLACE, gpus=("2",)),
        replace(PLACE, node="2", host="b", gpus=("1",)),
        replace(PLACE, node="2", host="b", gpus=("0",)),
    ]
    assert parts_of(places) == [Part(0, 2, ("0", "2")), Part(1, 3, ("3", "1", "0"))]


def test_machines_with_another_megatune_are_refused() -> None:
    with pytest.raises(ParallelError, match="Ray's worker on b has megatune 0.0.1, this process "):
        parts_of([PLACE, replace(PLACE, node="2", host="b", megatune="0.0.1")])


def test_agents_get_their_gpus_and_only_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("PRIVATE_TOKEN", "x")
    found = backend._environment(Part(0, 2, ("0", "2")), "secret")
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert found["MEGATUNE_SECRET"] == "secret"
    assert "PRIVATE_TOKEN" not in found


def test_ray_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ParallelError, match="launch.backend: ray needs Ray, which is not installed; pip install ray"
    ):
        backend.run("run.yaml", [], Config.model_construct())


class TestRealRuns:
    """A local cluster of two cores; about 8 s of its own start each."""

    @pytest.fixture(autouse=True)
    def _needs_ray(self) -> None:
        pytest.importorskip("ray", reason="needs ray (pip install ray: 80 MB, 240 MB on disk)")

    @pytest.fixture
    def config(self, tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> Config:
        launch = {"backend": "ray", "nproc": 2, "restarts": 0, "ray": {"address": "local"}}
        found = tiny_config(tiny_llama, tiny_data, tmp_path / "run", checkpoint__export=[], launch=launch)
        (tmp_path / "run.yaml").write_text(dump_config(found))
        return found

    def start(self, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "megatune", "train", "run.yaml", *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_two_workers_equal_torchruns(self, config: Config, tmp_path: Path) -> None:
        run = self.start(tmp_path)
        out, err = run.communicate(timeout=250)
        assert run.returncode == 0, out + err
        assert "done: 4 steps" in out
        assert (tmp_path / "run" / "logs" / "gen-0" / "rank-00001.log").exists()
        found = losses(tmp_path / "run")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "megatune", "train", "run.yaml", "checkpoint.folder=torchrun"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=250)
        assert found == losses(tmp_path / "torchrun")

    def test_a_stop_saves_and_another_start_goes_on(self, config: Config, tmp_path: Path) -> None:
        run = self.start(tmp_path, "train.steps=2000")
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 250
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=100)
        assert run.returncode == 75, out + err
        assert list((tmp_path / "run" / "checkpoints").glob("step-*"))

    def test_mistakes_end_with_2_before_a_rank_starts(self, config: Config, tmp_path: Path) -> None:
        run = self.start(tmp_path, "train.global_batch_size=3")
        out, err = run.communicate(timeout=100)
        assert (run.returncode, out) == (2, "")
        assert err.startswith("megatune: train.global_batch_size: 3")
        run = self.start(tmp_path, "launch.ray.strategy=STRICT_SPREAD", "launch.join_timeout=2")
        assert (
            "Ray did not find room for 2 ranks of {'CPU': 1} (STRICT_SPREAD) in 2 s"
            in run.communicate(timeout=100)[1]
        )
        assert run.returncode == 2
        assert not (tmp_path / "run" / "logs").exists()

    def test_a_killed_rank_is_reported_once(self, config: Config, tmp_path: Path) -> None:
        run = self.start(tmp_path, "train.steps=2000")
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 250
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(rank_pid(1, tmp_path), signal.SIGKILL)
        err = run.communicate(timeout=100)[1]
        assert run.returncode == 128 + signal.SIGKILL
        assert err.count("rank 1 of 2") == 1
        assert "was killed by SIGKILL" in err


def rank_pid(rank: int, folder: Path) -> int:
    """The process of a rank of the run in `folder`."""
    wanted = f"RANK={rank}".encode()
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdecimal() and os.readlink(entry / "cwd") == str(folder)
            if is_ours and wanted in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue  # it has ended, or is not ours
    raise AssertionError(f"no process is rank {rank}")
