"""setup.py builds what the machine allows, and says what it left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def built(tmp_path: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in tmp_path.glob("lib/**/*.so"))


def test_nothing_is_built_on_request(tmp_path: Path) -> None:
    done = build(tmp_path, MEGATUNE_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == []
    assert "warning: megatune" not in done.stderr


def test_without_a_compiler_there_is_one_warning(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/does/not/exist")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == []
    assert done.stderr.count("warning: megatune") == 1
    assert "no C++ compiler found" in done.stderr


def test_a_compiler_that_fails_leaves_out_the_part(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of coffee >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, MEGATUNE_BUILD="pack", CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == []
    *_, last = done.stderr.splitlines()
    assert last.startswith(
        "warning: megatune: left out: megatune._pack could not be built: out of coffee (more in "
    )
    assert "out of coffee" in (tmp_path / "temp/megatune._pack/failed.log").read_text()


def test_an_unknown_request_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, MEGATUNE_BUILD="fpga")
    assert done.returncode != 0
    assert "MEGATUNE_BUILD is 'fpga', must be auto, none, pack, cpu or cuda" in done.stderr


@pytest.mark.slow
def test_the_packing_helper_builds_alone(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    done = build(tmp_path, MEGATUNE_BUILD="pack")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == ["_pack"]
