"""What the op benchmarks time: every op at the sizes of three models, and what people write for it in plain PyTorch.

A new op is one function here, `@case(MODEL, ..)`, that makes a `Case`; other libraries' kernels for it are in
`ops_rivals`, how time and limits are taken in `ops_timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatune import ops
from megatune.ops import LoraLayout, Segments, moe, quant
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
    trained: tuple[int, ...] = ()  # elements of each tensor that an optimizer updates here

    @property
    def mlp_rows(self) -> int:
        return self.T * self.choices


LAYER_8B = (6144 * 4096, 4096 * 4096, 28672 * 4096, 4096 * 14336, 4096, 4096)
MODELS = {
    "llama-8b": Sizes(16384, 4096, 14336, 32, 8, 128, 128256, document=4096, trained=LAYER_8B),
    "qwen3-30b-a3b": Sizes(16384, 2048, 768, 32, 4, 128, 151936, document=4096, experts=128, choices=8),
    "llama-70b-tp8": Sizes(16384, 8192, 3584, 8, 1, 128, 16032, document=4096),
}
SMOLLM2_135M = Sizes(1024, 576, 1536, 9, 3, 64, 49152, document=256)
_TINY = {"T": 24, "H": 16, "I": 24, "Q": 4, "K": 2, "D": 8, "V": 40, "document": 8, "rank": 2}
TINY = {
    "llama-8b": Sizes(**_TINY, trained=(300, 7)),
    "qwen3-30b-a3b": Sizes(**_TINY, experts=5, choices=2),
    "llama-70b-tp8": Sizes(**_TINY),
}


@dataclass(frozen=True)
class Work:
    """The least that must be done: `size` bytes moved (each input read once, each output written once), or `flops`.
    `products`: matrix products (kind, m, n, k) whose time, measured bare, is the limit; without them, and with flops,
    the limit is the rate of a large product."""

    size: float = 0
    flops: float = 0
    products: tuple[tuple[str, int, int, int], ...] = ()


@dataclass(frozen=True)
class Other:
    """Another implementation of a case. `prepare` (not timed) makes its inputs from the case's, `same` (not timed) the
    case's outputs from its own; both are differentiable."""

    run: Callable[..., Any]
    prepare: Callable[[Tensors], Tensors] = lambda leaves: leaves
    same: Callable[[Any], Any] = lambda output: output


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


Maker = Callable[[Sizes, New], Case]
CASES: list[tuple[tuple[str, ...], Maker]] = []


def case(*models: str) -> Callable[[Maker], Maker]:
    """Registers a case for some models, None: for all of them."""

    def register(maker: Maker) -> Maker:
        CASES.append((models or tuple(MODELS), maker))
        return maker

    return register


def cases(model: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterable[Case]:
    """The cases of a model, in the order of this file; each is made when its turn comes."""
    for models, maker in CASES:
        if model in models:
            yield maker(sizes, New(dtype, device))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@case()
def rms_norm(s: Sizes, new: New) -> Case:
    size = s.T * s.H * new.width
    return Case(
        "rms_norm",
        f"{s.T} x {s.H}",
        lambda: (new.leaf(s.T, s.H), new.leaf(s.H)),
        lambda x, weight: ops.rms_norm(x, weight, 1e-5),
        Other(plain_norm),
        Work(2 * size),
        Work(3 * size),
    )


@case()
def add_rms_norm(s: Sizes, new: New) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensors:
        total = x + residual
        return total, plain_norm(total, weight)

    size = s.T * s.H * new.width
    return Case(
        "add_rms_norm",
        f"{s.T} x {s.H}",
        lambda: (new.leaf(s.T, s.H), new.leaf(s.T, s.H), new.leaf(s.H)),
        lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, 1e-5),
        Other(plain),
        Work(4 * size),
        Work(4 * size),
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
    )


@case()
def rope(s: Sizes, new: New) -> Case:
    segments = Segments.from_lengths([s.document] * (s.T // s.document), new.device)
    angle = segments.positions[:, None] / 10000 ** (torch.arange(s.D // 2, device=new.device) * 2 / s.D)
    cos, sin = angle.cos().float(), angle.sin().float()
    whole_cos, whole_sin = (torch.cat((part, part), -1).to(new.dtype) for part in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        """As transformers' apply_rotary_pos_emb."""
        shape = (s.T, *(1,) * (x.dim() - 2), s.D)
        first, second = x.chunk(2, -1)
        return x * whole_cos.view(shape) + torch.cat((-second, first), -1) * whole_sin.view(shape)

    size = 2 * s.T * (s.Q + s.K) * s.D * new.width + cos.nbytes + sin.nbytes
    return Case(
        "rope",
        f"{s.T} x ({s.Q} + {s.K}) heads of {s.D}, in qkv",
        lambda: _heads(s, new),
        lambda q, k: (ops.rope(q, cos, sin), ops.rope(k, cos, sin)),
        Other(lambda q, k: (turned(q), turned(k))),
        Work(size),
        Work(size),
        facts={"cos": whole_cos, "sin": whole_sin},
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


@case()
def linear_cross_entropy(s: Sizes, new: New) -> Case:
    labels = new.whole(s.V, s.T)
    products = (("NT", s.T, s.V, s.H), ("NN", s.T, s.H, s.V), ("TN", s.V, s.H, s.T))
    return Case(
        "linear_cross_entropy",
        f"{s.T} x {s.H} x {s.V}",
        lambda: (new.leaf(s.T, s.H), new.leaf(s.V, s.H, scale=0.02)),
        lambda x, head: ops.linear_cross_entropy(x, head, labels),
        Other(lambda x, head: F.cross_entropy((x @ head.t()).float(), labels, reduction="sum")),
        Work(flops=6 * s.T * s.H * s.V, products=products),
        joint=True,
        facts={"labels": labels},
        compiled=False,  # takes as much memory as eager and its product's time
    )


@case("llama-8b")
def lora_linear(s: Sizes, new: New) -> Case:
    """The fused gate and up projection with adapters on both; plain: both by themselves, as peft has them."""
    weight = new.normal(2 * s.I, s.H, scale=0.02)
    layout = LoraLayout.of((("gate", 1), ("up", 1)), s.I, ["gate", "up"])

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        outputs = []
        for part in range(2):
            base = F.linear(x, weights[part])
            low = F.linear(x, a[part * s.rank : (part + 1) * s.rank])
            outputs.append(base + F.linear(low, b[part * s.I : (part + 1) * s.I]) * 2.0)
        return torch.cat(outputs, 1)

    weights = weight[0::2].contiguous(), weight[1::2].contiguous()
    low = 2 * s.T * s.rank * (2 * s.H + 2 * s.I)
    product = 2 * s.T * s.H * 2 * s.I
    return Case(
        "lora_linear",
        f"{s.T} x {s.H} x {2 * s.I}, rank {s.rank}",
        lambda: (
            new.leaf(s.T, s.H),
            new.leaf(2 * s.rank, s.H, scale=0.1),
            new.leaf(2 * s.I, s.rank, scale=0.1),
        ),
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, layout, 2.0),
        Other(
            plain,
            prepare=lambda leaves: (*leaves[:2], torch.cat((leaves[2][0::2], leaves[2][1::2]))),
            same=lambda out: torch.stack(out.chunk(2, 1), -1).flatten(1),
        ),
        Work(flops=product + low, products=(("NT", s.T, 2 * s.I, s.H),)),
        Work(flops=product + 2 * low, products=(("NN", s.T, s.H, 2 * s.I),)),
        compiled=False,
    )


@case("llama-8b")
def embedding(s: Sizes, new: New) -> Case:
    tokens = new.whole(s.V, s.T)
    rows = s.T * s.H * new.width
    return Case(
        "embedding",
        f"{s.T} of {s.V} x {s.H}",
        lambda: (new.leaf(s.V, s.H),),
        lambda weight: ops.embedding(tokens, weight),
        Other(lambda weight: F.embedding(tokens, weight)),
        Work(2 * rows),
        Work(rows + s.V * s.H * new.width),
    )


def _order(s: Sizes, new: New) -> moe.Order:
    experts = torch.rand(s.T, s.experts, device=new.device).topk(s.choices).indices
    return moe.sort_by_expert(experts, s.experts)


@case("qwen3-30b-a3b")
def moe_permute(s: Sizes, new: New) -> Case:
    order = _order(s, new)
    tokens = order.tokens
    size = s.T * s.H * new.width
    return Case(
        "moe_permute",
        f"{s.T} x {s.H}, {s.choices} of {s.experts} experts",
        lambda: (new.leaf(s.T, s.H),),
        lambda x: moe.permute(x, order),
        Other(lambda x: x.index_select(0, tokens)),
        Work((1 + s.choices) * size),
        Work((1 + s.choices) * size),
        registry="expert_rows",
    )


@case("qwen3-30b-a3b")
def moe_combine(s: Sizes, new: New) -> Case:
    order = _order(s, new)
    place = order.place

    def plain(rows: Tensor, weights: Tensor) -> Tensor:
        picked = rows.index_select(0, place.flatten()).view(s.T, s.choices, s.H)
        return (picked * weights[:, :, None]).sum(1).to(rows.dtype)

    size = s.T * s.H * new.width
    return Case(
        "moe_combine",
        f"{s.mlp_rows} x {s.H}, {s.choices} of {s.experts} experts",
        lambda: (
            new.leaf(s.mlp_rows, s.H),
            torch.rand(s.T, s.choices, device=new.device).requires_grad_(),
        ),
        lambda rows, weights: moe.combine(rows, weights, order),
        Other(plain),
        Work((1 + s.choices) * size),
        Work((1 + 2 * s.choices) * size),
        registry="expert_rows",
    )


@case("qwen3-30b-a3b")
def grouped_linear(s: Sizes, new: New) -> Case:
    groups = _order(s, new).groups
    slices = groups.slices()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([x[rows] @ weight[expert].t() for expert, rows in slices])

    return Case(
        "grouped_linear",
        f"{s.mlp_rows} x {s.H} x {2 * s.I}, {s.experts} experts",
        lambda: (new.normal(s.mlp_rows, s.H), new.normal(s.experts, 2 * s.I, s.H, scale=0.02)),
        lambda x, weight: moe.grouped_linear(x, weight, None, groups),
        Other(plain),
        Work(flops=4 * s.mlp_rows * s.H * s.I, products=(("NT", s.mlp_rows, 2 * s.I, s.H),)),
        compiled=False,
    )


_STEP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "step": 10}


@case("llama-8b")
def adamw(s: Sizes, new: New) -> Case:
    """fp32 gradients, moments and masters, the new weights in bf16, a clip factor on the device: 30 bytes."""
    count = len(s.trained)
    decays = [0.1] * count

    def make() -> Tensors:
        def lists(dtype: torch.dtype) -> list[Tensor]:
            return [new.normal(size, dtype=dtype, scale=0.1) for size in s.trained]

        masters, moments, grads = (lists(torch.float32) for _ in range(3))
        squares = [torch.rand(size, device=new.device) for size in s.trained]
        scale = torch.full((), 0.7, device=new.device)
        return (*masters, *moments, *squares, *grads, *lists(torch.bfloat16), scale)

    def run(*leaves: Tensor) -> list[Tensor]:
        parts = [list(leaves[i * count : (i + 1) * count]) for i in range(5)]
        ops.adamw_(*parts[:4], weights=parts[4], scale=leaves[-1], decays=decays, **_STEP)
        return [*parts[0], *parts[1], *parts[2], *parts[4]]

    def plain(*leaves: Tensor) -> list[Tensor]:
        """torch's fused kernel, with the clipping before and the copy after it."""
        masters, moments, squares, grads, weights = (
            list(leaves[i * count : (i + 1) * count]) for i in range(5)
        )
        torch._foreach_mul_(grads, leaves[-2])
        torch._fused_adamw_(
            masters, grads, moments, squares, [], [leaves[-1]] * count, lr=_STEP["lr"], beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=_STEP["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        torch._foreach_copy_(weights, masters)
        return [*masters, *moments, *squares, *weights]

    steps = torch.full((), float(_STEP["step"]), device=new.device)
    return Case(
        "adamw",
        f"{sum(s.trained)} elements in {count} tensors",
        make,
        run,
        Other(plain, prepare=lambda leaves: (*leaves, steps)),
        Work(30 * sum(s.trained)),
        plain_name="torch fused, clip, copy",
        compiled=False,
    )


@case("llama-8b")
def square_sum(s: Sizes, new: New) -> Case:
    def plain(*grads: Tensor) -> Tensor:
        return torch.nn.utils.get_total_norm(grads).square()

    return Case(
        "square_sum",
        f"{sum(s.trained)} elements in {len(s.trained)} tensors",
        lambda: tuple(new.normal(size, dtype=torch.float32) for size in s.trained),
        lambda *grads: ops.square_sum(grads)[0],
        Other(plain),
        Work(4 * sum(s.trained)),
        plain_name="torch foreach norm",
        compiled=False,
    )


@case("llama-8b")
def nf4_dequantise(s: Sizes, new: New) -> Case:
    shape = (2 * s.I, s.H)
    code = torch.tensor(quant.NF4, device=new.device)

    def plain(packed: Tensor, scales: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
        numbers = code[torch.stack((packed >> 4, packed & 15), -1).int()].view(-1, quant.BLOCK)
        return (numbers * quant.nf4_scales(scales, nested, offset)[:, None]).to(new.dtype).view(shape)

    elements = shape[0] * shape[1]
    return Case(
        "nf4_dequantise",
        f"{shape[0]} x {shape[1]}",
        lambda: quant.quantise_nf4(new.normal(*shape, scale=0.02)),
        lambda *parts: quant.dequantise_nf4(*parts, shape, new.dtype),
        Other(plain),
        Work(elements * (new.width + 0.5 + 1 / quant.BLOCK)),
        facts={"shape": shape, "dtype": new.dtype},
    )


@case("llama-8b", "qwen3-30b-a3b")
def attention(s: Sizes, new: New) -> Case:
    """Documents of one length, so that PyTorch can have them as a batch."""
    documents = s.T // s.document
    segments = Segments.from_lengths([s.document] * documents, new.device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (part.unflatten(0, (documents, s.document)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    flops = 2 * documents * s.document**2 * s.Q * s.D
    return Case(
        "attention",
        f"{documents} x {s.document}, {s.Q} / {s.K} heads of {s.D}",
        lambda: (new.leaf(s.T, s.Q, s.D), new.leaf(s.T, s.K, s.D), new.leaf(s.T, s.K, s.D)),
        lambda q, k, v: ops.attention(q, k, v, segments, scale=s.D**-0.5),
        Other(plain),
        Work(flops=flops),
        Work(flops=2.5 * flops),
        plain_name="torch SDPA, one batch",
        compiled=False,
    )
