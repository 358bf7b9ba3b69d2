"""Small models for Megatron's formats: random tensors under Hugging Face names, without transformers; and optimizer
states in the order in which megatron-core 0.16.1 saves them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import SLOTS, Opened
from megatune.checkpoint.convert.megatron_names import EMBEDDING, HEAD, MegatronTable
from megatune.checkpoint.sources import TensorSource
from megatune.models.registry import family_for

_Chunk = list[tuple[str, dict[str, Tensor]]]  # weights of one chunk by name: slot -> state
_SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 7,
    "hidden_activation": "gelu_pytorch_tanh",
}
_MLA = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

# name -> (model_type, architecture, further keys of config.json)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama-tied": ("llama", "LlamaForCausalLM", _TIED),
    "llama-biases": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _TIED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE),
    "deepseek": ("deepseek_v3", "DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": 16}),
    "deepseek-direct": ("deepseek_v3", "DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": None}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _GEMMA | _TIED),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _GEMMA | _TIED),
}


class Tensors:
    """A `TensorSource` in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __str__(self) -> str:
        return "memory"

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@cache
def model(name: str) -> Opened:
    """A case as a Hugging Face folder would be opened: bf16, routers' corrections in fp32. Not to be changed."""
    model_type, architecture, keys = FAMILIES[name]
    config = _SIZES | {"model_type": model_type, "architectures": [architecture]} | keys
    table = MegatronTable(family_for(config).spec(config))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    tensors = {}
    for hf_name in sorted(table.hf_names):
        dtype = torch.float32 if hf_name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[hf_name] = torch.randn(table.hf_shape(hf_name), generator=generator).to(dtype)
    return Opened("hf", Path("memory"), config, Tensors(tensors))


def same_tensors(found: TensorSource, wanted: TensorSource) -> list[str]:
    """Names of tensors that are not in both, or not bit-equal."""
    wrong = sorted(found.names() ^ wanted.names())
    for name in sorted(found.names() & wanted.names()):
        rows = wanted.shape(name)[0]
        same = found.shape(name) == wanted.shape(name) and found.dtype(name) == wanted.dtype(name)
        if not same or not torch.equal(found.rows(name, 0, rows), wanted.rows(name, 0, rows)):
            wrong.append(name)
    return wrong


def load_rank(path: Path) -> dict[str, Any]:
    """A legacy rank's file, by torch itself."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def add_optimizer(
    folder: Path, flat: bool, truth: Path, sizes: tuple[int, int] = (1, 1)
) -> dict[str, Tensor]:
    """Random states for a legacy checkpoint of 16 bits, of the plain optimizer or (`flat`) of the distributed one; and
    `truth / slot`, the same checkpoint with the states in place of the weights. Returns the same states as the
    distributed optimizer saves them in torch_dist's form dp_reshardable; `sizes`: tensor, expert parallel size."""
    generator = torch.Generator().manual_seed(0)
    buckets: dict[str, Tensor] = {}
    embedded: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        content = load_rank(path)
        models = {key: content[key] for key in content if key.startswith("model")}
        states: dict[str, dict[str, dict[str, Tensor]]] = {
            number: {name: _states(weight, generator) for name, weight in chunk.items()}
            for number, chunk in models.items()
        }
        for chunk, own in zip(models.values(), states.values(), strict=True):
            rank = path.parent.name[:10]
            if EMBEDDING in own:
                embedded[rank] = chunk[EMBEDDING], own[EMBEDDING]
            if HEAD in own and torch.equal(chunk[HEAD], embedded[rank][0]):  # a copy, on another stage
                own[HEAD] = embedded[rank][1]
        for slot in SLOTS:
            other = truth / slot / path.relative_to(folder)
            other.parent.mkdir(parents=True, exist_ok=True)
            changed = {k: {name: one[slot] for name, one in chunk.items()} for k, chunk in states.items()}
            torch.save(content | changed, other)
        trained = [
            [(k, one) for k, one in chunk.items() if not k.endswith("expert_bias")]
            for chunk in states.values()
        ]
        dense, experts = (
            [[pair for pair in chunk if (".mlp.experts." in pair[0]) is which] for chunk in trained]
            for which in (False, True)
        )
        parts = [dense, experts] if any(experts) else [dense]
        buckets |= _bucket_tensors(path.parent.name, trained, [dense, experts], sizes)
        if flat:
            made = [_flat(part) for part in parts]
            torch.save(made[0] if len(made) == 1 else made, path.parent / "distrib_optim.pt")
            optimizer: Any = {"optimizer": {"param_groups": []}}
        else:
            chained = [_plain(part) for part in parts]
            optimizer = chained[0] if len(chained) == 1 else chained
        torch.save(content | {"optimizer": optimizer}, path)
    return buckets


def _bucket_tensors(
    name: str, chunks: list[_Chunk], parts: list[list[_Chunk]], sizes: tuple[int, int]
) -> dict[str, Tensor]:
    """One rank's tensors of DistributedOptimizer.sharded_param_state_dp_reshardable()."""
    tensor, *others = (int(number) for number in name.removeprefix("mp_rank_").split("_"))
    expert = others.pop() if sizes[1] > 1 else 0
    stage = others[0] if others else 0
    dense, spread = tensor + sizes[0] * stage, tensor + sizes[0] * (expert + sizes[1] * stage)
    optimizers = {"": (dense, chunks)}
    if sizes[1] > 1:
        optimizers = {"chained_0.": (dense, parts[0]), "chained_1.": (spread, parts[1])}
    found = {}
    for prefix, (group, own) in optimizers.items():
        if prefix != "chained_1." and expert:  # the same as on the first
            continue
        for number, chunk in enumerate(filter(None, own)):
            for index, bucket in enumerate(_buckets(chunk)):
                key = f"{prefix}optimizer.distributed.dp_group_idx_{group}.gbuf_idx_{number}."
                key += f"dtype_(torch.bfloat16, torch.float32).bucket_idx_{index}."
                found |= {key + slot: flat for slot, flat in bucket.items()}
    return found


def _states(weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """A master that rounds to the weight, and moments."""
    noise = torch.rand(weight.shape, generator=generator) * 2**-11
    moments = {slot: torch.randn(weight.shape, generator=generator) for slot in SLOTS[1:]}
    return {"master": weight.float() * (1 + noise), **moments}


def _plain(chunks: list[_Chunk]) -> dict[str, Any]:
    """Float16OptimizerWithFloat16Params.state_dict(): weights with decay, then vectors and biases."""
    every = [pair for chunk in chunks for pair in chunk]
    groups = [
        [one for name, one in every if (one["master"].ndim == 1 or name.endswith(".bias")) is vector]
        for vector in (False, True)
    ]
    groups = [group for group in groups if group]
    state, numbers = {}, []
    for group in groups:
        numbers.append(list(range(len(state), len(state) + len(group))))
        for number, one in zip(numbers[-1], group, strict=True):
            state[number] = {"step": torch.tensor(2.0)} | {slot: one[slot] for slot in SLOTS[1:]}
    return {
        "optimizer": {"state": state, "param_groups": [{"lr": 0.01, "params": run} for run in numbers]},
        "fp32_from_fp16_params": [[one["master"] for one in group] for group in groups],
    }


def _flat(chunks: list[_Chunk]) -> dict[Any, Any]:
    """DistributedOptimizer.get_parameter_state_dp_zero(): a buffer for each chunk, its buckets one after the other."""
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for chunk in filter(None, chunks):
        buckets = list(_buckets(chunk))
        buffer: dict[str, Any] = {slot: torch.cat([one[slot] for one in buckets]) for slot in buckets[0]}
        key = (torch.bfloat16, torch.float32)
        found[len(found) - 1] = {key: buffer | {"numel_unpadded": buffer["param"].numel()}}
    return found


def _buckets(chunk: _Chunk) -> Iterator[dict[str, Tensor]]:
    """Three weights each, from the last to the first, each at a multiple of 64; nothing between buckets."""
    ordered = chunk[::-1]
    for first in range(0, len(ordered), 3):
        runs: dict[str, list[Tensor]] = {slot: [] for slot in SLOTS}
        length = 0
        for _, one in ordered[first : first + 3]:
            gap = torch.zeros(-length % 64)
            for slot in SLOTS:
                runs[slot] += [gap, one[slot].reshape(-1)]
            length += gap.numel() + one["master"].numel()
        yield {"param" if slot == "master" else slot: torch.cat(run) for slot, run in runs.items()}
