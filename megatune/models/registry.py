"""Which family a checkpoint belongs to. Adding a family: its file in families/ and its line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatune.errors import ConfigError
from megatune.models.families.base import Family
from megatune.models.families.deepseek_v3 import DeepseekV3
from megatune.models.families.gemma2 import Gemma2
from megatune.models.families.gemma3 import Gemma3
from megatune.models.families.gpt2 import GPT2
from megatune.models.families.gpt_oss import GptOss
from megatune.models.families.llama import Llama
from megatune.models.families.mistral import Mistral
from megatune.models.families.mixtral import Mixtral
from megatune.models.families.olmo2 import Olmo2
from megatune.models.families.phi3 import Phi3
from megatune.models.families.qwen2 import Qwen2
from megatune.models.families.qwen3 import Qwen3
from megatune.models.families.qwen3_moe import Qwen3Moe

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Gemma2(),
    Gemma3(),
    Phi3(),
    Olmo2(),
    GPT2(),
    Mixtral(),
    Qwen3Moe(),
    DeepseekV3(),
    GptOss(),
)

_MOST = {
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "n_routed_experts": 10_000,
}

_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "max_position_embeddings",
)


def supported_model_types() -> list[str]:
    """The `model_type` values that a config.json may have."""
    return [model_type for family in FAMILIES for model_type in family.model_types]


def family_for(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `model_type` and `architectures`.

    Raises ConfigError, naming the supported types, for an architecture that is not known, for models with another
    head than a language model's, and for weights quantised in a way that is not undone when they are read.
    """
    model_type, architectures = hf_config.get("model_type"), hf_config.get("architectures") or []
    found = [family for family in FAMILIES if model_type in family.model_types]
    if model_type is None:
        found = [family for family in FAMILIES if set(architectures) & set(family.architectures)]
    if not found:
        raise ConfigError(
            f"config.json: model type {model_type!r} (architectures {architectures}) is not supported; supported "
            f"model types are {', '.join(supported_model_types())}"
        )
    (family,) = found
    if architectures and not set(architectures) & set(family.architectures):
        raise ConfigError(
            f"config.json: architecture {architectures[0]} is not supported; of model type {model_type}, "
            f"{family.architectures[0]} is"
        )
    method = (hf_config.get("quantization_config") or {}).get("quant_method", "unknown")
    if hf_config.get("quantization_config") and method not in family.dequantised:
        raise ConfigError(
            f"config.json: the weights are quantised ({method}); use the model's bf16 or fp32 checkpoint instead"
        )
    _check_counts(hf_config)
    _check_types(family, hf_config)
    return family


def _check_types(family: Family, hf_config: Mapping[str, Any]) -> None:
    """ConfigError for values of another type than the family computes with (text for a number, an object for a list).
    Values that it refuses itself are said when the spec is asked for."""
    try:
        family.spec(hf_config)
    except ConfigError:
        return
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError) as error:
        raise ConfigError(
            f"config.json: a value is not of the kind that a {family.name} model has ({error}); download it again"
        ) from error


def _check_counts(hf_config: Mapping[str, Any]) -> None:
    """ConfigError for more layers or experts than any model has: a plan of each one is made before weights are seen."""
    for key, most in _MOST.items():
        count = hf_config.get(key)
        if isinstance(count, int | float) and count > most:
            raise ConfigError(f"config.json: {key} is {count}, more than any model has; is the file damaged?")
    for key in _SIZES:
        size = hf_config.get(key)
        if size is not None and (not isinstance(size, int) or size < 0):
            raise ConfigError(f"config.json: {key} is {size!r}, not a size; is the file damaged?")


def family_named(name: str) -> Family:
    """The family whose `name` is `DecoderSpec.family`."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConfigError(
        f"model family {name!r} is not known; known are {', '.join(family.name for family in FAMILIES)}"
    )
