"""The feed-forward block as a mixture of experts: router, experts, balancing.

Legend: T tokens that are here, H hidden size, E experts, k choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatune import ops
from megatune.config.schema import MoEConfig
from megatune.models.mlp import GatedMLP
from megatune.models.recompute import recomputed
from megatune.models.spec import DecoderSpec, MoESpec
from megatune.ops import Segments
from megatune.ops import moe as moe_ops
from megatune.ops.checks import accumulate_dtype
from megatune.ops.moe import Groups
from megatune.parallel import deferred
from megatune.parallel.collectives import gather_rows, sum_
from megatune.parallel.expert import GroupedLinear, through_experts
from megatune.parallel.tensor import own_tokens
from megatune.parallel.world import World


@dataclass(frozen=True, eq=False)
class Choice:
    """`experts`: int64 [T, k]; `weights` and `probabilities` fp32 [T, k] and [T, E]: each row of probabilities adds up
    to 1 (softmax of the logits, or sigmoids divided by their sum)."""

    experts: Tensor
    weights: Tensor
    probabilities: Tensor


class Router(nn.Module):
    """x [T, H] -> the experts of each token and their weights, computed in fp32 whatever x's dtype.

    `weight` [E, H], `bias` [E] or None; `correction` [E] or None: fp32, added to the scores when experts are chosen,
    not to their weights; it has no gradient (`update_correction`). How scores, groups and weights are made:
    `MoESpec`; DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) for sigmoid scores and groups.
    """

    def __init__(self, spec: MoESpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        bias = nn.Parameter(torch.empty(spec.num_experts)) if spec.router_bias else None
        self.register_parameter("bias", bias)
        # A buffer: what makes parameters trainable or casts them must pass it by.
        correction = torch.zeros(spec.num_experts, dtype=torch.float32) if spec.correction else None
        self.register_buffer("correction", correction)

    def forward(self, x: Tensor) -> Choice:
        spec = self.spec
        logits = _Logits.apply(x, self.weight, self.bias)
        chosen = ops.route(
            logits,
            spec.top_k,
            score=spec.score,
            normalise=spec.normalise,
            scale=spec.scale,
            correction=self.correction,
            groups=spec.groups,
            groups_per_token=spec.groups_per_token,
        )
        return Choice(*chosen)


class _Logits(torch.autograd.Function):
    """x [T, H], weight [E, H], bias [E] -> fp32 [T, E], with fp32 products; x is saved in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.parameter = weight
        ctx.dtype = x.dtype
        wide = accumulate_dtype(x.dtype)
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if need_x else None
        grad_weight = None
        if need_weight:
            dtype = weight.dtype
            grad_weight = deferred.defer(ctx.parameter, lambda: (grad.t() @ x.to(grad.dtype)).to(dtype))
        return grad_x, grad_weight, grad.sum(0).to(weight.dtype) if need_bias else None


class Experts(nn.Module):
    """The experts that this process holds: rows [R, H] sorted by expert -> [R, H]."""

    def __init__(self, spec: DecoderSpec, world: World) -> None:
        super().__init__()
        moe, hidden = spec.moe, spec.hidden_size
        self.activation = spec.activation
        self.clamped = moe.clamped
        self.gate_up = GroupedLinear(
            moe.num_experts,
            hidden,
            moe.gate_up.rows,
            moe.expert_bias,
            shard="column",
            fused=moe.gate_up,
            world=world,
        )
        self.down = GroupedLinear(
            moe.num_experts, moe.expert_size, hidden, moe.expert_bias, shard="row", world=world
        )

    @property
    def drops_out(self) -> bool:
        """Whether adapters here have dropout now."""
        adapters = (self.gate_up.adapter, self.down.adapter)
        return self.training and any(one is not None and one.dropout > 0 for one in adapters)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        def gate(gate_up: Tensor) -> Tensor:
            return ops.clamped_glu(gate_up) if self.clamped else ops.glu(gate_up, self.activation)

        return recomputed(gate, lambda inner: self.down(inner, groups), self.gate_up(rows, groups))


class MoE(nn.Module):
    """x [T, H] -> [T, H], T the tokens that are here: each token's weighted sum of its experts, and the shared ones.

    `set_balance` says what keeps the experts' loads even: `aux_scale`, `capacity` and `counts_load`. Of a training
    step's backward passes: `last_aux`, the sum of the balancing losses (None before the first), and `load`, int64 [E],
    choices of each expert by the tokens that were here.
    """

    def __init__(self, spec: DecoderSpec, index: int, world: World | None = None) -> None:
        super().__init__()
        self.spec, self.index = spec.moe, index
        self.world = world or World.alone()
        self.router = Router(spec.moe, spec.hidden_size)
        self.experts = Experts(spec, self.world)
        self.shared = GatedMLP(spec, self.world, spec.moe.shared_size) if spec.moe.shared_size else None
        self.aux_scale = 0.0
        self.capacity: float | None = None
        self.counts_load = False
        self.last_aux: Tensor | None = None
        self.load: Tensor | None = None

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        choice = self.router(x)
        experts, weights = choice.experts, choice.weights
        if self.training and (self.aux_scale or self.counts_load):
            real = self._real(x, segments)
            weights = _Balance.apply(
                weights, choice.probabilities, experts, real, self, _real_total(segments)
            )
        drops = self.training and self.capacity is not None
        if drops:
            experts = self._drop(experts, segments)
        y = through_experts(
            x,
            experts,
            weights,
            self.spec.num_experts,
            self.world,
            self.experts,
            drops=drops,
            keys=self._keys(x, segments) if self.experts.drops_out else None,
        )
        return y if self.shared is None else y + self.shared(x, segments)

    def _rows(self, x: Tensor, segments: Segments) -> Tensor:
        """int64 [T]: where in the whole stream the tokens stand that are here."""
        rows = segments.rows
        if rows is None:
            rows = torch.arange(segments.tokens, device=x.device)
        return own_tokens(rows, self.world.tp)

    def _keys(self, x: Tensor, segments: Segments) -> Tensor:
        """int64 [T]: what dropout knows the tokens by, wherever they are sent."""
        return self._rows(x, segments) ^ (segments.key & 2**31 - 1)

    def _real(self, x: Tensor, segments: Segments) -> Tensor | None:
        """bool [T]: which tokens are no padding; None: all."""
        return self._rows(x, segments) < _real_total(segments) if segments.padding else None

    def _drop(self, experts: Tensor, segments: Segments) -> Tensor:
        """`experts` with E in place of choices that are over their expert's capacity, by the order of the stream."""
        count, top_k, total = self.spec.num_experts, self.spec.top_k, _real_total(segments)
        most = math.ceil(self.capacity * total * top_k / count)
        rows = self._rows(experts, segments)
        mine = torch.cat((rows[:, None], experts), 1)
        every = gather_rows(gather_rows(mine, self.world.tp)[0], self.world.cp)[0]
        # Padding takes no room: there it is of no expert.
        chosen = every[:, 1:].masked_fill(every[:, :1] >= total, count)
        stream = torch.empty_like(chosen)
        stream[every[:, 0]] = chosen
        kept = moe_ops.within_capacity(stream, count, most)[rows]
        return experts.masked_fill(~kept, count)


def _real_total(segments: Segments) -> int:
    """Tokens of the whole stream that are no padding."""
    return segments.total - segments.padding


class _Balance(torch.autograd.Function):
    """The weights as they are; backward adds the balancing loss's gradient to that of the probabilities.

    Of a micro-batch with N tokens: loss = E * sum_i f_i P_i, f_i = (choices of expert i) / N, P_i = mean over tokens of
    the probability of expert i (Switch Transformer, arXiv:2101.03961, equations 4 to 6, summed over k choices as in
    GShard). f has no gradient, so d loss / d probability[t, i] = E * f_i / N on every process, once f is known: loads
    are summed over the processes that share the micro-batch. All of it happens in backward: once a micro-batch, also
    where activations are recomputed, and not in evaluation; and no loss has to be handed to the last pipeline stage.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        probabilities: Tensor,
        experts: Tensor,
        real: Tensor | None,
        layer: MoE,
        tokens: int,
    ) -> Tensor:
        count = layer.spec.num_experts
        flat = experts if real is None else experts.masked_fill(~real[:, None], count)
        ordered = flat.flatten().sort().values
        borders = torch.searchsorted(ordered, torch.arange(count + 1, device=experts.device))
        ctx.load = borders[1:] - borders[:-1]
        seen = probabilities if real is None else probabilities * real[:, None]
        ctx.probability = seen.sum(0) if layer.aux_scale else None
        ctx.save_for_backward(real)
        ctx.layer, ctx.tokens, ctx.rows = layer, tokens, probabilities.shape[0]
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, load = ctx.layer, ctx.load
        if layer.counts_load:
            layer.load = load if layer.load is None else layer.load + load
        if not layer.aux_scale:
            return grad, None, None, None, None, None
        (real,) = ctx.saved_tensors
        sums = torch.stack((load.to(ctx.probability.dtype), ctx.probability))
        for axis in (layer.world.tp, layer.world.cp):
            sums = sum_(sums, axis)
        f, p = sums / ctx.tokens
        scale = layer.aux_scale * layer.spec.num_experts
        aux = scale * (f * p).sum()
        layer.last_aux = aux if layer.last_aux is None else layer.last_aux + aux
        slope = (f * (scale / ctx.tokens)).expand(ctx.rows, -1)
        return grad, slope if real is None else slope * real[:, None], None, None, None, None


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """The mixture-of-experts layers that this process holds, in order."""
    return (module for module in model.modules() if isinstance(module, MoE))


def set_balance(model: nn.Module, config: MoEConfig, micro_batches: int) -> None:
    """How training keeps the experts' loads even; `micro_batches`: of one optimizer step, over all processes. Each
    layer's balancing loss is added to the step's loss as aux_loss * (mean over micro-batches)."""
    for layer in moe_layers(model):
        layer.aux_scale = config.aux_loss / micro_batches
        layer.capacity = config.capacity
        layer.counts_load = config.bias_rate > 0 and layer.router.correction is not None
        layer.last_aux = layer.load = None


def take_aux(model: nn.Module, world: World) -> float:
    """This process's share of the balancing losses since the last call: the sum over all processes is what they add to
    the step's loss. Waits for the device."""
    values = []
    for layer in moe_layers(model):
        if layer.last_aux is not None and world.tp.is_first and world.cp.is_first:
            values.append(layer.last_aux)
        layer.last_aux = None
    return float(torch.stack(values).sum()) if values else 0.0


@torch.no_grad()
def update_correction(model: nn.Module, world: World, rate: float) -> None:
    """Aux-loss-free balancing (arXiv:2408.15664), after the optimizer's step: correction_i += rate * sign(mean load -
    load_i), loads being of all tokens since the last call. All processes with the same layers call this together."""
    layers = [layer for layer in moe_layers(model) if layer.counts_load]
    if not layers:
        return
    none = torch.zeros(
        layers[0].spec.num_experts, dtype=torch.int64, device=layers[0].router.correction.device
    )
    loads = torch.stack([none if layer.load is None else layer.load for layer in layers])
    for axis in (world.tp, world.fsdp, world.dp_replicate):
        loads = sum_(loads, axis)
    # In whole numbers: E * (mean - load), whose sign is exact.
    signs = torch.sign(loads.sum(1, keepdim=True) - loads.shape[1] * loads)
    for layer, sign in zip(layers, signs, strict=True):
        layer.router.correction.add_(sign.to(layer.router.correction.dtype), alpha=rate)
        layer.load = None
