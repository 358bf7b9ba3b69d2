"""Ops on the flat stream of tokens: one function per op; what computes it is chosen by device, dtype and features."""

from megatune.ops import moe  # noqa: F401 - it registers ops of its own
from megatune.ops.attention import attention
from megatune.ops.cross_entropy import VocabCut, cross_entropy, linear_cross_entropy
from megatune.ops.dropout import keyed_dropout
from megatune.ops.embedding import embedding
from megatune.ops.fp8 import Fp8Recipe, fp8_linear, fp8_products
from megatune.ops.fp8_fused import fp8_add_norm_linear, fp8_glu_linear, fp8_norm_linear
from megatune.ops.glu import clamped_glu, glu
from megatune.ops.lora import LoraLayout, block_grad, lora_linear, scaled_product
from megatune.ops.norm import add_rms_norm, layer_norm, rms_norm
from megatune.ops.optim import adamw_, adamw_8bit_, lion_, square_sum
from megatune.ops.optim_bf16 import adamw_bf16_, parameter_key
from megatune.ops.quant import FrozenWeight, dense, quantised_linear, saved
from megatune.ops.registry import OPS, chosen, configure, table, why
from megatune.ops.rope import rope
from megatune.ops.rope_qk import rope_qk
from megatune.ops.router import route
from megatune.ops.segments import Segments, Targets

BODIES = {name: tuple(op.bodies) for name, op in OPS.items()}  # the bodies of each op, the best first

__all__ = [
    "BODIES",
    "Fp8Recipe",
    "FrozenWeight",
    "LoraLayout",
    "Segments",
    "Targets",
    "VocabCut",
    "adamw_",
    "adamw_8bit_",
    "adamw_bf16_",
    "add_rms_norm",
    "attention",
    "block_grad",
    "chosen",
    "clamped_glu",
    "configure",
    "cross_entropy",
    "dense",
    "embedding",
    "fp8_add_norm_linear",
    "fp8_glu_linear",
    "fp8_linear",
    "fp8_norm_linear",
    "fp8_products",
    "glu",
    "keyed_dropout",
    "layer_norm",
    "linear_cross_entropy",
    "lion_",
    "lora_linear",
    "parameter_key",
    "quantised_linear",
    "rms_norm",
    "rope",
    "rope_qk",
    "route",
    "saved",
    "scaled_product",
    "square_sum",
    "table",
    "why",
]
