"""Seconds from a rank's death to the next step that was never done before, with real processes.

MEGATUNE_RESULTS: a folder; recovery.json there holds the measured seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatune.config.loader import dump_config
from tests.helpers.runs import metrics, tiny_config
from tests.helpers.tiny import make_data, make_llama

LIMIT = 45.0
COMMANDS = {
    "megatune": ["-m", "megatune", "train"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"),
        *("-m", "megatune", "train"),
    ],
}


def recover(folder: Path, launcher: str, victim: int, device: str) -> dict[str, float | str | int]:
    """Train on 2 processes, kill rank `victim` in the middle, and wait until the run is further than before."""
    model = make_llama(folder / "model", hidden=512, layers=4, heads=8, kv_heads=4, mlp=1024)
    config = tiny_config(
        model,
        make_data(folder / "data", train=256),
        folder / "run",
        train__steps=100_000,
        train__global_batch_size=8,
        data__seq_length=256,
        parallel={"zero": 1},
        launch={"nproc": 2, "cpu_nproc": 2},
    )
    config.checkpoint.every = 20
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *COMMANDS[launcher], str(path)], env=env, stdout=output, stderr=output
        )
    try:
        began = time.monotonic()
        _wait(folder, process, 50, 300)
        first = time.monotonic() - began
        ranks = _ranks(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
        before = _last(folder)
        _wait(folder, process, before + 1, 300)
        seconds = time.monotonic() - killed
        assert ranks[1 - victim] not in _ranks(process.pid)
        return {
            "launcher": launcher,
            "killed_rank": victim,
            "start_seconds": first,
            "recovery_seconds": seconds,
            "step_when_killed": before,
        }
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last(folder: Path) -> int:
    return max((row["step"] for row in metrics(folder / "run")), default=0)


def _wait(folder: Path, process: subprocess.Popen, step: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (folder / "run" / "metrics.jsonl").exists() or _last_whole(folder) < step:
        assert process.poll() is None, (folder / "output.txt").read_text()[-4000:]
        assert time.monotonic() < deadline, (folder / "output.txt").read_text()[-4000:]
        time.sleep(0.05)


def _last_whole(folder: Path) -> int:
    try:
        return _last(folder)
    except ValueError:  # a line that is being written
        return 0


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        text = Path(f"/proc/{pid}/environ").read_bytes().decode()
        env = dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
        if "RANK" in env:
            found[int(env["RANK"])] = int(pid)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.gpu
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", COMMANDS)
def test_recovery_on_gpus(tmp_path: Path, launcher: str, victim: int) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    found = recover(tmp_path, launcher, victim, "cuda") | {"device": torch.cuda.get_device_name(0)}
    print(json.dumps(found))
    results = os.environ.get("MEGATUNE_RESULTS")
    if results:
        path = Path(results, "recovery.json")
        known = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*known, found], indent=1))
    assert found["recovery_seconds"] <= LIMIT
