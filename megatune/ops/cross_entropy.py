"""Cross-entropy, of given logits or with the head's projection in one op: then the logits of all tokens never exist at
once. Gradients are made in the forward pass, in the memory of the logits; backward scales them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.comm import all_gather
from megatune.ops.cross_entropy_rows import IGNORED, ROWS_OP, SPLIT_OP

# Logits in one chunk, unless the caller says how many rows: 128 MiB in bf16 on a CPU, 896 MiB elsewhere, where small
# products do not fill the device and each chunk reads and writes the weight's whole fp32 gradient.
CHUNK_LOGITS = {"cpu": 2**26}
CHUNK_LOGITS_ELSEWHERE = 7 * 2**26
CHUNK_STEP = 128  # rows
# What a product's result is cut into by cuBLAS, a tile a multiprocessor at a time, of which an H100 and an H200 have
# 132: processes that share a vocabulary must agree, whatever they run on.
TILES = ((256, 128), (192, 192), (320, 128), (128, 192))
PROCESSORS = 132
# A chunk's share of the weight's gradient takes about as much longer as so many rows more of another product, however
# few rows it has: its fp32 sums are read and written whole.
ADDING_ROWS = 400
# Elements of a temporary: those of a product that is added to fp32, and those that are narrowed.
PIECE = 2**24


@dataclass(frozen=True, eq=False)
class VocabCut:
    """A vocabulary of `size` rows whose rows from `first` on are here, the others in the other processes of `group`;
    all call at the same time, with the same rows and labels."""

    first: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, eq=False)
class _Loss:
    """Which loss is computed from logits, and whether from some columns of them."""

    softcap: float
    z_loss: float
    smoothing: float
    ignore: int
    cut: VocabCut | None

    def rows(self, logits: Tensor, labels: Tensor, weights: Tensor | None, write_grad: bool) -> Tensor:
        """Losses [rows] of logits [rows, V (here)]; with write_grad the logits become their gradient."""
        options = (weights, self.z_loss, self.smoothing, self.ignore)
        if self.cut is not None:
            return self._split_rows(logits, labels, write_grad, self.cut, options)
        body = ROWS_OP.pick(logits.device.type, logits.dtype)
        return body.run[0](logits, labels, self.softcap, write_grad, *options)

    def _split_rows(
        self, logits: Tensor, labels: Tensor, write_grad: bool, cut: VocabCut, options: tuple
    ) -> Tensor:
        """Three numbers a row are sent, four with label smoothing."""
        sums, join, grad = SPLIT_OP.pick(logits.device.type, logits.dtype).run
        where = (cut.first, cut.size, self.softcap)
        mine = sums(logits, labels, *where, self.smoothing > 0, self.ignore)
        size = dist.get_world_size(cut.group)
        everyone = mine.new_empty(size * mine.shape[0], mine.shape[1])
        all_gather(everyone, mine, group=cut.group)
        losses, joined = join(everyone.view(size, *mine.shape), labels, cut.size, *options)
        if write_grad:
            grad(logits, labels, *where, joined, *options)
        return losses


def _scaled(saved: Tensor | None, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """saved * factor in dtype (None: saved's), in saved's own memory if nobody will ask for it again: it may be the
    head's whole gradient."""
    if saved is None:
        return None
    dtype = dtype or saved.dtype
    if torch.compiler.is_compiling():
        return (saved * factor).to(dtype)
    scale = ROWS_OP.pick(saved.device.type, saved.dtype).run[1]
    if _graph_is_kept():
        out = torch.empty_like(saved, dtype=dtype)
    elif dtype != saved.dtype:
        return _narrowed(saved, dtype, lambda out, wide: scale(out, wide, factor))
    else:
        out = saved
    scale(out, saved, factor)
    return out


def _graph_is_kept() -> bool:
    """Whether the backward pass under way may be followed by another over the same graph."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _CrossEntropy(torch.autograd.Function):
    """logits [S, V], labels [S] -> scalar. Saved: the logits' memory, which holds their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, loss: _Loss, train: bool
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] and train
        losses = loss.rows(logits, labels, weights, wanted)
        if wanted:
            torch.autograd.graph.increment_version(logits)  # whoever saved the logits for backward is told
            ctx.save_for_backward(logits.detach())
        return _total(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return _scaled(saved, grad), None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [S, H], weight [V, H], labels [S] -> scalar. Saved: the gradients, of hidden (and of the weight if it is
    trained, as it was summed, in fp32), so that backward only scales and rounds them: three matrix products instead of
    four."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        loss: _Loss,
        chunk: int,
        train: bool,
    ) -> Tensor:
        grads_wanted = tuple(wanted and train for wanted in ctx.needs_input_grad[:2])
        total, *grads = _forward(hidden, weight, labels, weights, loss, chunk, *grads_wanted)
        ctx.save_for_backward(*grads)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = _scaled(grad_hidden, grad), _scaled(grad_weight, grad, ctx.weight_dtype)
        return *scaled, None, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    loss: _Loss,
    chunk: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, gradient of hidden or None, gradient of weight or None: in the weight's dtype or wider)."""
    head = weight.to(hidden.dtype)
    grad_hidden = torch.empty_like(hidden) if hidden_grad else None
    total = None  # gradient of the weight, summed over chunks in fp32
    losses = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))
    buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        rows = hidden[part]
        logits = torch.mm(rows, head.t(), out=buffer[: rows.shape[0]])
        some = None if weights is None else weights[part]
        losses[part] = loss.rows(logits, labels[part], some, hidden_grad or weight_grad)
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[part])
        if (
            weight_grad
            and hidden.shape[0] <= chunk
            and not (_adds_to_fp32(rows) and weight.dtype != rows.dtype)
        ):
            total = logits.t() @ rows
        elif weight_grad:
            total = _add_product(total, logits, rows)
    if weight_grad and total is None:
        total = torch.zeros_like(weight)
    return _total(losses), grad_hidden, total


def _total(losses: Tensor) -> Tensor:
    """Losses of rows [rows] -> their sum, in their dtype: one number of which nothing averages the error away."""
    return losses.sum(dtype=torch.float64).to(losses.dtype)


def _adds_to_fp32(rows: Tensor) -> bool:
    """Whether PyTorch has a product of tensors like these that adds to fp32: on CUDA, of 16 bit numbers."""
    is_low = rows.dtype in (torch.bfloat16, torch.float16)
    return is_low and rows.is_cuda and not torch.compiler.is_compiling()


def _add_product(total: Tensor | None, grad_logits: Tensor, rows: Tensor) -> Tensor:
    """total (None: 0) + grad_logits^T @ rows, [V, H] in fp32 (fp64 for fp64), with no temporary of that size."""
    wide, columns = accumulate_dtype(rows.dtype), grad_logits.t()
    if wide == rows.dtype:
        return columns @ rows if total is None else total.addmm_(columns, rows)
    if _adds_to_fp32(rows):
        if total is None:
            return torch.mm(columns, rows, out_dtype=wide)
        return torch.addmm(total, columns, rows, out_dtype=wide, out=total)
    first = total is None
    if total is None:
        total = rows.new_empty((columns.shape[0], rows.shape[1]), dtype=wide)
    step = max(1, PIECE // max(1, rows.shape[1]))
    for start in range(0, columns.shape[0], step):
        into, product = total[start : start + step], columns[start : start + step] @ rows
        if first:
            into.copy_(product)
        else:
            into.add_(product)
    return total


def _narrowed(wide: Tensor, dtype: torch.dtype, scale: Callable[[Tensor, Tensor], None]) -> Tensor:
    """wide, contiguous, in dtype, by scale(out, part of wide). A dtype of half the size is written over it: a copy
    beside a head's fp32 gradient would be the largest thing there. Each piece is as long as all before it together, so
    that it is written where everything has been read."""
    if 2 * dtype.itemsize != wide.dtype.itemsize:
        out = torch.empty_like(wide, dtype=dtype)
        scale(out, wide)
        return out
    flat, count = wide.view(1, -1), wide.numel()
    narrow = flat.view(dtype)[:, :count]
    done = min(PIECE, count)
    first = torch.empty_like(flat[:, :done], dtype=dtype)
    scale(first, flat[:, :done])
    narrow[:, :done] = first
    while done < count:
        end = min(2 * done, count)
        scale(narrow[:, done:end], flat[:, done:end])
        done = end
    return narrow.view(wide.shape)


def _chunk(device_type: str, rows: int, columns: int, width: int) -> int:
    """Rows whose logits exist at the same time, of `rows` rows with `columns` logits and a hidden size of `width`."""
    most = max(1, CHUNK_LOGITS.get(device_type, CHUNK_LOGITS_ELSEWHERE) // max(1, columns))
    if rows <= most or most < CHUNK_STEP or device_type in CHUNK_LOGITS:
        return most

    def cost(chunk: int) -> int:
        whole, rest = divmod(rows, chunk)
        chunks = whole + (rest > 0)
        return (
            whole * _tile_time(chunk, width)
            + _tile_time(rest, width)
            + chunks * ADDING_ROWS * width // PROCESSORS
        )

    largest = most - most % CHUNK_STEP
    return min(range(largest, largest // 2, -CHUNK_STEP), key=cost)


def _tile_time(rows: int, columns: int) -> int:
    """Elements that the busiest multiprocessor computes of a result [rows, columns], with the best tile: a product of
    few rows and many summands, such as hidden's gradient, may end with nearly idle multiprocessors."""
    return min(
        -(-(-(-rows // high) * -(-columns // wide)) // PROCESSORS) * high * wide for high, wide in TILES
    )


def _checked(
    op: str,
    labels: Tensor,
    rows: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    token_weights: Tensor | None,
    cut: VocabCut | None,
) -> _Loss:
    """The loss asked for. ValueError for what an op of this file must not be given."""
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels {labels.dtype} {tuple(labels.shape)} must be int64 [{rows}]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap ({softcap}) must be positive")
    if z_loss < 0 or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"{op}: z_loss ({z_loss}) must be at least 0 and label_smoothing ({label_smoothing}) in [0, 1)"
        )
    if token_weights is not None:
        if token_weights.shape != (rows,) or token_weights.dtype != torch.float32:
            raise ValueError(
                f"{op}: token_weights {token_weights.dtype} {tuple(token_weights.shape)} must be float32 [{rows}]"
            )
        if token_weights.requires_grad:
            raise ValueError(f"{op}: token_weights get no gradient; give token_weights.detach()")
    return _Loss(softcap or 0.0, float(z_loss), float(label_smoothing), ignore_index, cut)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    token_weights: Tensor | None = None,
    cut: VocabCut | None = None,
) -> Tensor:
    """Sum over rows of weight * (-log softmax(cap(logits))[label] + z_loss * logsumexp(cap(logits))^2).

    logits [S, V], rows at any distance, labels int64 [S], each in [0, V) or `ignore_index` (such rows have no loss)
    -> scalar, fp32 (fp64 for fp64 logits). **Where the logits need a gradient it takes their place**, in this call: do
    not read them afterwards. The options are those of `linear_cross_entropy`; with `cut` the logits are some columns
    [S, V here]. ValueError where shapes, dtypes, devices or layouts do not fit.
    """
    op = "cross_entropy"
    if logits.dim() != 2 or logits.shape[1] == 0 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"{op}: logits {tuple(logits.shape)} with strides {logits.stride()} must be [S, V], V at least 1, each row "
            "contiguous"
        )
    loss = _checked(
        op, labels, logits.shape[0], softcap, z_loss, label_smoothing, ignore_index, token_weights, cut
    )
    floating(op, logits=logits)
    same_device(op, logits, labels=labels, token_weights=token_weights)
    train = torch.is_grad_enabled()
    if train and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            f"{op}: logits must not be a leaf that requires grad, as they are overwritten; give logits.clone()"
        )
    weights = None if token_weights is None else token_weights.contiguous()
    return _CrossEntropy.apply(logits, labels.contiguous(), weights, loss, train)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    token_weights: Tensor | None = None,
    chunk: int | None = None,
    cut: VocabCut | None = None,
) -> Tensor:
    """Sum over rows of weight * (-log softmax(cap(hidden @ weight^T))[label] + z_loss * logsumexp^2).

    hidden [S, H] (the scored rows only), weight [V, H], labels int64 [S], each in [0, V) or `ignore_index` (such rows
    have no loss) -> scalar, fp32 (fp64 for fp64 inputs). Products in hidden's dtype, softmax and sums in fp32.
    `softcap`: logits become cap * tanh(logit / cap). `label_smoothing`: this share of the target is spread evenly over
    the vocabulary. `token_weights`: fp32 [S], each row's loss is multiplied by its own. `chunk`: rows whose logits
    exist at the same time (default: by memory). The gradients are computed in the forward pass, for what requires them
    and where autograd is on.

    `cut`: the weight is some rows [V here, H] of a larger vocabulary, and labels are in that one. Every process gets
    the whole loss; its gradient of hidden is the part that comes from its rows (the sum over the group is the whole),
    and logits are never gathered. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [S, H], [V, H], V at least 1"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk ({chunk}) must be positive")
    loss = _checked(
        op, labels, hidden.shape[0], softcap, z_loss, label_smoothing, ignore_index, token_weights, cut
    )
    floating(op, hidden=hidden, weight=weight)
    same_device(op, hidden, weight=weight, labels=labels, token_weights=token_weights)
    if chunk is None:
        # The same everywhere, though some have fewer rows of the weight than others.
        columns = weight.shape[0] if cut is None else cut.size // dist.get_world_size(cut.group)
        chunk = _chunk(hidden.device.type, hidden.shape[0], columns, hidden.shape[1])
    weights = None if token_weights is None else token_weights.contiguous()
    return _LinearCrossEntropy.apply(
        hidden, weight, labels.contiguous(), weights, loss, chunk, torch.is_grad_enabled()
    )
