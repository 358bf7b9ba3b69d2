"""The CUDA part of the build, without a GPU: every kernel compiles, spills nothing, and is in csrc/sass.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatune.ops import _load
from tools import check_sass, cuda_once, sanitize

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))
LOG = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
    {frame} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem
"""


def kernels(registers: int = 40, spilled: int = 0) -> tuple[dict, list[str]]:
    return check_sass.parse(LOG.format(frame=spilled, spilled=spilled, registers=registers))


def test_the_gate_sees_spills_and_warnings() -> None:
    assert kernels() == ({"_Z1fv": {"sm_90a": {"registers": 40, "shared": 128}}}, [])
    assert "_Z1fv on sm_90a spills registers" in kernels(spilled=16)[1][0]
    warning = (
        LOG + "ptxas info : (C7509) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    )
    assert "C7509" in check_sass.parse(warning.format(frame=0, spilled=0, registers=9))[1][0]


def test_the_gate_compares_with_the_table() -> None:
    now, table = ({"a.cu": kernels(registers)[0]} for registers in (40, 40))
    assert check_sass.compare(now, table) == []
    assert check_sass.compare(now, {}) == ["a.cu _Z1fv sm_90a is not in sass.json"]
    assert check_sass.compare({}, table) == ["a.cu _Z1fv sm_90a is in sass.json and not compiled"]
    assert "takes 60 registers, the table says 40" in check_sass.compare({"a.cu": kernels(60)[0]}, table)[0]
    now["a.cu"]["_Z1fv"]["sm_90a"]["hgmma"], table["a.cu"]["_Z1fv"]["sm_90a"]["hgmma"] = 0, 12
    assert check_sass.compare(now, table) == ["a.cu _Z1fv sm_90a has no HGMMA any more, the table says 12"]


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_every_kernel_is_as_in_the_table() -> None:
    """Compiles only what `make venv` has not compiled already."""
    found, wrong = check_sass.measure(check_sass.compile_all(ROOT / "build" / "objects"))
    assert found
    assert wrong + check_sass.compare(found, json.loads(check_sass.TABLE.read_text())) == []


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    """With compilers that only say what they were called for."""
    project = tmp_path / "project"
    for name in (
        "csrc/include/megatune/cuda.h",
        "csrc/cuda/a.cu",
        "csrc/cuda/deep/b.cu",
        "csrc/bind/cuda.cpp",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    shutil.copy(ROOT / "setup.py", project)
    (project / "megatune/ops").mkdir(parents=True)
    shutil.copy(ROOT / "megatune/ops/_load.py", project / "megatune/ops")
    fake = project / "bin/nvcc"
    fake.parent.mkdir()
    fake.write_text(FAKE_COMPILER.format(python=sys.executable, log=tmp_path / "calls"))
    fake.chmod(0o755)
    environment = os.environ | {"CUDA_HOME": str(project), "CXX": str(fake), "MEGATUNE_CUDA_CHECK": "1"}

    def compiled() -> list[str]:
        (tmp_path / "calls").write_text("")
        command = [sys.executable, "setup.py", "build_ext"]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return sorted((tmp_path / "calls").read_text().split())

    assert compiled() == ["csrc/bind/cuda.cpp", "csrc/cuda/a.cu", "csrc/cuda/deep/b.cu", "link"]
    assert not list(project.rglob("megatune/ops/*.so"))
    (project / "csrc/cuda/a.cu").write_text("// another kernel")
    assert compiled() == ["csrc/cuda/a.cu", "link"]
    (project / "csrc/include/megatune/cuda.h").write_text("// another argument")
    assert compiled() == ["csrc/bind/cuda.cpp", "csrc/cuda/a.cu", "csrc/cuda/deep/b.cu", "link"]


FAKE_COMPILER = """#!{python}
import sys
arguments = sys.argv[1:]
output = arguments[arguments.index("-o") + 1]
source = arguments[arguments.index("-c") + 1] if "-c" in arguments else "link"
open("{log}", "a").write(source + "\\n")
open(output, "w").write("object")
if source != "link":
    made_of = "object: " + source + " \\\\\\n csrc/include/megatune/cuda.h\\n"
    open(arguments[arguments.index("-MF") + 1], "w").write(made_of)
"""


def test_a_wrong_list_of_architectures_is_refused(tmp_path: Path) -> None:
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "Hopper", "MEGATUNE_BUILD": "cuda"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'Hopper', must be of numbers such as 8.0" in done.stderr


def test_the_cuda_library_fits_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded into whatever torch is here, a build without CUDA too: its kernels are those of defined operators."""
    library = ROOT / "megatune/ops/_cuda.so"
    if not library.exists():
        pytest.skip("megatune/ops/_cuda.so is not built")
    script = f"""
import torch
from megatune import ops
torch.ops.load_library({str(library)!r})
gates = "glu", "glu_backward", "clamped_glu", "clamped_glu_backward"
norms = "rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward"
tokens = "rope_qk", "rope_qk_backward", "embedding_backward", "router", "router_backward", "expert_take"
for name in (*norms, *tokens, "expert_sum", "expert_sum_backward", "rope", *gates):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("megatune::" + name, "CUDA"), name
assert isinstance(torch.ops.megatune.cuda_error(), int)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert _load._misfit(library, f"megatune-cuda-abi={_load.CUDA_ABI};") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _load.cuda_problem.__wrapped__() == "there is no CUDA device"


def test_the_sanitizer_calls_every_operator_as_it_is_defined() -> None:
    """With CPU tensors in place of the GPU's: arguments fit, views stay views, what is changed is compared."""
    called = set()
    for name, arguments, dtype in cuda_once.examples():
        called.add(name)
        if dtype != torch.float16:  # which the CPU's own kernels do not take
            assert cuda_once.difference(name, arguments, "cpu") == 0.0, name
    assert {"rms_norm", "add_rms_norm_backward", "rope", "glu_backward", "adamw_", "square_sum"} <= called
    view = torch.randn(4, 6)[:, 1:4]
    moved = cuda_once.to([view], "cpu")[0]
    assert (
        moved.stride() == view.stride() and torch.equal(moved, view) and moved.data_ptr() != view.data_ptr()
    )


def test_the_sanitizer_keeps_what_was_said(tmp_path: Path) -> None:
    """With a program that says what it was called for in place of compute-sanitizer."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "called: $*"\nexit ${CODE:-0}\n')
    program.chmod(0o755)
    command = [sys.executable, "tools/sanitize.py", "--tools", "racecheck", "--out", str(tmp_path / "logs")]
    for code in (0, sanitize.FOUND):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == (1 if code else 0), done.stderr
        assert ("ERRORS FOUND" in done.stdout) == bool(code)
        log = (tmp_path / "logs/racecheck.log").read_text()
        assert "called: --tool racecheck" in log and "kernel_substring=megatune" in log
        assert f"torch {version('torch')}" in log


def test_env_says_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatune.launch.show_environment import show_environment

    monkeypatch.setenv("COLUMNS", "300")
    show_environment()
    shown = capsys.readouterr().out
    for name in ("megatune", "python", "torch", "CPU", "_pack", "_cpu.so", "_cuda.so", "op rms_norm"):
        assert name in shown
    if not torch.cuda.is_available():
        assert "not used: there is no CUDA device" in shown
        assert "reference: the first choice" in shown  # square_sum has no CPU body
