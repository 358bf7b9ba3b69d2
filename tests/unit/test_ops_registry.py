"""Choice of bodies, operators under FakeTensor and torch.compile, loading of the compiled kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from megatune import ops
from megatune.errors import ConfigError
from megatune.ops import Segments, _load, registry
from tests.helpers.ops import need_body

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _same_numbers_and_automatic_bodies():
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")


def test_configure_sets_one_op_and_leaves_the_others_automatic() -> None:
    automatic = ops.configure({}, "cpu", torch.float32)
    changed = ops.configure({"glu": "reference"}, "cpu", torch.float32)
    assert changed == automatic | {"glu": "reference"}
    assert ops.configure({}, torch.device("cpu"), torch.float32) == automatic
    assert set(automatic) == set(ops.BODIES)


def test_what_has_no_kernel_for_its_dtype_runs_on_the_reference() -> None:
    assert set(ops.chosen("cpu", torch.float64).values()) == {"reference", "sdpa"}
    assert ops.OPS["glu"].pick("cpu", torch.float16).name == "reference"


def test_a_body_that_cannot_run_is_an_error_naming_the_choices() -> None:
    for backend, message in (
        ({"atention": "sdpa"}, "there is no op 'atention', choose from .*attention, "),
        ({"glu": "fpga"}, "'fpga' cannot be used on cpu: there is no such body; choose from"),
        (
            {"attention": "varlen"},
            "'varlen' cannot be used on cpu: it runs on cuda, not on cpu; choose from .*sdpa",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ops.configure(backend, "cpu")
    with pytest.raises(
        ConfigError, match="'cpu' cannot be used on cpu: it takes float32 and bfloat16, not float64"
    ):
        ops.configure({"glu": "cpu"}, "cpu", torch.float64)


def test_table_names_the_choice_the_others_and_why_not() -> None:
    lines = {op: (body, others) for op, body, others in ops.table("cpu", torch.float64)}
    assert lines["attention"][0] == "sdpa"
    assert "cpu (it takes bfloat16, not float64)" in lines["attention"][1]
    assert "varlen" not in lines["attention"][1]


def test_the_reason_of_a_choice_is_said() -> None:
    assert ops.why("attention", "cpu", torch.float64) == "the next after cpu (it takes bfloat16, not float64)"
    ops.configure({"glu": "reference"}, "cpu")
    assert ops.why("glu", "cpu") == "asked for by ops.backend"
    assert ops.why("lion", "cpu") == "the first choice"


def operator_calls():
    """Calls of every operator, of the compiled kernels where they are built."""
    _load.cpu_problem()
    x, weight, angle = torch.randn(6, 3, 8), torch.randn(8), torch.randn(6, 4)
    calls = torch.ops.megatune
    y, rstd = calls.rms_norm(x, weight, 1e-5, 0.0)
    yield calls.rms_norm, (x, weight, 1e-5, 0.0)
    yield calls.rms_norm, (torch.randn(6, 3, 5, 8)[:, :, 1:3].bfloat16(), weight, 1e-5, 1.0)
    yield calls.rms_norm_backward, (y, x, weight, rstd, 0.0, True)
    yield calls.rms_norm_backward, (y, x, weight, rstd, 1.0, False)
    yield calls.rope, (x.unsqueeze(1), x[:, :1], angle, angle, False)
    heads, parts = torch.randn(6, 3, 5, 8).bfloat16(), (angle[:, :3].contiguous(), angle[:, 1:].contiguous())
    yield calls.rope, (heads[:, :, 1:3], heads[:, :, 4], *parts, True)
    yield calls.glu, (torch.randn(6, 14), 0)
    yield calls.glu, (torch.randn(0, 14), 1)
    yield calls.glu_backward, (torch.randn(6, 7), torch.randn(6, 14), 2)
    yield calls.cross_entropy_rows, (torch.randn(4, 11), torch.randint(11, (4,)), 0.0, True)
    yield calls.cross_entropy_rows, (torch.randn(4, 11).bfloat16(), torch.randint(11, (4,)), 3.0, False)
    few, joined = torch.tensor([3, 12, -100, 20]), torch.rand(4, 2)
    yield calls.cross_entropy_rows, (torch.randn(4, 30), few, 0.0, True, torch.rand(4), 0.1, 0.2)
    yield calls.cross_entropy_sums, (torch.randn(4, 11), few, 8, 30, 3.0, True)
    yield calls.cross_entropy_join, (torch.rand(3, 4, 4), few, 30, torch.rand(4), 0.1, 0.2)
    yield calls.cross_entropy_grad, (torch.randn(4, 11), few, 8, 30, 3.0, joined, torch.rand(4), 0.1, 0.2)
    # The compiled attention takes bf16 only; without it (or its tiles) the operator is the reference.
    dtype = torch.bfloat16 if _load.cpu_problem() is None else torch.float32
    if dtype == torch.bfloat16 and not torch.ops.megatune.cpu_has_amx():
        return
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k = torch.randn(9, 4, 32).to(dtype), torch.randn(9, 2, 32).to(dtype)
    out, lse = calls.attention(q, k, k, borders, 0.1, 0, 0.0)
    yield calls.attention, (q, k, k, borders, 0.1, 3, 2.0)
    yield calls.attention_backward, (out, q, k, k, out, lse, borders, 0.1, 0, 0.0)


def test_opcheck() -> None:
    checked = [opcheck(operator.default, arguments) for operator, arguments in operator_calls()]
    assert len(checked) >= 11
    assert all(set(result.values()) == {"SUCCESS"} for result in checked)


def layer(x, norm, weight, a, b, segments, cos, sin):
    """A small decoder layer: every op once."""
    layout = ops.LoraLayout.of((("q", 16), ("k", 16), ("v", 16)), 2, ["q", "v"])
    qkv = ops.lora_linear(ops.rms_norm(x, norm, 1e-5), weight, None, a, b, layout, 2.0)
    q, k, v = qkv.unflatten(1, (2, 3, 16)).split(1, 2)
    q, k = ops.rope(q, k.squeeze(2), cos, sin)
    out = ops.attention(q.squeeze(2), k, v.squeeze(2), segments, scale=0.25)
    return x[:, :16] + ops.glu(out.flatten(1), "silu")


def layer_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (9, 32), (32,), (96, 32), (8, 32), (64, 4)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_compiles_into_one_graph_with_equal_gradients(dtype: torch.dtype) -> None:
    angle = torch.randn(9, 8)
    rest = (Segments.from_lengths([4, 5]), angle.cos(), angle.sin())
    inputs = layer_inputs(dtype)
    expected = layer(*inputs, *rest)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs, *rest)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    for one, two in zip(
        torch.autograd.grad(compiled, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_and_the_loss_run_on_tensors_without_data(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [x.detach().to(device).requires_grad_() for x in layer_inputs(torch.float32)]
        angle = torch.empty(9, 8, device=device)
        hidden = layer(*inputs, Segments.from_lengths([4, 5], device), angle, angle)
        labels = torch.zeros(9, dtype=torch.int64, device=device)
        loss = ops.linear_cross_entropy(hidden, torch.empty(50, 16, device=device), labels)
        loss.backward()
    assert inputs[0].grad.shape == (9, 32)
    assert loss.dtype == torch.float32


def test_a_file_made_for_another_version_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    find = _load.cpu_problem.__wrapped__
    assert "is not built" in find()
    (tmp_path / "_cpu.so").write_bytes(b"\x7fELF megatune-cpu-abi=0;")
    with pytest.warns(UserWarning, match="another version of megatune; build it again"):
        assert "another version" in find()
    (tmp_path / "_cpu.so").write_bytes(f"\x7fELF megatune-cpu-abi={_load.CPU_ABI};".encode())
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert "cannot be loaded" in find()
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.warns(UserWarning, match="needs torch 2.11, this is torch 2.10.1"):
        assert "needs torch 2.11" in find()


def test_without_compiled_kernels_everything_runs_on_references(tmp_path: Path) -> None:
    """The operators too: what torch.compile put into a graph must run where nothing is built."""
    package = tmp_path / "megatune"
    shutil.copytree(
        ROOT / "megatune/ops", package / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "megatune/errors.py", package)
    (package / "__init__.py").touch()
    script = """
import torch
from megatune import ops
assert set(ops.chosen("cpu").values()) == {"reference", "sdpa"}, ops.chosen("cpu")
assert "is not built" in dict((op, others) for op, _, others in ops.table("cpu"))["glu"]
q = torch.randn(9, 4, 32).bfloat16()
out, lse = torch.ops.megatune.attention(q, q, q, torch.tensor([0, 4, 9], dtype=torch.int32), 0.1, 0, 0.0)
whole = ops.attention(q, q, q, ops.Segments.from_lengths([4, 5]), scale=0.1)
torch.testing.assert_close(out, whole, rtol=2e-2, atol=2e-2)
x = torch.randn(3, 8, requires_grad=True)
torch.ops.megatune.cross_entropy_rows(x.detach().clone(), torch.zeros(3, dtype=torch.int64), 0.0, True)
ops.glu(ops.rms_norm(x, torch.ones(8), 1e-5), "gelu").sum().backward()
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_kernels_for_other_instruction_sets(isa: str) -> None:
    """What an older CPU runs: the other kernel tests in a process that is told so."""
    need_body("glu", "cpu", torch.float32)
    tests = [f"tests/unit/{name}.py" for name in ("test_ops_elementwise", "test_ops_loss")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MEGATUNE_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_what_the_compiled_body_fuses_equals_the_references() -> None:
    """On a CPU, not compiled: the formulas that are written for the compiler's sake."""
    glu, rope, loss = (sys.modules[f"megatune.ops.{name}"] for name in ("glu", "rope", "cross_entropy_rows"))
    gate_up, grad = torch.randn(7, 50).bfloat16() * 3, torch.randn(7, 25).bfloat16()
    for activation in range(3):
        words = gate_up.view(torch.int32)
        torch.testing.assert_close(glu._pairs(words, activation), glu._reference(gate_up, activation))
        torch.testing.assert_close(
            glu._pairs_backward(grad, words, activation).view(torch.bfloat16),
            glu._reference_backward(grad, gate_up, activation),
        )
    x, angle = torch.randn(7, 2, 5, 16), torch.randn(7, 8)
    for inverse in (False, True):
        arguments = (x[:, :, :3], angle.cos(), angle.sin(), inverse)
        torch.testing.assert_close(rope._flipped(*arguments), rope._turn(*arguments))
        part = (x, angle[:, :3].cos(), angle[:, :3].sin(), inverse)
        torch.testing.assert_close(rope._flipped(*part), rope._turn(*part))
    labels = torch.randint(50, (7,))
    labels[3] = -100
    for softcap, *options in ((0.0, None, 0.0, 0.0), (5.0, None, 0.0, 0.0), (5.0, torch.rand(7), 0.1, 0.2)):
        one, two = (torch.randn(7, 50, generator=torch.Generator().manual_seed(3)) * 3 for _ in range(2))
        expected = loss._reference(one, labels, softcap, True, *options)
        actual, own, index = loss._losses(two, labels, softcap, True, *options, -100)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(two.scatter_(1, index, own), one)


def test_pairs_need_whole_words() -> None:
    glu = sys.modules["megatune.ops.glu"]
    wide = torch.zeros(4, 11, dtype=torch.bfloat16)
    assert glu._in_pairs(torch.zeros(4, 10, dtype=torch.bfloat16))
    assert (
        not glu._in_pairs(wide[:, :10]) and not glu._in_pairs(wide[:, 1:]) and not glu._in_pairs(wide.float())
    )


def test_no_number_of_kinds_of_arguments_makes_a_fused_function_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    run = registry.fuse(lambda x, flag: (x * 2, flag, torch.compiler.is_compiling()))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for dims in range(1, 5):
            for flag in (None, True, 0.5):
                x = torch.ones([3] * dims, dtype=dtype)
                doubled, same, compiled = run(x, flag)
                assert compiled and same is flag
                assert torch.equal(doubled, x * 2)
