"""Ops on a GPU: every body against the fp64 reference on the host, gradients included."""

from __future__ import annotations

import pytest
import torch

from megatune import ops
from megatune.ops import Segments
from tests.helpers.ops import DTYPES, compare, need_body

pytestmark = pytest.mark.gpu
BODIES = ["reference", "compiled"]
ATTENTION = [
    (body, options)
    for body, features in (
        ("varlen", {"window", "cache"}),
        ("flex", {"window", "softcap"}),
        ("sdpa", {"window", "cache"}),
        ("reference", {"window", "softcap", "cache"}),
    )
    for options in ({}, {"window": 40}, {"softcap": 5.0}, {"window": 40, "softcap": 5.0})
    if set(options) <= features
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_elementwise_ops_and_loss(body: str, dtype: torch.dtype) -> None:
    need_body("glu", body, dtype, "cuda")
    x, weight = torch.randn(33, 96), torch.randn(96)
    for offset in (0.0, 1.0):
        compare(
            "rms_norm", body, lambda x, w, o=offset: ops.rms_norm(x, w, 1e-5, o), (x, weight), dtype, "cuda"
        )
    for activation in ("silu", "gelu", "gelu_tanh"):
        compare("glu", body, lambda x, a=activation: ops.glu(x, a), (x,), dtype, "cuda")
    angle = torch.randn(33, 16)

    def rope(x: torch.Tensor) -> torch.Tensor:
        cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)
        q, k = ops.rope(x[:, :, :3], x[:, :, 3], cos, sin)
        return torch.cat((q, k.unsqueeze(2)), 2)

    compare("rope", body, rope, (torch.randn(33, 2, 5, 40),), dtype, "cuda")
    labels = torch.randint(301, (33,))
    for softcap in (None, 8.0):
        compare(
            "linear_cross_entropy",
            body,
            lambda h, w, c=softcap: ops.linear_cross_entropy(h, w, labels.to(h.device), softcap=c, chunk=10),
            (torch.randn(33, 64), torch.randn(301, 64)),
            dtype,
            "cuda",
            tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        )


@pytest.mark.parametrize("heads", [(6, 2, 64), (2, 2, 128)])
@pytest.mark.parametrize(("body", "options"), ATTENTION)
def test_attention(body: str, options: dict[str, float], heads: tuple[int, int, int]) -> None:
    need_body("attention", body, torch.bfloat16, "cuda", tuple(options))
    lengths = [5, 130, 1, 64, 200]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.attention(
            q, k, v, Segments.from_lengths(lengths, q.device), scale=heads[2] ** -0.5, **options
        )

    total = sum(lengths)
    inputs = [torch.randn(total, count, heads[2]) for count in (heads[0], heads[1], heads[1])]
    compare("attention", body, attend, inputs, torch.bfloat16, "cuda", tolerance=8e-3)


@pytest.mark.parametrize("body", ["varlen", "sdpa"])
@pytest.mark.parametrize("window", [None, 6])
def test_decoding_with_a_cache(body: str, window: int | None) -> None:
    need_body("attention", body, torch.bfloat16, "cuda", ("cache",))
    ops.configure({"attention": body}, "cuda")
    q, k, v = (torch.randn(50, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    keys, segments = Segments.from_lengths([30, 20], "cuda"), Segments.from_lengths([3, 1], "cuda")
    whole = ops.attention(q, k, v, keys, scale=0.1, window=window)
    last = [27, 28, 29, 49]
    part = ops.attention(q[last], k, v, segments, scale=0.1, window=window, key_segments=keys)
    torch.testing.assert_close(part, whole[last], rtol=2e-2, atol=2e-2)


def test_the_automatic_choice_is_packed_attention_and_fused_kernels() -> None:
    chosen = ops.chosen("cuda", torch.bfloat16)
    need_body("attention", "varlen", torch.bfloat16, "cuda")
    need_body("glu", "compiled", torch.bfloat16, "cuda")
    assert chosen["attention"] == "varlen"
    assert chosen["attention_block"] == "flash"
    assert chosen["grouped_linear"] == "grouped_mm"
    single = ops.chosen("cuda", torch.float32)
    for op, body in chosen.items():
        bodies = ops.OPS[op].bodies
        fused = {"compiled", "cuda"} & set(bodies)
        if all(torch.bfloat16 not in (bodies[name].dtypes or (torch.bfloat16,)) for name in fused):
            body = single[op]  # the router's scores are float32
        assert not fused or body in {*fused, "torch"}, f"{op}: {body}"
