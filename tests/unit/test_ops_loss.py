"""linear_cross_entropy: values, gradients made in the forward pass, chunks, soft cap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatune import ops
from tests.helpers.ops import DTYPES, compare, need_body, relative_error


@pytest.fixture(autouse=True)
def _same_numbers_and_automatic_bodies():
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")


def inputs(
    rows: int = 23, width: int = 24, vocab: int = 117
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, width), torch.randn(vocab, width), torch.randint(vocab, (rows,))


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("chunk", [None, 5, 23])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", ["reference", "cpu"])
def test_bodies(body: str, dtype: torch.dtype, chunk: int | None, softcap: float | None) -> None:
    need_body("linear_cross_entropy", body, dtype)
    hidden, weight, labels = inputs()
    compare(
        "linear_cross_entropy",
        body,
        lambda h, w: ops.linear_cross_entropy(h, w, labels, softcap=softcap, chunk=chunk),
        (hidden, weight),
        dtype,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
    )


def test_equals_torch_in_fp64_and_passes_gradcheck() -> None:
    hidden, weight, labels = inputs(5, 4, 9)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, labels, chunk=2), expected)
    for softcap in (None, 2.0):
        assert torch.autograd.gradcheck(
            lambda h, w, c=softcap: ops.linear_cross_entropy(h, w, labels, softcap=c, chunk=2),
            (hidden, weight),
        )


def test_gradients_only_for_what_is_trained_and_scaled_by_what_comes_back() -> None:
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    (loss / 7).backward()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.t(), labels, reduction="sum") / 7, hidden
    )
    torch.testing.assert_close(hidden.grad, expected)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(hidden.detach(), weight, labels, chunk=6), weight)
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"), weight)
    torch.testing.assert_close(grad, expected)


def test_without_autograd_the_backward_products_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    wanted = []
    rows = ops.OPS["linear_cross_entropy"].pick("cpu", torch.float32).run[0]
    spy = ops.registry.Body("spy", (lambda *args: wanted.append(args[3]) or rows(*args),))
    monkeypatch.setitem(ops.OPS["linear_cross_entropy"].picked, ("cpu", torch.float32, ()), spy)
    with torch.no_grad():
        without = ops.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(without, ops.linear_cross_entropy(hidden, weight, labels).detach())
    assert wanted == [False, True]


def test_weight_in_another_dtype_gets_its_gradient_there() -> None:
    hidden, weight, labels = inputs()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels, chunk=10)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    expected = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")
    assert relative_error(loss, expected) < 5e-3


@pytest.mark.parametrize("body", ["reference", "cpu"])
def test_no_rows(body: str) -> None:
    need_body("linear_cross_entropy", body, torch.float32)
    ops.configure({"linear_cross_entropy": body}, "cpu")
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("body", ["reference", "cpu"])
def test_confident_rows_have_a_loss_near_zero_and_no_nan(body: str) -> None:
    need_body("linear_cross_entropy", body, torch.float32)
    ops.configure({"linear_cross_entropy": body}, "cpu")
    hidden, weight = torch.eye(3, requires_grad=True), torch.eye(3) * 500
    right = ops.linear_cross_entropy(hidden, weight, torch.arange(3))
    wrong = ops.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 0]))
    (grad,) = torch.autograd.grad(wrong, hidden)
    assert right.item() == 0.0
    assert wrong.item() == pytest.approx(1500.0)
    assert torch.isfinite(grad).all()


def test_wrong_arguments_are_named() -> None:
    hidden, weight, labels = inputs()
    for message, call in (
        ("hidden", lambda: ops.linear_cross_entropy(hidden, weight[:, :3], labels)),
        ("labels", lambda: ops.linear_cross_entropy(hidden, weight, labels[:3])),
        ("labels", lambda: ops.linear_cross_entropy(hidden, weight, labels.int())),
        ("chunk", lambda: ops.linear_cross_entropy(hidden, weight, labels, chunk=0)),
        ("softcap", lambda: ops.linear_cross_entropy(hidden, weight, labels, softcap=-1.0)),
        ("labels is on meta", lambda: ops.linear_cross_entropy(hidden, weight, labels.to("meta"))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_label_outside_the_vocabulary_is_an_error_not_a_wild_read() -> None:
    need_body("linear_cross_entropy", "cpu", torch.float32)
    hidden, weight, labels = inputs()
    labels[4] = 117
    with pytest.raises(RuntimeError, match="label 117 in row 4"):
        ops.linear_cross_entropy(hidden, weight, labels)
