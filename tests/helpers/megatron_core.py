"""Megatron-Core itself, on the CPU: a GPT model built from the arguments in a checkpoint, its logits, its state dict.

Its own layers (no Transformer Engine) compute everything; what does not run without a GPU is replaced: the random state
of GPUs, and one all-reduce that forgets its result where its input is not contiguous. Its attention core cannot have
values of another width than keys, so latent attention gets a plain one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

FILE = "model_optim_rng.pt"


def logits_and_resaved(
    rank: int, world: int, cases: list[tuple[Path, Path, Tensor]]
) -> list[tuple[Tensor, list]]:
    """For each (release folder, folder to save to, tokens [batch, seq]): the logits of Megatron's model with the rank's
    file in it, and the names that it missed or did not know. The model's own state dict is saved as step 7."""
    _prepare(world)
    return [_case(rank, *case) for case in cases]


def _case(rank: int, source: Path, destination: Path, tokens: Tensor) -> tuple[Tensor, list[str]]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(source / f"mp_rank_{rank:02d}" / FILE, weights_only=True, mmap=True)
    model = gpt(vars(content["args"])).eval()
    found = model.load_state_dict(content["model"], strict=False)
    wrong = [name for name in found.missing_keys if not name.endswith("_extra_state")] + found.unexpected_keys
    count = tokens.shape[1]
    positions = torch.arange(count).expand_as(tokens)
    mask = torch.ones(count, count).triu(1).bool()[None, None]
    with torch.no_grad():
        logits = model(tokens, positions, mask)
    args = argparse.Namespace(
        **{k: v for k, v in vars(content["args"]).items() if not k.startswith("megatune")}
    )
    folder = destination / "iter_0000007" / f"mp_rank_{rank:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model.state_dict()}
    torch.save(saved, folder / FILE)
    return logits, wrong


def _prepare(world: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()
    # Names that exist with Transformer Engine only.
    moe_utils.te_general_gemm = None
    multi_latent_attention.TELinear = type("TELinear", (), {})
    mappings._reduce = _reduce
    parallel_state.initialize_model_parallel(world, 1)


def _reduce(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gpt(args: dict[str, Any]) -> nn.Module:
    """The model that Megatron-LM's arguments describe, as its `core_transformer_config_from_args` reads them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args["multi_latent_attention"] else TransformerConfig
    names = {field.name for field in dataclasses.fields(kind)}
    fields = {k: v for k, v in args.items() if k in names and (v is not None or k == "q_lora_rank")}
    fields |= {
        "layernorm_epsilon": args["norm_epsilon"],
        "layernorm_zero_centered_gamma": args["apply_layernorm_1p"],
        "gated_linear_unit": args["swiglu"],
        "activation_func": nn.functional.silu,
        "num_moe_experts": args["num_experts"],
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
    }
    fused = (
        "bias_activation_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
    )
    config = kind(**fields | dict.fromkeys(fused, False))
    if args["num_experts"]:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        layers = spec.layer_specs
    else:
        latent = args["multi_latent_attention"]
        options = {"qk_layernorm": args["qk_layernorm"], "multi_latent_attention": latent}
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
        layers = [spec]
    if args["multi_latent_attention"]:
        for layer in layers:
            layer.submodules.self_attention.submodules.core_attention = PlainAttention
    return GPTModel(
        config,
        spec,
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        parallel_output=False,
    )


class PlainAttention(nn.Module):
    """Softmax of scaled, masked scores times values, [seq, batch, heads, width]."""

    def __init__(self, *, softmax_scale: float, **rest: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **rest: Any
    ) -> Tensor:
        query, key, value = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        scores = (query @ key.transpose(-1, -2) * self.scale).masked_fill(attention_mask, float("-inf"))
        return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
