"""What sbatch itself makes of our `#SBATCH` lines, and what `doctor` says before it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from megatune.cli import commands
from megatune.errors import ConfigError
from megatune.launch.slurm.script import render
from tests.slurm.cluster import Cluster
from tests.unit.test_slurm_render import config, values

pytestmark = pytest.mark.slurm


def test_sbatch_reads_values_byte_for_byte(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checked = 0
    for value in values(150, seed=9):
        try:
            script = render(config(options={"comment": value, "hold": True}), "c.yaml").script
        except (ConfigError, ValueError):
            continue  # a line end, or no text: the unit tests say which are refused
        (tmp_path / "job").write_bytes(script)
        job = cluster.call("sbatch", "--parsable", str(tmp_path / "job")).strip()
        shown = cluster.call("scontrol", "show", "job", "-o", job)
        assert f" Comment={value} " in shown or not value, repr(value)
        cluster.call("scancel", job)
        checked += 1
    assert checked > 60
    assert not (tmp_path / "pwned").exists()


def doctor(folder: Path, **slurm: object) -> tuple[int, list[str]]:
    settings = {
        "model": {"path": "m"},
        "data": {"train": ["t"]},
        "checkpoint": {"folder": str(folder / "run")},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**settings, "slurm": slurm}))
    done = CliRunner().invoke(commands, ["slurm", "doctor", str(path)])
    return done.exit_code, done.output.splitlines()


def test_doctor(cluster: Cluster, tmp_path: Path) -> None:
    code, lines = doctor(tmp_path, nodes=2, time=30)
    assert (code, lines[-1]) == (0, "go"), lines
    assert any(line.startswith("ok    sbatch --test-only: Job") for line in lines), lines
    code, lines = doctor(tmp_path, nodes=2, partition="nowhere", setup="missing.sh", time=2)
    assert code == 1
    assert lines[-1] == "no go: sbatch --test-only, grace, slurm.setup", lines
    assert any(
        "invalid partition specified: nowhere" in line or "Invalid partition" in line for line in lines
    ), lines
    assert not cluster.call("squeue", "-h").strip()
