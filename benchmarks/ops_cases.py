"""What the op benchmarks time: every op at a model's sizes, and what people write for it in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatune import ops
from megatune.ops import LoraLayout, Segments


@dataclass(frozen=True)
class Sizes:
    """T tokens, H hidden, I mlp size, Q query heads, K KV heads, D head size, V vocabulary, S scored tokens."""

    T: int
    H: int
    I: int  # noqa: E741
    Q: int
    K: int
    D: int
    V: int
    S: int
    document: int  # tokens in each document
    rank: int = 16


SMOLLM2_135M = Sizes(T=1024, H=576, I=1536, Q=9, K=3, D=64, V=49152, S=1024, document=256)
LLAMA_1B = Sizes(T=8192, H=2048, I=8192, Q=32, K=8, D=64, V=128256, S=8192, document=2048)


@dataclass(frozen=True)
class Case:
    """`run` and `plain` take `leaves` (all of them with a gradient) and compute the same thing."""

    op: str
    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def cases(sizes: Sizes, dtype: torch.dtype, device: str) -> list[Case]:
    torch.manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def leaf(*shape: int) -> Tensor:
        return tensor(*shape).requires_grad_()

    s, group = sizes, sizes.Q // sizes.K
    segments = Segments.from_lengths([s.document] * (s.T // s.document), device)
    angle = segments.positions[:, None] / 10000 ** (torch.arange(s.D // 2, device=device) * 2 / s.D)
    cos, sin = angle.cos().float(), angle.sin().float()
    norm, head = tensor(s.H), tensor(s.V, s.H, scale=0.02)
    labels = torch.randint(s.V, (s.S,), device=device)
    return [
        Case("rms_norm", (leaf(s.T, s.H),), lambda x: ops.rms_norm(x, norm, 1e-5), _plain_norm(norm)),
        Case(
            "rope",
            (leaf(s.T, s.K, group + 2, s.D),),
            lambda qkv: ops.rope(qkv[:, :, :group], cos, sin),
            _plain_rope(group, cos, sin),
        ),
        Case("glu", (leaf(s.T, 2 * s.I),), lambda x: ops.glu(x, "silu"), _plain_glu),
        Case(
            "attention",
            (leaf(s.T, s.Q, s.D), leaf(s.T, s.K, s.D), leaf(s.T, s.K, s.D)),
            lambda q, k, v: ops.attention(q, k, v, segments, scale=s.D**-0.5),
            _plain_attention(segments),
        ),
        Case(
            "linear_cross_entropy",
            (leaf(s.S, s.H),),
            lambda x: ops.linear_cross_entropy(x, head, labels),
            lambda x: F.cross_entropy((x @ head.t()).float(), labels, reduction="sum"),
        ),
        _lora(sizes, tensor, leaf),
    ]


def _plain_norm(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """As transformers' LlamaRMSNorm."""

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return run


def _plain_rope(group: int, cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    """As transformers' apply_rotary_pos_emb."""

    def run(qkv: Tensor) -> Tensor:
        x = qkv[:, :, :group]
        full_cos, full_sin = (torch.cat((part, part), -1)[:, None, None].to(x.dtype) for part in (cos, sin))
        first, second = x.chunk(2, -1)
        return x * full_cos + torch.cat((-second, first), -1) * full_sin

    return run


def _plain_glu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _plain_attention(segments: Segments) -> Callable[..., Tensor]:
    """One call for all documents, with a mask that keeps them apart."""
    position = torch.arange(segments.tokens, device=segments.positions.device)
    document = position - segments.positions
    mask = (document[:, None] == document) & (position[:, None] >= position)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (part.transpose(0, 1)[None] for part in (q, k, v))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


def _lora(s: Sizes, tensor: Callable[..., Tensor], leaf: Callable[..., Tensor]) -> Case:
    """The fused gate and up projection with adapters on both; plain: both by themselves, as peft has them."""
    weight = tensor(2 * s.I, s.H, scale=0.02)
    layout = LoraLayout.of((("gate", 1), ("up", 1)), s.I, ["gate", "up"])

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, layout, 2.0)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        outputs = []
        for part in range(2):
            base = F.linear(x, weight[part * s.I : (part + 1) * s.I])
            low = F.linear(x, a[part * s.rank : (part + 1) * s.rank])
            outputs.append(base + F.linear(low, b[part * s.I : (part + 1) * s.I]) * 2.0)
        return torch.cat(outputs, 1)

    return Case("lora_linear", (leaf(s.T, s.H), leaf(2 * s.rank, s.H), leaf(2 * s.I, s.rank)), run, plain)
