"""Models: one decoder, one file a family, weights by global names."""

from megatune.models.build import build, fill_random, materialise_random, set_dtypes, whole_weights
from megatune.models.causal_lm import CausalLM
from megatune.models.convert import from_hf_state, fuse_parts, split_parts, to_hf_state
from megatune.models.decoder import Decoder
from megatune.models.families.base import Family, Piece
from megatune.models.fp8 import check_fp8, use_fp8
from megatune.models.layout import count_parameters, flops_per_token, shard_specs
from megatune.models.quantise import FrozenParts, quantise
from megatune.models.registry import family_for, family_named, supported_model_types
from megatune.models.spec import DecoderSpec, LayerSpec, RopeSpec

__all__ = [
    "CausalLM",
    "Decoder",
    "DecoderSpec",
    "Family",
    "FrozenParts",
    "LayerSpec",
    "Piece",
    "RopeSpec",
    "build",
    "check_fp8",
    "count_parameters",
    "family_for",
    "family_named",
    "fill_random",
    "flops_per_token",
    "from_hf_state",
    "fuse_parts",
    "materialise_random",
    "quantise",
    "set_dtypes",
    "shard_specs",
    "split_parts",
    "supported_model_types",
    "to_hf_state",
    "use_fp8",
    "whole_weights",
]
