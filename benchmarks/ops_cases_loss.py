"""Cases of the op benchmark: losses, tables, linear layers with adapters or frozen weights of few bits, attention."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_cases import NO_TARGETS, Case, New, Other, Sizes, Work, case
from megatune import ops
from megatune.ops import FrozenWeight, LoraLayout, Segments, VocabCut, quant


class OneOfMany(dist.ProcessGroup):
    """A group of which this process is all: what it gathers is its own part. What is timed is a process's own work."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def size(self) -> int:
        return 1

    def all_gather_single(self, out: Tensor, x: Tensor, options: object = None) -> None:
        out.copy_(x)

    _allgather_base = all_gather_single  # its name before torch 2.13


def vocabulary_cut(s: Sizes) -> VocabCut | None:
    return VocabCut(0, s.V * s.tp, OneOfMany()) if s.tp > 1 else None


@case("llama-8b", "qwen3-30b-a3b")
def cross_entropy(s: Sizes, new: New) -> Case:
    """Of given logits, which become their gradient: read once, written once."""
    return _cross_entropy("cross_entropy", "linear_cross_entropy", 2, s, new)


@case("llama-70b-tp8")
def split_cross_entropy(s: Sizes, new: New) -> Case:
    """Of some columns of the logits: read once for the sums over all, read again and written."""
    return _cross_entropy("split_cross_entropy", "split_cross_entropy", 3, s, new)


def _cross_entropy(name: str, registry: str, passes: int, s: Sizes, new: New) -> Case:
    labels, cut = new.whole(s.V, s.T), vocabulary_cut(s)
    return Case(
        name,
        f"{s.T} x {s.V}" + (f" of {s.V * s.tp}" if cut else ""),
        lambda: (new.leaf(s.T, s.V),),
        lambda logits: ops.cross_entropy(logits.view_as(logits), labels, cut=cut),
        Other(lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")),
        Work(passes * s.T * s.V * new.width),
        joint=True,
        registry=registry,
        facts={"labels": labels},
    )


def head_operands(
    x: Tensor, head: Tensor, labels: Tensor, cut: VocabCut | None = None
) -> list[tuple[Tensor, Tensor]]:
    """What the products of a head [V, H] and its loss multiply, hidden states x [T, H] given: two of them the gradient
    of the logits, whose numbers are small and of any size."""
    x, head = x.detach(), head.detach()
    grad = torch.mm(x, head.t()).requires_grad_()
    ops.cross_entropy(grad.view_as(grad), labels, cut=cut)
    grad = grad.detach()
    return [(x, head.t()), (grad, head), (grad.t(), x)]


@case()
def linear_cross_entropy(s: Sizes, new: New) -> Case:
    labels, cut = new.whole(s.V, s.T), vocabulary_cut(s)
    chunk = s.T if cut else None  # what the default is where all processes of the group are there
    products = (("NT", s.T, s.V, s.H), ("NN", s.T, s.H, s.V), ("TN", s.V, s.H, s.T))
    return Case(
        "linear_cross_entropy",
        f"{s.T} x {s.H} x {s.V}" + (f" of {s.V * s.tp}" if cut else ""),
        lambda: (new.leaf(s.T, s.H), new.leaf(s.V, s.H, scale=0.02)),
        lambda x, head: ops.linear_cross_entropy(x, head, labels, cut=cut, chunk=chunk),
        Other(lambda x, head: F.cross_entropy((x @ head.t()).float(), labels, reduction="sum")),
        Work(
            flops=6 * s.T * s.H * s.V,
            products=products,
            operands=lambda x, head: head_operands(x, head, labels, cut),
        ),
        joint=True,
        registry="split_cross_entropy" if cut else "linear_cross_entropy",
        targets=(1 / 1.10, None),
        facts={"labels": labels},
        compiled=False,  # takes as much memory as eager and its product's time
    )


@case()
def embedding(s: Sizes, new: New) -> Case:
    """With a part of the table, tokens of the other parts are rows of zeros. A row of it counts as read once, however
    many tokens have it."""
    tokens, whole = new.whole(s.V * s.tp, s.T), s.V * s.tp
    here = tokens < s.V
    row = s.H * new.width
    named, found = tokens[here].unique().numel() * row, int(here.sum()) * row

    def plain(weight: Tensor) -> Tensor:
        if whole == s.V:
            return F.embedding(tokens, weight)
        return F.embedding(tokens.where(here, 0), weight) * here[:, None]

    return Case(
        "embedding",
        f"{s.T} of {s.V}" + (f" of {whole}" if whole > s.V else "") + f" x {s.H}",
        lambda: (new.leaf(s.V, s.H),),
        lambda weight: ops.embedding(tokens, weight, 0, whole),
        Other(plain),
        Work(named + s.T * row),
        Work(found + s.V * row),
    )


@case()
def lora_linear(s: Sizes, new: New) -> Case:
    """The fused gate and up projection, or (mixture of experts) the fused queries, keys and values, with adapters on
    all parts; plain: each by itself, as peft has them."""
    if s.experts:
        group = s.Q // s.K * s.D
        layout = LoraLayout.of((("q", group), ("k", s.D), ("v", s.D)), s.K, "qkv")
    else:
        layout = LoraLayout.of((("gate", 1), ("up", 1)), s.I, ["gate", "up"])
    weight = new.normal(layout.rows, s.H, scale=0.02)
    sizes = [rows for rows, _ in layout.parts]

    def cut(x: Tensor) -> list[Tensor]:
        """Rows of the parts."""
        return [part.flatten(0, 1) for part in x.unflatten(0, (layout.groups, -1)).split(sizes, 1)]

    def joined(out: Tensor) -> Tensor:
        """[T, parts one after the other] -> [T, as the weight has them]"""
        parts = out.split([layout.groups * rows for rows in sizes], 1)
        return torch.cat([part.unflatten(1, (layout.groups, -1)) for part in parts], 2).flatten(1)

    weights = [part.contiguous() for part in cut(weight)]

    def plain(x: Tensor, a: Tensor, *bs: Tensor) -> Tensor:
        outputs = []
        for number, (base, b) in enumerate(zip(weights, bs, strict=True)):
            low = F.linear(x, a[number * s.rank : (number + 1) * s.rank])
            outputs.append(F.linear(x, base) + F.linear(low, b) * 2.0)
        return torch.cat(outputs, 1)

    low = 2 * s.T * s.rank * (len(sizes) * s.H + layout.rows)
    product = 2 * s.T * s.H * layout.rows
    return Case(
        "lora_linear",
        f"{s.T} x {s.H} x {layout.rows}, rank {s.rank}",
        lambda: (
            new.leaf(s.T, s.H),
            new.leaf(len(sizes) * s.rank, s.H, scale=0.1),
            new.leaf(layout.rows, s.rank, scale=0.1),
        ),
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, layout, 2.0),
        Other(plain, prepare=lambda leaves: (*leaves[:2], *cut(leaves[2])), same=joined),
        Work(flops=product + low, products=(("NT", s.T, layout.rows, s.H),)),
        Work(flops=product + 2 * low, products=(("NN", s.T, s.H, layout.rows),)),
        targets=NO_TARGETS,
        compiled=False,
    )


@case("llama-8b")
def keyed_dropout(s: Sizes, new: New) -> Case:
    """Its mask is a function of rows and columns: nobody else makes the same."""
    size = s.T * s.H * new.width
    return Case(
        "keyed_dropout",
        f"{s.T} x {s.H}",
        lambda: (new.leaf(s.T, s.H),),
        lambda x: ops.keyed_dropout(x, 0.1, 12345),
        None,
        Work(2 * size),
        Work(2 * size),
    )


@case("llama-8b", "llama-70b-tp8", variants={"int8_linear": ("int8",), "nf4_linear": ("nf4",)})
def quantised_linear(s: Sizes, new: New, op: str, kind: quant.Kind) -> Case:
    """The limit is the product with the weight as it was, in the model's dtype: two or four times the memory."""
    rows, columns = 2 * s.I, s.H
    weight = FrozenWeight(kind, (rows, columns), new.dtype).to(new.device)
    weight.keep(new.normal(rows, columns, scale=0.02))
    return Case(
        op,
        f"{s.T} x {columns} x {rows}",
        lambda: (new.leaf(s.T, columns),),
        lambda x: ops.quantised_linear(x, weight),
        None,
        Work(flops=2 * s.T * rows * columns, products=(("NT", s.T, rows, columns),)),
        Work(flops=2 * s.T * rows * columns, products=(("NN", s.T, columns, rows),)),
        registry=f"{kind}_dequantise",
        targets=NO_TARGETS,
        facts={"weight": weight},
    )


@case("llama-8b", "llama-70b-tp8")
def int8_dequantise(s: Sizes, new: New) -> Case:
    def plain(numbers: Tensor, scales: Tensor) -> Tensor:
        return (numbers * scales[:, None] * quant._INT8_STEP).to(new.dtype)

    rows, columns = 2 * s.I, s.H
    return Case(
        "int8_dequantise",
        f"{rows} x {columns}",
        lambda: quant.quantise_int8(new.normal(rows, columns, scale=0.02)),
        lambda numbers, scales: quant.dequantise_int8(numbers, scales, new.dtype),
        Other(plain),
        Work(rows * columns * (new.width + 1)),
    )


@case("llama-8b", "llama-70b-tp8")
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


@case()
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
        targets=NO_TARGETS,
        plain_name="torch SDPA, one batch",
        compiled=False,
    )
