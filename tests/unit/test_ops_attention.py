"""attention: every body against the reference in fp64, gradients included; documents never see each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatune import ops
from megatune.ops import Segments, attention_blocks, attention_packed
from megatune.ops.attention_blocks import Block, block_attention, block_attention_backward
from tests.helpers.ops import DTYPES, compare, need_body, relative_error

OPTIONS = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 5.0},
    "both": {"window": 45, "softcap": 5.0},
}
# Every body with every dtype and option it is made for.
CASES = [
    (body, dtype, options)
    for body, dtypes in (("reference", DTYPES), ("sdpa", DTYPES), ("cpu", [torch.bfloat16]))
    for dtype in dtypes
    for options in OPTIONS
    if body != "sdpa" or "softcap" not in OPTIONS[options]
]


@pytest.fixture(autouse=True)
def _same_numbers_and_automatic_bodies():
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")


def inputs(tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(tokens, heads, dim),
        torch.randn(tokens, kv_heads, dim),
        torch.randn(tokens, kv_heads, dim),
    )


@pytest.mark.parametrize("heads", [(6, 2, 32), (2, 2, 80), (3, 1, 8)])
@pytest.mark.parametrize(("body", "dtype", "options"), CASES)
def test_bodies(body: str, dtype: torch.dtype, heads: tuple[int, int, int], options: str) -> None:
    need_body("attention", body, dtype, features=tuple(OPTIONS[options]))
    segments = Segments.from_lengths([5, 64, 1, 33, 70])
    compare(
        "attention",
        body,
        lambda q, k, v: ops.attention(q, k, v, segments, scale=heads[2] ** -0.5, **OPTIONS[options]),
        inputs(segments.tokens, *heads),
        dtype,
        tolerance=5e-6 if dtype == torch.float32 else 8e-3,
    )


@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("dims", [(32, 32), (24, 16), (16, 40)])
@pytest.mark.parametrize(
    ("body", "dtype"), [("reference", torch.float32), ("reference", torch.bfloat16), ("cpu", torch.bfloat16)]
)
def test_sinks_and_values_of_another_width(
    body: str, dtype: torch.dtype, dims: tuple[int, int], options: str
) -> None:
    need_body("attention", body, dtype, features=("sinks", *OPTIONS[options]))
    segments = Segments.from_lengths([5, 64, 1, 33])
    q, k, _ = inputs(segments.tokens, 6, 2, dims[0])
    compare(
        "attention",
        body,
        lambda q, k, v, sinks: ops.attention(
            q, k, v, segments, scale=dims[0] ** -0.5, sinks=sinks, **OPTIONS[options]
        ),
        (q, k, torch.randn(segments.tokens, 2, dims[1]), torch.randn(6)),
        dtype,
        tolerance=5e-6 if dtype == torch.float32 else 8e-3,
    )


@pytest.mark.parametrize("dims", [(8, 4), (4, 8)])
@pytest.mark.parametrize(("body", "dtype"), [case[:2] for case in CASES if case[2] == "plain"])
def test_values_of_another_width(body: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    need_body("attention", body, dtype)
    segments = Segments.from_lengths([5, 34])
    q, k, _ = inputs(39, 4, 2, dims[0])
    compare(
        "attention",
        body,
        lambda q, k, v: ops.attention(q, k, v, segments, scale=0.4),
        (q, k, torch.randn(39, 2, dims[1])),
        dtype,
        tolerance=5e-6 if dtype == torch.float32 else 8e-3,
    )


@pytest.mark.parametrize("value_dim", [5, 8, 11])
def test_a_sink_is_a_key_with_a_score_of_its_own_and_no_value(value_dim: int) -> None:
    """Reference with sinks and a width of its own against PyTorch, which is given one more key."""
    ops.configure({"attention": "reference"}, "cpu")
    q, k, _ = (x.double() for x in inputs(12, 4, 2, 8))
    v, sinks = torch.randn(12, 2, value_dim).double(), torch.randn(4).double()
    bias = torch.zeros(4, 12, 13).double().masked_fill(torch.ones(12, 13).triu(1).bool(), -torch.inf)
    bias[:, :, 12] = sinks[:, None]
    more_k, more_v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, more_k, more_v)), attn_mask=bias, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    actual = ops.attention(q, k, v, Segments.from_lengths([12]), scale=0.3, sinks=sinks)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("body", ["reference", "sdpa", "cpu"])
def test_views_of_the_fused_projection(body: str) -> None:
    need_body("attention", body, torch.bfloat16)
    segments = Segments.from_lengths([40, 9])

    def fused(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.view(49, 2, 5, 32).split((3, 1, 1), 2)
        return ops.attention(q.flatten(1, 2), k.squeeze(2), v.squeeze(2), segments, scale=0.2)

    compare("attention", body, fused, (torch.randn(49, 320),), torch.bfloat16, tolerance=8e-3)


@pytest.mark.parametrize(("body", "dtype"), [case[:2] for case in CASES if case[2] == "plain"])
def test_a_document_does_not_see_the_others_nor_the_future(body: str, dtype: torch.dtype) -> None:
    need_body("attention", body, dtype)
    ops.configure({"attention": body}, "cpu")
    q, k, v = (x.to(dtype) for x in inputs(50, 2, 1, 32))
    segments = Segments.from_lengths([20, 30])
    before = ops.attention(q, k, v, segments, scale=0.2)
    k[:20], v[:20] = 7.0, 7.0  # the first document
    k[40:], v[40:] = -7.0, 3.0  # the end of the second
    after = ops.attention(q, k, v, segments, scale=0.2)
    assert torch.equal(before[20:40], after[20:40])
    assert not torch.equal(before[40:], after[40:])


def test_sdpa_and_reference_agree_with_one_padded_call() -> None:
    q, k, v = (x.double() for x in inputs(12, 4, 2, 8))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    for body in ("reference", "sdpa"):
        ops.configure({"attention": body}, "cpu")
        actual = ops.attention(q, k, v, Segments.from_lengths([12]), scale=0.3)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_decoding_with_a_cache_equals_the_whole(
    window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    q, k, v = inputs(16, 4, 2, 8)
    keys = Segments.from_lengths([9, 7])
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    whole = ops.attention(q, k, v, keys, **options)
    last = [6, 7, 8, 15]  # three new tokens of the first document, one of the second
    segments = Segments.from_lengths([3, 1])
    part = ops.attention(q[last], k, v, segments, key_segments=keys, **options)
    torch.testing.assert_close(part, whole[last])


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_both_references(
    options: str, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that autograd differentiates, and the operators' with its written-out gradient."""
    q, k, v = (x.double().requires_grad_() for x in inputs(7, 4, 2, 3))
    sinks = [torch.randn(4).double().requires_grad_()] if with_sinks else []
    segments = Segments.from_lengths([3, 4])
    chosen = {"window": 2, "softcap": 1.5}
    chosen = {name: chosen[name] for name in OPTIONS[options]}
    ops.configure({"attention": "reference"}, "cpu")

    def whole(*x: torch.Tensor) -> torch.Tensor:
        return ops.attention(*x[:3], segments, scale=0.7, sinks=x[3] if with_sinks else None, **chosen)

    def packed(*x: torch.Tensor) -> torch.Tensor:
        rest = (0.7, chosen.get("window"), chosen.get("softcap"), *x[3:])
        return attention_packed.packed(*x[:3], segments, segments, *rest)

    assert torch.autograd.gradcheck(whole, (q, k, v, *sinks), atol=1e-6)
    monkeypatch.setattr(attention_packed, "FORWARD", attention_packed._reference)
    monkeypatch.setattr(attention_packed, "BACKWARD", attention_packed._reference_backward)
    assert torch.autograd.gradcheck(packed, (q, k, v, *sinks), atol=1e-6)
    torch.testing.assert_close(packed(q, k, v, *sinks), whole(q, k, v, *sinks))


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("scores_at_once", [1 << 24, 50])
def test_blocks_of_keys_join_to_the_whole(
    window: int | None, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries 12 to 19 of one document with its keys 0 to 11 and with their own: output and gradients."""
    monkeypatch.setattr(attention_blocks, "_SCORES", scores_at_once)
    options = {"scale": 0.3, "softcap": 2.0}
    segments, ten = Segments.from_lengths([20]), torch.arange(12, 20)
    leaves = [x.double().requires_grad_() for x in inputs(20, 4, 2, 6)]
    whole = ops.attention(*leaves, segments, window=window, **options)[ten]
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, leaves, grad)
    q, k, v = (x.detach() for x in leaves)
    own = torch.tensor([0, 8], dtype=torch.int32)
    left = None if window is None else window - 1
    near = Block((8,), (8,), own, own, left, 0)
    far = Block(
        (8,), (12,), own, torch.tensor([0, 12], dtype=torch.int32), left and left - 8
    )  # the ends are 8 apart
    parts = [(slice(12, 20), near), (slice(0, 12), far)]
    results = [block_attention(q[ten], k[rows], v[rows], block, **options) for rows, block in parts]
    lse = torch.logaddexp(*(result[1] for result in results))
    out = sum(out * torch.exp(part - lse).t()[..., None] for out, part in results)
    torch.testing.assert_close(out, whole.detach())
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, block in parts:
        found = block_attention_backward(grad, q[ten], k[rows], v[rows], out, lse, block, **options)
        for total, where, part in zip(grads, (ten, rows, rows), found, strict=True):
            total[where] += part
    for value, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(value, truth)


def test_large_scores_stay_finite() -> None:
    need_body("attention", "cpu", torch.bfloat16)
    ops.configure({"attention": "cpu"}, "cpu")
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(70, 2, 1, 32))
    out = ops.attention(q * 100, k * 100, v, Segments.from_lengths([70]), scale=1.0)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_tiles_do_not_disturb_other_kernels_that_use_them() -> None:
    need_body("attention", "cpu", torch.bfloat16)
    ops.configure({"attention": "cpu"}, "cpu")
    q, k, v = (x.bfloat16() for x in inputs(90, 2, 2, 32))
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    segments = Segments.from_lengths([90])
    product, attended = a @ b, ops.attention(q, k, v, segments, scale=0.2)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        other = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.2)[0].transpose(0, 1)
        assert torch.equal(ops.attention(q, k, v, segments, scale=0.2), attended)
        assert relative_error(other, attended) < 8e-3


def test_no_tokens_and_a_window_that_hides_nothing() -> None:
    q = torch.zeros(0, 4, 8, requires_grad=True)
    out = ops.attention(q, q[:, :2], q[:, :2], Segments.from_lengths([]), scale=1.0)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8)
    q, k, v = inputs(6, 2, 2, 8)
    segments = Segments.from_lengths([6])
    assert torch.equal(
        ops.attention(q, k, v, segments, scale=1.0, window=6), ops.attention(q, k, v, segments, scale=1.0)
    )


def test_wrong_arguments_are_named() -> None:
    q, k, v = inputs(6, 4, 2, 8)
    segments = Segments.from_lengths([6])
    for message, call in (
        ("no multiple", lambda: ops.attention(q[:, :3], k, v, segments, scale=1.0)),
        ("k and v alike", lambda: ops.attention(q, k, v[:, :1], segments, scale=1.0)),
        (
            "6 and k 6 tokens, segments 5",
            lambda: ops.attention(q, k, v, Segments.from_lengths([5]), scale=1.0),
        ),
        (
            "2 documents, key_segments 1",
            lambda: ops.attention(
                q, k, v, Segments.from_lengths([2, 4]), key_segments=Segments.from_lengths([6]), scale=1.0
            ),
        ),
        ("window", lambda: ops.attention(q, k, v, segments, scale=1.0, window=0)),
        ("one for each of the 4", lambda: ops.attention(q, k, v, segments, scale=1.0, sinks=torch.ones(2))),
        ("one dtype", lambda: ops.attention(q, k.double(), v.double(), segments, scale=1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    ops.configure({"attention": "sdpa"}, "cpu")
    with pytest.raises(ValueError, match="asks for body 'sdpa', but here it cannot do softcap"):
        ops.attention(q, k, v, segments, scale=1.0, softcap=2.0)
    with pytest.raises(ValueError, match="cannot do sinks"):
        ops.attention(q, k, v, segments, scale=1.0, sinks=torch.zeros(4))


def test_segments() -> None:
    segments = Segments.from_lengths([3, 1, 2])
    assert segments.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert (segments.lengths, segments.max_seqlen, segments.tokens) == ((3, 1, 2), 3, 6)
    assert segments.to("meta").positions.device.type == "meta"
    targets = ops.Targets(torch.tensor([0]), torch.tensor([5])).to("meta")
    assert targets.index.device.type == targets.labels.device.type == "meta"
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Segments.from_lengths([3, 0])
