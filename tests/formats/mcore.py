"""Tiny GPT models of an installed megatron-core, on the CPU: of the same architecture as a Hugging Face config.

What Megatron asks of CUDA on its way is answered here. Call these in a process with a process group.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatune.models import DecoderSpec

needs_mcore = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (pip install --no-deps megatron-core==0.16.1)",
)


def prepare(tensor: int = 1, pipeline: int = 1, expert: int = 1) -> None:
    """Megatron's process groups; CUDA's part of it is the CPU's."""
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: "cpu"
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
    )
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    multi_latent_attention.TELinear = type("TELinear", (), {})
    moe_utils.te_general_gemm = None  # a name that 0.16.1 lacks without Transformer Engine
    random.get_cuda_rng_tracker().fork = lambda *args: nullcontext()


def without_cuda() -> None:
    """For the rest of this process: Megatron's optimizer takes what is on the CPU for what is on a GPU."""

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    kind = Tensor.type

    def of_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = kind(tensor, *args, **kwargs)
        asked = isinstance(found, str) and "cuda" not in found
        return found.replace("torch.", "torch.cuda.") if asked else found

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def put_but_step(self: Any, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        # torch's AdamW, which stands in for Transformer Engine's, counts for each weight; no file has that.
        own = self._get_main_param_and_optimizer_states(parameter)
        put(self, parameter, {name: own[name] for name in own if name == "step"} | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = put_but_step
    Tensor.type = of_cuda
    Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    OnTheCpu().__enter__()


def gpt(
    spec: DecoderSpec,
    vocab: int,
    seed: int = 0,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    **pieces: bool,
) -> Any:
    """A GPTModel with Megatron's own layers (no Transformer Engine), random in every weight, in evaluation mode.
    `vocab`: rows of the embedding. `tensor`, `pipeline`, `expert`: as `prepare` was told. `pieces`: pre_process,
    post_process of a pipeline's stage."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    values = _values(spec) | {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "pipeline_dtype": torch.float32,
    }
    config = (MLATransformerConfig if spec.mla else TransformerConfig)(**values)
    if spec.moe is not None and not all(layer.moe for layer in spec.layers):
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        parts = layers.layer_specs
    else:
        layers = get_gpt_layer_local_spec(
            num_experts=spec.moe.num_experts if spec.moe else None,
            qk_layernorm=values["qk_layernorm"],
            multi_latent_attention=spec.mla is not None,
            normalization="RMSNorm",
        )
        parts = [layers]
    if spec.mla is not None:
        for part in parts:
            part.submodules.self_attention.submodules.core_attention = _core_attention()
    model = GPTModel(
        config,
        layers,
        vocab_size=vocab,
        max_sequence_length=spec.max_positions,
        position_embedding_type="rope",
        rotary_base=spec.ropes[0].theta,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        **pieces,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                noise = torch.randn(parameter.shape, generator=generator)
            else:  # another one on each process
                own = torch.distributed.get_rank() % tensor
                noise = torch.randn((tensor, *parameter.shape), generator=generator)[own]
            parameter.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[batch, seq, vocab] of tokens [batch, seq]."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    hidden = torch.ones(1, 1, length, length).triu(1).bool()
    with torch.no_grad():
        return model(tokens, positions, hidden)


def _values(spec: DecoderSpec) -> dict[str, Any]:
    mla, moe = spec.mla, spec.moe
    values: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_heads if mla else spec.num_kv_heads,
        "ffn_hidden_size": spec.mlp_size,
        "layernorm_epsilon": spec.norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm == "head" or mla is not None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        **dict.fromkeys(
            (
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "gradient_accumulation_fusion",
                "masked_softmax_fusion",
                "apply_rope_fusion",
                "persist_layer_norm",
            ),
            False,
        ),
    }
    if mla is None:
        values["kv_channels"] = spec.head_dim
    else:
        values |= {
            "multi_latent_attention": True,
            "q_lora_rank": mla.q_rank,
            "kv_lora_rank": mla.kv_rank,
            "qk_head_dim": mla.nope_dim,
            "qk_pos_emb_head_dim": mla.rope_dim,
            "v_head_dim": mla.value_dim,
            "rope_type": "rope",
            "rotary_base": spec.ropes[0].theta,
            "rotary_scaling_factor": 1.0,
        }
    if moe is not None:
        mixed = not all(layer.moe for layer in spec.layers)
        values |= {
            "num_moe_experts": moe.num_experts,
            "moe_router_topk": moe.top_k,
            "moe_ffn_hidden_size": moe.expert_size,
            "moe_layer_freq": [int(layer.moe) for layer in spec.layers] if mixed else 1,
            "moe_router_score_function": moe.score,
            "moe_router_enable_expert_bias": moe.correction,
            "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalise,
            "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
            "moe_shared_expert_intermediate_size": moe.shared_size or None,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "allgather",
        }
        if moe.groups > 1:
            values |= {"moe_router_num_groups": moe.groups, "moe_router_group_topk": moe.groups_per_token}
    return values


def _core_attention() -> type:
    """Attention whose keys and values differ in width, which Megatron leaves to Transformer Engine."""
    from megatron.core.transformer.module import MegatronModule

    class Attention(MegatronModule):
        def __init__(
            self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any
        ) -> None:
            super().__init__(config=config)
            self.scale = softmax_scale

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return out.permute(2, 0, 1, 3).flatten(2)

    return Attention
