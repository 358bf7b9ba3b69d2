"""One small training run under a layout, for comparison with the same run in one process.

Everything between the configuration and the numbers is megatune's own way of training (`training.assemble`,
`training.step.Trainer`); only data and weights are made here: real text as bytes, packed into documents, and random
weights that depend on a parameter's name alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatune.config.schema import Config
from megatune.data.batch import Batch
from megatune.ops import Segments, Targets

STEPS = 5
MICRO_BATCHES = 4  # in the global batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "dense-tied": _DENSE
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "moe": _DENSE
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mla-moe": _DENSE
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
}
FAMILIES["moe-balanced"] = FAMILIES["mla-moe"] | {"tie_word_embeddings": True}
# Other values of a family's runs, by dotted key.
CHANGES: dict[str, dict[str, Any]] = {
    "moe-balanced": {"moe.aux_loss": 0.1, "moe.bias_rate": 0.01, "moe.capacity": 1.25},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "rank": 4, "alpha": 8.0},
    "freeze": {"type": "freeze", "modules": ["norm.weight"]},
    "freeze-embed": {"type": "freeze", "last_layers": 1, "modules": ["embed.weight"]},
    "lora-dropout": {"type": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.2},
}


@dataclass(frozen=True)
class Case:
    """`parallel`: the section of the configuration; `changes`: other values, by dotted key."""

    family: str
    method: str
    parallel: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    layers: int = 4


@dataclass
class Outcome:
    """Losses and gradient norms of the steps; `pieces` of the trained weights that this process would save: (name,
    offset, shape of the whole tensor, values)."""

    losses: list[float]
    norms: list[float]
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]

    def weights(self, others: Sequence[Outcome] = ()) -> dict[str, Tensor]:
        """Whole tensors from the pieces of all processes; every element must be there exactly once."""
        whole: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for outcome in (self, *others):
            for name, offset, shape, values in outcome.pieces:
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                whole.setdefault(name, torch.zeros(shape))[place] = values
                seen.setdefault(name, torch.zeros(shape))[place] += 1
        for name, count in seen.items():
            assert bool((count == 1).all()), f"{name}: some elements are written twice or not at all"
        return whole


def config_of(case: Case, device: str = "cpu") -> Config:
    method = METHODS[case.method]
    if case.method == "freeze":  # nothing trains in the first half of the model
        method = method | {"last_layers": case.layers // 2}
    settings: dict[str, Any] = {
        "model": {"path": "random", "dtype": "fp32"},
        "method": method,
        "data": {"train": ["none"], "seq_length": 128},
        "parallel": {"zero": 1, **case.parallel},
        "train": {"steps": STEPS, "global_batch_size": MICRO_BATCHES, "micro_batch_size": 1},
        # eps well above rounding errors: AdamW divides small gradients by themselves.
        "optim": {
            "lr": 3e-3,
            "warmup": 0,
            "schedule": "constant",
            "weight_decay": 0.1,
            "eps": 1e-4,
            "clip": 0.5,
        },
        "checkpoint": {"folder": "none"},
    }
    for key, value in (CHANGES.get(case.family, {}) | case.changes).items():
        section, _, name = key.partition(".")
        settings.setdefault(section, {})[name] = value
    return Config.model_validate(settings)


@cache
def batches(step: int) -> tuple[list[Batch], int]:
    """(micro-batches of a step, their scored tokens): paragraphs of the licence as bytes, packed, of many lengths."""
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    found, at = [], (step * 977) % 3000
    for number in range(MICRO_BATCHES):
        lengths = _lengths(step * MICRO_BATCHES + number)
        tokens = torch.tensor(list(text[at : at + sum(lengths)]))
        at += sum(lengths)
        segments = Segments.from_lengths(lengths)
        # Every third document is a prompt in its first half.
        scored = segments.positions > 0
        start = 0
        for place, length in enumerate(lengths):
            if place % 3 == 1:
                scored[start : start + length // 2] = False
            start += length
        index = scored.nonzero().flatten()
        found.append(Batch(tokens, segments, Targets(index - 1, tokens[index]), (number,), (), number))
    return found, sum(len(batch.targets.index) for batch in found)


def _lengths(number: int) -> tuple[int, ...]:
    """Document lengths of a packed sequence of at most 128 tokens, never the same twice in a row."""
    generator = torch.Generator().manual_seed(number)
    total = (57, 128, 101, 83, 120)[number % 5]
    lengths: list[int] = []
    while total > 0:
        length = min(total, int(torch.randint(2, 48, (), generator=generator)))
        lengths.append(length)
        total -= length
    return tuple(lengths)


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of a parameter, the same under every layout; no factor of an adapter is zero."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 1:
        return (1.0 + 0.1 * noise) if "norm" in name else 0.1 * noise
    return noise * (0.1 if "lora" in name else 0.15)


@cache
def _without_coverage() -> None:
    """Once a process. What runs here is measured in smaller tests too; here it would double the time of 400 runs."""
    measuring = sys.modules.get("coverage")
    current = measuring.Coverage.current() if measuring else None
    if current is not None:
        current.stop()


def train(case: Case, *, device: str | None = "cpu", world: Any = None) -> Outcome:
    """The run of `case` in this process and the others of its process group; offloading leaves out no tensor for being
    small, nor tensor parallelism communication in pieces where there are 32 rows or more."""
    from megatune.parallel import linear, offload

    with mock.patch.object(offload, "SMALLEST", 1), mock.patch.object(linear, "PIECE_ROWS", 32):
        return _train(case, device, world)


def _train(case: Case, device: str | None, world: Any) -> Outcome:
    _without_coverage()
    from megatune import parallel
    from megatune.models import family_for
    from megatune.training.assemble import assemble, training_parts
    from megatune.training.layout import check
    from megatune.training.step import Trainer

    config = config_of(case)
    settings = FAMILIES[case.family] | {"num_hidden_layers": case.layers}
    spec = family_for(settings).spec(settings)
    world = world or parallel.init(config.parallel, device=device)
    check(config, spec, world.world_size)
    dtype = DTYPES[config.model.dtype]
    built = assemble(spec, config, world, dtype)
    fill(built.zero.weights())
    built.zero.publish()
    optimizer, pipeline, state = training_parts(built, config, world, dtype)
    trainer = Trainer(built.model, built.zero, optimizer, pipeline, world, config, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        found, targets = batches(step)
        result = trainer.step(found[world.dp_rank :: world.dp_size], targets)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    outcome = Outcome(losses, norms, list(_pieces(state)))
    built.zero.close()
    return outcome


@torch.no_grad()
def fill(weights: Mapping[str, Any]) -> None:
    for name, parts in weights.items():
        whole = value_of(name, tuple(parts.shape))
        for box, view in parts.parts:
            view.copy_(box.of(whole))


def _pieces(state: Mapping[str, Any]):
    for name, parts in state.items():
        if name.startswith("model/") and parts.writes:
            for box, view in parts.parts:
                yield name, box.offset, tuple(parts.shape), view.detach().float().cpu().clone()
