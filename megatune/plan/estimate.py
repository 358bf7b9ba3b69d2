"""Memory of one process and tokens of one step, from the configuration and the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megatune.config.schema import Config
from megatune.models.spec import DecoderSpec
from megatune.ops.cross_entropy import CHUNK_LOGITS_ELSEWHERE
from megatune.parallel import layout_of

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on one process, by what they hold; `tokens_per_step` over all processes."""

    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    tokens_per_step: int

    @property
    def total(self) -> int:
        return self.frozen + self.trainable + self.gradients + self.optimizer + self.activations + self.logits

    def rows(self) -> list[tuple[str, int]]:
        """(label, bytes) for printing, the total last."""
        names = ("frozen", "trainable", "gradients", "optimizer", "activations", "logits", "total")
        labels = (
            "frozen weights",
            "trainable weights",
            "gradients",
            "optimizer states",
            "activations",
            "logits",
        )
        return list(zip((*labels, "total"), (getattr(self, name) for name in names), strict=True))


def estimate(
    config: Config, model: nn.Module, spec: DecoderSpec, world_size: int, compute_bytes: int
) -> Estimate:
    """What one of `world_size` processes needs. `model`: on meta, adapter attached; `compute_bytes`: 2 or 4.

    Weights and states are exact but for padding of shards; activations count what backward keeps a token and layer,
    which leaves out the allocator's own waste (about 10 %).
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    shards = layout_of(config.parallel, world_size).fsdp
    zero = config.parallel.zero if world_size > 1 else 0
    base_trains = any(p.requires_grad and ".adapter." not in n for n, p in model.named_parameters())
    masters = trainable * 4 // (shards if zero else 1)
    cast = trainable * compute_bytes if base_trains and (compute_bytes < 4 or zero) else 0
    if zero == 3:  # two layers are gathered at a time: one in use, one on its way
        cast = 2 * (trainable + frozen) * compute_bytes // max(1, spec.num_layers)
    tokens = config.train.micro_batch_size * config.data.seq_length
    return Estimate(
        frozen=frozen * compute_bytes // (shards if zero == 3 else 1),
        trainable=masters + cast,
        gradients=trainable * 4 // (shards if zero >= 2 else 1),
        optimizer=trainable * 8 // (shards if zero else 1),
        activations=_activations(config, spec, tokens, compute_bytes),
        logits=min(tokens * spec.vocab_size, CHUNK_LOGITS_ELSEWHERE) * (4 + compute_bytes),
        tokens_per_step=config.train.global_batch_size * config.data.seq_length,
    )


def _activations(config: Config, spec: DecoderSpec, tokens: int, compute_bytes: int) -> int:
    """What backward keeps: per token and layer the inputs of both blocks and their norms, q, k, v, the attention
    output and its log-sum-exp, gate and up and their product."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_layer = 4 * spec.hidden_size + 2 * heads + 2 * spec.num_heads * spec.head_dim + 3 * spec.mlp_size
    recompute = config.parallel.recompute
    kept_layers = float(spec.num_layers)
    if recompute == "full":
        kept_layers = 1.0
    elif isinstance(recompute, int):
        kept_layers = spec.num_layers * (1 - 1 / recompute) + 1
    inputs = spec.num_layers * spec.hidden_size
    return int(tokens * compute_bytes * (per_layer * kept_layers + inputs))
