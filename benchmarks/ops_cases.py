"""What the op benchmarks time: every op at the sizes of three models, and what people write for it in plain PyTorch.

A new op is one function, `@case(MODEL, ..)`, that makes a `Case`: here norms, rotations and gated units, the others in
`ops_cases_*`. Other libraries' kernels are in `ops_rivals`, how time and limits are taken in `ops_timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatune import ops
from megatune.ops import Segments
from megatune.ops.glu import Activation

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """T tokens, H hidden, I mlp size (of one expert), Q query heads, K KV heads, D head size, V vocabulary."""

    T: int
    H: int
    I: int  # noqa: E741
    Q: int
    K: int
    D: int
    V: int
    document: int  # tokens in each document
    rank: int = 16
    experts: int = 0
    choices: int = 1  # experts of each token
    tp: int = (
        1  # processes that share the layers: Q, K, I and V are one's part, and between layers T / tp tokens
    )
    trained: tuple[int, ...] = ()  # elements of each tensor that an optimizer updates here

    @property
    def mlp_rows(self) -> int:
        return self.T * self.choices

    @property
    def stream(self) -> int:
        """Tokens of the stream that a process has between the layers."""
        return self.T // self.tp

    @property
    def qkv(self) -> int:
        """Rows of the fused projection."""
        return (self.Q + 2 * self.K) * self.D


LAYER_8B = (6144 * 4096, 4096 * 4096, 28672 * 4096, 4096 * 14336, 4096, 4096)
MODELS = {
    "llama-8b": Sizes(16384, 4096, 14336, 32, 8, 128, 128256, document=4096, trained=LAYER_8B),
    "qwen3-30b-a3b": Sizes(
        16384,
        2048,
        768,
        32,
        4,
        128,
        151936,
        document=4096,
        experts=128,
        choices=8,
        # One of eight processes that share the experts.
        trained=(
            5120 * 2048,
            2048 * 4096,
            16 * 1536 * 2048,
            16 * 2048 * 768,
            128 * 2048,
            2048,
            2048,
            128,
            128,
        ),
    ),
    "llama-70b-tp8": Sizes(
        16384,
        8192,
        3584,
        8,
        1,
        128,
        16032,
        document=4096,
        tp=8,
        trained=(1280 * 8192, 8192 * 1024, 7168 * 8192, 8192 * 3584, 8192, 8192),
    ),
}
SMOLLM2_135M = Sizes(1024, 576, 1536, 9, 3, 64, 49152, document=256)
_TINY = {
    "T": 32,
    "H": 128,
    "I": 128,
    "Q": 4,
    "K": 2,
    "D": 32,
    "V": 48,
    "document": 8,
    "rank": 2,
    "trained": (300, 7),
}
TINY = {
    "llama-8b": Sizes(**_TINY),
    "qwen3-30b-a3b": Sizes(**_TINY, experts=5, choices=2),
    "llama-70b-tp8": Sizes(**_TINY | {"V": 24}, tp=2),
}


@dataclass(frozen=True)
class Work:
    """The least that must be done: `size` bytes moved (each input read once, each output written once), or `flops`.
    `products`: matrix products (kind, m, n, k) whose time, measured bare, is the limit; without them, and with flops,
    the limit is the rate of a large product. `operands(*inputs)`: what these products multiply, where that is unlike
    random numbers."""

    size: float = 0
    flops: float = 0
    products: tuple[tuple[str, int, int, int], ...] = ()
    operands: Callable[..., Sequence[tuple[Tensor, Tensor]]] | None = None


@dataclass(frozen=True)
class Other:
    """Another implementation of a case. `prepare` (not timed) makes its inputs from the case's, `same` (not timed) the
    case's outputs from its own; both are differentiable."""

    run: Callable[..., Any]
    prepare: Callable[[Tensors], Tensors] = lambda leaves: leaves
    same: Callable[[Any], Any] = lambda output: output
    graph: bool = True  # whether a CUDA graph would hold all that it does


@dataclass(frozen=True)
class Case:
    """One op at one size. `make`: a set of inputs with new numbers. `run(*inputs)`: ours, a tensor or several."""

    op: str
    shape: str
    make: Callable[[], Tensors]
    run: Callable[..., Any]
    plain: Other | None
    forward: Work
    backward: Work | None = None  # None: no input has a gradient
    joint: bool = (
        False  # forward and backward are one measurement: some compute gradients in the forward pass
    )
    registry: str = (
        ""  # op in megatune.ops.OPS whose bodies are compared; "": that of the same name, if there is one
    )
    targets: tuple[float | None, float | None] = (
        0.88,
        0.88,
    )  # shares that forward (or both), backward shall reach
    dtype: torch.dtype | None = None  # by which the body is chosen; None: the benchmark's
    facts: dict[str, Any] = field(default_factory=dict)  # what rivals need to know
    plain_name: str = "torch eager"
    compiled: bool = True  # `plain` through torch.compile is a rival too


@dataclass(frozen=True)
class New:
    """Makes inputs."""

    dtype: torch.dtype
    device: str

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).mul_(scale)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale).requires_grad_()

    def whole(self, top: int, *shape: int) -> Tensor:
        return torch.randint(top, shape, device=self.device)

    @property
    def width(self) -> int:
        return self.dtype.itemsize


Maker = Callable[..., Case]
CASES: list[tuple[tuple[str, ...], str, Maker]] = []  # (models, op, what makes its case)


def case(*models: str, variants: Mapping[str, tuple[Any, ...]] | None = None) -> Callable[[Maker], Maker]:
    """Registers a case for some models (none named: for all), the function's name being its op's; `variants`: one for
    each name, made with these arguments more."""

    def register(maker: Maker) -> Maker:
        for op, more in (variants or {maker.__name__: ()}).items():
            named = (lambda s, new, op=op, more=more: maker(s, new, op, *more)) if variants else maker
            CASES.append((models or tuple(MODELS), op, named))
        return maker

    return register


def makers(
    model: str, sizes: Sizes, dtype: torch.dtype, device: str
) -> Iterable[tuple[str, Callable[[], Case]]]:
    """(op, what makes the case) of a model, in the order of the files."""
    for models, op, maker in CASES:
        if model in models:
            yield op, lambda maker=maker: maker(sizes, New(dtype, device))


NORMS = (0.88, 0.80)
NO_TARGETS = (None, None)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@case()
def rms_norm(s: Sizes, new: New) -> Case:
    size = s.stream * s.H * new.width
    return Case(
        "rms_norm",
        f"{s.stream} x {s.H}",
        lambda: (new.leaf(s.stream, s.H), new.leaf(s.H)),
        lambda x, weight: ops.rms_norm(x, weight, 1e-5),
        Other(plain_norm),
        Work(2 * size),
        Work(3 * size),
        targets=NORMS,
    )


@case()
def add_rms_norm(s: Sizes, new: New) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensors:
        total = x + residual
        return total, plain_norm(total, weight)

    size = s.stream * s.H * new.width
    return Case(
        "add_rms_norm",
        f"{s.stream} x {s.H}",
        lambda: (new.leaf(s.stream, s.H), new.leaf(s.stream, s.H), new.leaf(s.H)),
        lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, 1e-5),
        Other(plain),
        Work(4 * size),
        Work(4 * size),
        targets=NORMS,
    )


def _heads(s: Sizes, new: New) -> Tensors:
    """(q [T, K, G, D], k [T, K, D]) as views of one fused projection, each a leaf."""
    group = s.Q // s.K
    qkv = new.normal(s.T, s.K, group + 2, s.D)
    return qkv[:, :, :group].requires_grad_(), qkv[:, :, group].requires_grad_()


@case("qwen3-30b-a3b")
def qk_norm(s: Sizes, new: New) -> Case:
    size = s.T * s.Q * s.D * new.width
    return Case(
        "qk_norm",
        f"{s.T} x {s.Q} heads of {s.D}, in qkv",
        lambda: (_heads(s, new)[0], new.leaf(s.D)),
        lambda q, weight: ops.rms_norm(q, weight, 1e-5),
        Other(plain_norm),
        Work(2 * size),
        Work(3 * size),
        registry="rms_norm",
        targets=NORMS,
    )


def angles(s: Sizes, new: New) -> Tensors:
    """(cos, sin), fp32 [T, D / 2], of packed documents."""
    segments = Segments.from_lengths([s.document] * (s.T // s.document), new.device)
    angle = segments.positions[:, None] / 10000 ** (torch.arange(s.D // 2, device=new.device) * 2 / s.D)
    return angle.cos().float(), angle.sin().float()


def turned_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' apply_rotary_pos_emb."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@case()
def rope(s: Sizes, new: New) -> Case:
    cos, sin = angles(s, new)
    whole_cos, whole_sin = (torch.cat((part, part), -1).to(new.dtype) for part in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        shape = (s.T, *(1,) * (x.dim() - 2), s.D)
        return turned_by(x, whole_cos.view(shape), whole_sin.view(shape))

    size = 2 * s.T * (s.Q + s.K) * s.D * new.width + cos.nbytes + sin.nbytes
    return Case(
        "rope",
        f"{s.T} x ({s.Q} + {s.K}) heads of {s.D}, in qkv",
        lambda: _heads(s, new),
        lambda q, k: ops.rope(q, k, cos, sin),
        Other(lambda q, k: (turned(q), turned(k))),
        Work(size),
        Work(size),
        facts={"cos": whole_cos, "sin": whole_sin},
    )


@case()
def rope_qk(s: Sizes, new: New) -> Case:
    """Queries and keys out of the fused projection in one op; with norms of heads for the model that has them."""
    normed, group = bool(s.experts), s.Q // s.K
    cos, sin = angles(s, new)
    whole_cos, whole_sin = (torch.cat((part, part), -1).to(new.dtype)[:, None] for part in (cos, sin))

    def plain(qkv: Tensor, *weights: Tensor) -> Tensors:
        q, k, v = qkv.split((group, 1, 1), 2)
        if weights:
            q, k = (plain_norm(x, weight) for x, weight in zip((q, k), weights, strict=True))
        q, k = (turned_by(x.flatten(1, 2), whole_cos, whole_sin) for x in (q, k))
        return q.unflatten(1, (s.K, group)), k, v.squeeze(2)

    head = s.T * s.K * s.D * new.width
    return Case(
        "rope_qk",
        f"{s.T} x {s.K} groups of {group} + 2 heads of {s.D}" + (", with norms" if normed else ""),
        lambda: (
            new.leaf(s.T, s.K, group + 2, s.D),
            *((new.leaf(s.D), new.leaf(s.D)) if normed else ()),
        ),
        lambda qkv, *weights: ops.rope_qk(qkv, cos, sin, *weights, eps=1e-5),
        Other(plain),
        Work(2 * head * (group + 1) + 2 * cos.nbytes),
        Work((3 if normed else 2) * head * (group + 1) + 2 * head + 2 * cos.nbytes),
    )


def halves(gate_up: Tensor) -> Tensor:
    """(gate0, up0, gate1, ..) -> (gate0, gate1, .. up0, up1, ..), the layout that others have."""
    return torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)


def _glu(s: Sizes, new: New, activation: Activation, name: str) -> Case:
    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    size = s.mlp_rows * s.I * new.width
    return Case(
        name,
        f"{s.mlp_rows} x {s.I}",
        lambda: (new.leaf(s.mlp_rows, 2 * s.I),),
        lambda x: ops.glu(x, activation),
        Other(plain, prepare=lambda leaves: (halves(*leaves),)),
        Work(3 * size),
        Work(5 * size),
        registry="glu",
    )


@case()
def swiglu(s: Sizes, new: New) -> Case:
    return _glu(s, new, "silu", "swiglu")


@case("llama-8b")
def geglu(s: Sizes, new: New) -> Case:
    return _glu(s, new, "gelu_tanh", "geglu")
