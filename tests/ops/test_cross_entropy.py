"""cross_entropy and linear_cross_entropy with each of their bodies: against fp64, gradients and all options included;
odd sizes, strided views, a split vocabulary, repeats."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body, relative_error
from tests.ops.bodies import DTYPES, TOLERANCE, bodies, repeats_bitwise

OP = "linear_cross_entropy"
module = sys.modules["megatune.ops.cross_entropy"]  # the name is the function's too
# Rows shorter than a vector, of a block's first vectors, of odd lengths and so of any alignment, of several sums.
WIDTHS = [3, 8, 117, 1000, 1107]
# Rows of one part or several, of clusters of two blocks and of four, and longer than that; aligned and not.
LONG = [4096, 16384, 32000, 50257, 65536, 128256, 151936, 262145]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 4.0},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1},
    {"softcap": 4.0, "z_loss": 0.01, "label_smoothing": 0.2},
]


@pytest.fixture(autouse=True)
def _automatic_bodies() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    for device in ("cpu", "cuda"):
        ops.configure({}, device)


def options_of(body: str) -> list[dict[str, Any]]:
    """Each kind of options is compiled by itself: the compiled body gets none and all of them."""
    return [OPTIONS[0], OPTIONS[-1]] if body == "compiled" else OPTIONS


def labels_of(rows: int, vocab: int) -> Tensor:
    """The first and the last of the vocabulary, and one row without a loss."""
    labels = torch.randint(vocab, (rows,))
    labels[0], labels[1], labels[2] = 0, vocab - 1, -100
    return labels


def check(
    body: str, device: str, dtype: torch.dtype, logits: Tensor, labels: Tensor, columns: slice, **options: Any
) -> None:
    """Through the public op; a copy is given, as it is overwritten. `columns`: of a wider tensor."""
    need_body(OP, body, dtype, device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}

    def run(x: Tensor) -> Tensor:
        given = {
            name: value.to(x.device) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        return ops.cross_entropy((x * 1)[:, columns], labels.to(x.device), **given)

    compare(OP, body, run, (logits,), dtype, device, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies(OP))
def test_widths_and_options(body: str, device: str, dtype: torch.dtype) -> None:
    everything = slice(None)
    for vocab, options in itertools.product(WIDTHS, options_of(body)):
        check(body, device, dtype, torch.randn(9, vocab) * 3, labels_of(9, vocab), everything, **options)
    weighted = {"z_loss": 0.01, "token_weights": torch.rand(9)}
    check(body, device, dtype, torch.randn(9, 40), labels_of(9, 40), everything, **weighted)
    if device == "cuda" and body != "reference":
        for number, vocab in enumerate(LONG):
            check(body, device, dtype, torch.randn(5, vocab) * 3, labels_of(5, vocab), everything)
            options = options_of(body)[1:]
            options = options[number % len(options)]
            check(body, device, dtype, torch.randn(5, vocab) * 3, labels_of(5, vocab), everything, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies(OP))
def test_rows_at_any_distance_and_address(body: str, device: str, dtype: torch.dtype) -> None:
    for vocab, columns in ((130, slice(1, 129)), (136, slice(8, None)), (97, slice(3, 90))):
        width = len(range(vocab)[columns])
        check(body, device, dtype, torch.randn(9, vocab), labels_of(9, width), columns, z_loss=0.1)


def torch_loss(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float, smoothing: float) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (weights * (losses + z_loss * (labels != -100) * logits.logsumexp(1).square())).sum()


def test_equals_torch_in_fp64_and_passes_gradcheck() -> None:
    hidden, weight, weights = torch.randn(6, 5).double(), torch.randn(11, 5).double(), torch.rand(6)
    labels, inputs = labels_of(6, 11), (hidden.requires_grad_(), weight.requires_grad_())
    options = {"z_loss": 0.05, "label_smoothing": 0.3, "token_weights": weights}
    expected = torch_loss(hidden @ weight.t(), labels, weights, 0.05, 0.3)
    for chunk in (None, 4):
        loss = ops.linear_cross_entropy(*inputs, labels, chunk=chunk, **options)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ops.cross_entropy(hidden @ weight.t(), labels, **options), expected)
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_cross_entropy(h, w, labels, softcap=2.0, chunk=4, **options), inputs
    )
    assert torch.autograd.gradcheck(
        lambda h, w: ops.cross_entropy(h @ w.t(), labels, softcap=2.0, **options), inputs
    )


def test_an_ignored_row_may_hold_anything() -> None:
    for body in ("reference", "cpu"):
        need_body(OP, body, torch.float32)
        ops.configure({OP: body}, "cpu")
        logits = torch.randn(3, 20)
        logits[1] = float("inf")
        leaf = logits.requires_grad_()
        loss = ops.cross_entropy(leaf * 1, torch.tensor([4, -1, 2]), ignore_index=-1)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.equal(leaf.grad[1], torch.zeros(20))
        assert leaf.grad[0].norm() > 0.1


def test_the_gradient_takes_the_place_of_the_logits_and_backward_scales_it_there() -> None:
    leaf, labels = torch.randn(5, 30).requires_grad_(), labels_of(5, 30)
    logits = leaf * 1
    before = logits._version
    loss = ops.cross_entropy(logits, labels)
    assert logits._version > before
    expected = torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="sum"), leaf)[0]
    torch.testing.assert_close(logits.detach(), expected)
    # Asked for twice: the first time it must stay what it is.
    for factor in (3.0, 2.0):
        (grad,) = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(grad, expected * factor)
    torch.testing.assert_close(logits.detach(), expected)
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(5.0))
    torch.testing.assert_close(grad, expected * 5)
    assert grad.data_ptr() == logits.data_ptr()
    with torch.no_grad():
        again = leaf.detach().clone()
        torch.testing.assert_close(ops.cross_entropy(again, labels), loss.detach())
    assert torch.equal(again, leaf)


def test_the_gradients_of_a_head_are_scaled_in_place_unless_the_graph_is_kept() -> None:
    hidden, weight = torch.randn(9, 4).requires_grad_(), torch.randn(20, 4).requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels_of(9, 20), chunk=4)
    saved = loss.grad_fn.saved_tensors
    first = [x.clone() for x in saved]
    twice = [torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True) for _ in range(2)]
    for grad, one, again in zip(first, *twice, strict=True):
        torch.testing.assert_close(one, grad * 3)
        assert torch.equal(one, again)
    assert all(torch.equal(x, y) for x, y in zip(saved, first, strict=True))
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    again = ops.linear_cross_entropy(*low, labels_of(9, 20), chunk=4)  # whose sums are in fp32
    kept = torch.autograd.grad(again * 3, low, retain_graph=True)
    for grad, once in zip(kept, torch.autograd.grad(again * 3, low), strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.equal(grad, once)
    last = torch.autograd.grad(loss * 7, (hidden, weight))
    for grad, given, x in zip(first, last, saved, strict=True):
        torch.testing.assert_close(given, grad * 7)
        assert given.data_ptr() == x.data_ptr()


def test_the_head_gradient_is_narrowed_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that never overtake what is still to be read, and products a part of the vocabulary at a time."""
    for count in (1, 7, 8, 100, 4097):
        wide = torch.randn(count, 3)
        expected, address = (wide * 2).bfloat16(), wide.data_ptr()
        monkeypatch.setattr(module, "PIECE", 5)
        narrow = module._narrowed(wide, torch.bfloat16, lambda out, x: torch.mul(x, 2, out=out))
        assert torch.equal(narrow, expected)
        assert narrow.data_ptr() == address
    hidden, weight = torch.randn(23, 24).bfloat16(), torch.randn(117, 24).bfloat16()
    labels, grads = labels_of(23, 117), []
    for piece in (2**24, 24 * 10):
        monkeypatch.setattr(module, "PIECE", piece)
        leaf = weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(ops.linear_cross_entropy(hidden, leaf, labels, chunk=8), leaf)[0])
    assert relative_error(grads[1], grads[0]) < 1e-3


def test_chunks_fill_a_device_where_it_has_multiprocessors() -> None:
    # 18 x 22 tiles of 192 x 192 are three for each of 132 multiprocessors; four such chunks and one of 2560 rows.
    assert module._chunk("cuda", 16384, 128256, 4096) == 3456
    assert module._tile_time(3456, 4096) == module._tile_time(3200, 4096) == 3 * 192 * 192
    assert module._tile_time(3072, 4096) == 3 * 256 * 128 and module._tile_time(0, 4096) == 0
    assert module._chunk("cuda", 16384, 151936, 2048) == 3072
    assert module._chunk("cuda", 3662, 128256, 4096) == 3662  # all at once
    assert module._chunk("cuda", 4096, 2**20, 4096) == 384
    assert module._chunk("cuda", 7, 2**40, 64) == 1
    assert module._chunk("cpu", 2048, 49152, 64) == 2**26 // 49152


class Ranks:
    """The processes of a split vocabulary in one: each rank's losses are asked for, with all ranks' sums."""

    def __init__(self, cuts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuts, self.sums, self.at = cuts, [], 0
        monkeypatch.setattr(module.dist, "get_world_size", lambda group: len(cuts))
        monkeypatch.setattr(module, "all_gather", self.all_gather)

    def all_gather(self, out: Tensor, x: Tensor, *, group: None) -> None:
        if len(self.sums) <= self.at:
            self.sums.append(x)
        out.copy_(torch.cat(self.sums + [x] * (len(self.cuts) - len(self.sums))))

    def run(self, logits: Tensor, labels: Tensor, **options: Any) -> tuple[list[Tensor], Tensor]:
        """(every rank's loss, whole gradient)."""
        size = logits.shape[1]
        for _ in range(2):  # the first time for what each sends
            losses, grads = [], []
            for rank, (first, last) in enumerate(self.cuts):
                self.at = rank
                leaf = logits[:, first:last].clone().requires_grad_()
                cut = ops.VocabCut(first, size, None)
                loss = ops.cross_entropy(leaf * 1, labels, cut=cut, **options)
                losses.append(loss.detach())
                grads.append(torch.autograd.grad(loss, leaf)[0])
        return losses, torch.cat(grads, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("body", "device"), [one for one in bodies("split_cross_entropy") if one.values[0] != "cpu"]
)
def test_a_split_vocabulary(
    body: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_body("split_cross_entropy", body, dtype, device)
    vocab = 301 if device == "cpu" else 40001
    ranks = Ranks([(0, vocab // 3), (vocab // 3, vocab - 7), (vocab - 7, vocab)], monkeypatch)
    logits, labels = (torch.randn(9, vocab) * 3).to(dtype), labels_of(9, vocab)
    for options in (*options_of(body), {"token_weights": torch.rand(9)}):
        whole = logits.double().requires_grad_()
        ops.configure({OP: "reference"}, "cpu")
        truth = ops.cross_entropy(whole * 1, labels, **options)
        (expected,) = torch.autograd.grad(truth, whole)
        ops.configure({"split_cross_entropy": body}, device)
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        ranks.sums.clear()
        losses, grad = ranks.run(logits.to(device), labels.to(device), **there)
        for loss in losses:
            assert relative_error(loss, truth) <= TOLERANCE[dtype]
        assert relative_error(grad, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("split_cross_entropy"))
def test_a_part_of_a_vocabulary_that_is_ruled_out(
    body: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_body("split_cross_entropy", body, dtype, device)
    ranks = Ranks([(0, 100), (100, 301)], monkeypatch)
    logits, labels = (torch.randn(4, 301) * 3).to(dtype), torch.tensor([200, 3, 100, 300])
    logits[0, :100] = logits[3, :100] = logits[1, 100:] = -float("inf")
    whole = logits.double().requires_grad_()
    truth = F.cross_entropy(whole, labels, reduction="sum")
    (expected,) = torch.autograd.grad(truth, whole)
    ops.configure({"split_cross_entropy": body}, device)
    losses, grad = ranks.run(logits.to(device), labels.to(device))
    for loss in losses:
        assert relative_error(loss, truth) <= TOLERANCE[dtype]
    assert relative_error(grad, expected) <= TOLERANCE[dtype]


def test_the_head_of_a_split_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank gives its part of the hidden states' gradient; their sum is the whole."""
    hidden, weight, labels = torch.randn(9, 6), torch.randn(50, 6), labels_of(9, 50)
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "token_weights": torch.rand(9), "chunk": 9}
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    whole = ops.linear_cross_entropy(*inputs, labels, **options)
    expected = torch.autograd.grad(whole, inputs)
    ranks = Ranks([(0, 25), (25, 50)], monkeypatch)
    for _ in range(2):
        grads = []
        for rank, (first, last) in enumerate(ranks.cuts):
            ranks.at = rank
            mine = weight[first:last].detach().requires_grad_()
            loss = ops.linear_cross_entropy(
                hidden, mine, labels, cut=ops.VocabCut(first, 50, None), **options
            )
            grads.append(torch.autograd.grad(loss, (hidden, mine)))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected[0])
    torch.testing.assert_close(torch.cat((grads[0][1], grads[1][1])), expected[1])


@pytest.mark.parametrize(("body", "device"), bodies(OP))
def test_no_rows(body: str, device: str) -> None:
    need_body(OP, body, torch.float32, device)
    ops.configure({OP: body}, device)
    leaf = torch.randn(0, 64, device=device, requires_grad=True)
    loss = ops.cross_entropy(leaf * 1, torch.zeros(0, dtype=torch.int64, device=device))
    loss.backward()
    assert loss.item() == 0.0
    assert leaf.grad.shape == (0, 64)


def test_wrong_arguments_are_named() -> None:
    logits, labels = torch.randn(4, 9), labels_of(4, 9)
    for message, given, options in (
        (r"logits .* each row contiguous", (logits.t(), labels), {}),
        (r"labels torch.int32 .* must be int64 \[4\]", (logits, labels.int()), {}),
        ("softcap", (logits, labels), {"softcap": 0.0}),
        ("z_loss", (logits, labels), {"z_loss": -1.0}),
        ("label_smoothing", (logits, labels), {"label_smoothing": 1.0}),
        (r"token_weights .* must be float32 \[4\]", (logits, labels), {"token_weights": torch.ones(3)}),
        ("token_weights get no", (logits, labels), {"token_weights": torch.ones(4, requires_grad=True)}),
        ("labels is on meta", (logits, labels.to("meta")), {}),
        ("must not be a leaf", (logits.requires_grad_(), labels), {}),
    ):
        with pytest.raises(ValueError, match=f"^cross_entropy: .*{message}"):
            ops.cross_entropy(*given, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [117, 32000, 128256])
def test_repeats_are_equal_bit_by_bit(vocab: int) -> None:
    need_body(OP, "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    logits = torch.randn(300, vocab, device="cuda").bfloat16()
    labels, weights = labels_of(300, vocab).cuda(), torch.rand(300, device="cuda")

    def run() -> tuple[Tensor, ...]:
        one, two, three = logits.clone(), logits.clone(), logits.clone()
        loss = calls.cross_entropy_rows(one, labels, 0.0, True, weights, 0.1, 0.1)
        plain = calls.cross_entropy_rows(three, labels, 0.0, True, weights, 0.1)
        sums = calls.cross_entropy_sums(two, labels, 0, vocab, 0.0, True)
        calls.cross_entropy_grad(two, labels, 0, vocab, 0.0, sums[:, :2].contiguous(), weights)
        return loss, one, sums, two, plain, three

    repeats_bitwise(run)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_one_after_the_other(dtype: torch.dtype) -> None:
    """More rows for each block than it remembers pass through its shared memory: a part of a row at a time, one row,
    several, for one block or a cluster of two or four; rows that are skipped, too large, or of -infinity but for some.
    """
    need_body(OP, "cuda", dtype, "cuda")
    reference = ops.OPS[OP].bodies["reference"].run[0]
    for vocab, rows in (
        (520, 2500),
        (16384, 1300),
        (32000, 2500),
        (81928, 1300),
        (128256, 1300),
        (262144, 700),
    ):
        wide, labels = torch.randn(rows, vocab + 8, device="cuda").to(dtype), labels_of(rows, vocab).cuda()
        wide[5] *= 20
        wide[200, 7] = float("inf")
        wide[210, 90:] = wide[220, : vocab // 2 + 4] = -float("inf")
        labels[[133, 210, 220, rows - 1]] = torch.tensor([-100, 3, vocab - 1, -100], device="cuda")
        options = (0.0, True, torch.rand(rows, device="cuda"), 0.01)
        mine, theirs = wide.clone(), wide
        alone = torch.ops.megatune.cross_entropy_rows(mine[:, :vocab], labels, 0.0, False, *options[2:])
        assert torch.equal(mine, wide)
        loss = torch.ops.megatune.cross_entropy_rows(mine[:, :vocab], labels, *options)
        truth = reference(theirs[:, :vocab], labels, *options)
        good = torch.isfinite(truth)
        assert good.sum() == rows - 1
        assert not torch.isfinite(loss[200])
        assert relative_error(loss[good], truth[good]) <= 5e-6
        assert relative_error(alone[good], truth[good]) <= 5e-6
        assert torch.equal(mine[:, vocab:], theirs[:, vocab:])
        for part in good.nonzero().squeeze(1).split(100):
            torch.testing.assert_close(
                mine[part, :vocab], theirs[part, :vocab], rtol=2 * TOLERANCE[dtype], atol=5e-7
            )
        assert not mine[labels == -100, :vocab].any()


@pytest.mark.gpu
def test_a_gradient_is_scaled_in_place_and_into_a_narrower_one() -> None:
    need_body(OP, "cuda", torch.bfloat16, "cuda")
    scale = torch.ops.megatune.scale_gradient
    for shape in ((1, 7), (3, 8), (5, 1001), (300, 4096)):
        x, factor = torch.randn(shape, device="cuda"), torch.tensor(0.3, device="cuda")
        for given, dtype in (
            (x, torch.float32),
            (x, torch.bfloat16),
            (x, torch.float16),
            (x.half(), torch.float16),
            (x.bfloat16(), torch.bfloat16),
            (torch.cat([x, x], 1).bfloat16()[:, 1 : 1 + shape[1]], torch.bfloat16),
        ):
            out = torch.empty_like(given, dtype=dtype)
            scale(out, given, factor)
            expected = (given.float() * factor).to(dtype)
            assert torch.equal(out, expected)
            if given.dtype == dtype:
                padded = torch.cat([given, given], 1)
                same = padded[:, shape[1] :]
                for number in (torch.ones_like(factor), factor):
                    scale(same, same, number)
                assert torch.equal(same, expected)
                assert torch.equal(padded[:, : shape[1]], given)


@pytest.mark.gpu
def test_a_label_outside_the_vocabulary_makes_the_loss_nan() -> None:
    need_body(OP, "cuda", torch.float32, "cuda")
    logits, labels = torch.randn(3, 20, device="cuda"), torch.tensor([3, 20, -5], device="cuda")
    loss = torch.ops.megatune.cross_entropy_rows(logits, labels, 0.0, True)
    assert loss.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
def test_opcheck_on_a_gpu() -> None:
    need_body(OP, "cuda", torch.bfloat16, "cuda")
    need_body("split_cross_entropy", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    logits, labels = torch.randn(6, 40, device="cuda").bfloat16(), labels_of(6, 40).cuda()
    weights = torch.rand(6, device="cuda")
    for operator, arguments in (
        (calls.cross_entropy_rows, (logits, labels, 3.0, True)),
        (calls.cross_entropy_rows, (logits[:, 1:39], labels.clamp(max=37), 0.0, True, weights, 0.1, 0.1)),
        (calls.cross_entropy_sums, (logits, labels, 8, 60, 0.0, True)),
        (calls.cross_entropy_join, (torch.rand(2, 6, 3, device="cuda"), labels, 60, weights, 0.1)),
        (calls.cross_entropy_grad, (logits, labels, 8, 60, 0.0, torch.rand(6, 2, device="cuda"), weights)),
        (calls.scale_gradient, (torch.empty_like(logits), logits, weights[0])),
    ):
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "wrong", ["layout", "dtype of labels", "length of labels", "device of labels", "dtype"]
)
def test_what_the_kernel_cannot_read_is_an_error(wrong: str) -> None:
    need_body(OP, "cuda", torch.float32, "cuda")
    logits, labels = torch.randn(4, 8, device="cuda"), labels_of(4, 8).cuda()
    given = {
        "layout": (torch.randn(8, 4, device="cuda").t(), labels),
        "dtype of labels": (logits, labels.int()),
        "length of labels": (logits, labels[:3]),
        "device of labels": (logits, labels.cpu()),
        "dtype": (logits.double(), labels),
    }[wrong]
    with pytest.raises(RuntimeError, match="megatune"):
        torch.ops.megatune.cross_entropy_rows(*given, 0.0, True)


@pytest.mark.gpu
@pytest.mark.parametrize("body", ["cuda", "compiled"])
def test_a_head_in_chunks_adds_products_to_fp32(body: str) -> None:
    need_body(OP, body, torch.bfloat16, "cuda")
    hidden, weight, labels = torch.randn(700, 256), torch.randn(3001, 256) * 0.1, labels_of(700, 3001)
    for options in ({}, {"z_loss": 0.01, "label_smoothing": 0.1}):
        compare(
            OP,
            body,
            lambda h, w, o=options: ops.linear_cross_entropy(h, w, labels.to(h.device), chunk=256, **o),
            (hidden, weight),
            torch.bfloat16,
            "cuda",
            tolerance=1e-2,
        )
