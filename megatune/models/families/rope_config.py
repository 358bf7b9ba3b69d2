"""Rotary embedding settings in Hugging Face configs, both styles, to and from `RopeSpec`.

transformers 5 writes `rope_parameters` (one dict, or one a layer type); older versions write `rope_theta` and
`rope_scaling`. Read: both. Written: the older style, which every version reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatune.errors import ConfigError
from megatune.models.spec import RopeSpec

_KEPT_LENGTH = ("llama3", "yarn", "longrope")  # kinds that know the length of the pre-training


def rope_from_hf(
    parameters: Mapping[str, Any],
    *,
    dim: int,
    theta: float,
    max_positions: int,
    original_max_positions: int | None,
) -> RopeSpec:
    """One `rope_parameters` or `rope_scaling` dict as a `RopeSpec`.

    `theta`: base for a dict without its own. `max_positions`, `original_max_positions`: the config's top-level
    `max_position_embeddings` and (Phi-3) `original_max_position_embeddings`; the latter wins over the dict's own, as
    in transformers. Raises ConfigError for a kind that is not known.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta") or theta)
    if kind == "default":
        return RopeSpec(theta, dim)
    original = original_max_positions or parameters.get("original_max_position_embeddings") or max_positions
    try:
        if kind == "linear":
            return RopeSpec(theta, dim, "linear", factor=float(parameters["factor"]))
        if kind == "llama3":
            return RopeSpec(
                theta,
                dim,
                "llama3",
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_positions=int(original),
            )
        if kind == "yarn":
            return _yarn(parameters, dim, theta, max_positions, int(original))
        if kind in ("longrope", "su"):
            return _longrope(parameters, dim, theta, max_positions, int(original))
    except KeyError as missing:
        raise ConfigError(
            f"config.json: rotary scaling of type `{kind}` has no key {missing}; add it"
        ) from None
    raise ConfigError(
        f"config.json: rotary scaling of type `{kind}` is not supported; supported are default, linear, llama3, yarn "
        "and longrope"
    )


def _yarn(
    parameters: Mapping[str, Any], dim: int, theta: float, max_positions: int, original: int
) -> RopeSpec:
    factor = float(parameters.get("factor") or max_positions / original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = yarn_magnitude(factor)
        if over and under:
            attention_factor = yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
    return RopeSpec(
        theta,
        dim,
        "yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        attention_factor=float(attention_factor),
        truncate=bool(parameters.get("truncate", True)),
        mscale_all_dim=float(parameters.get("mscale_all_dim") or 0.0),
    )


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """How much YaRN's longer contexts (`factor` times) call for larger logits (arXiv:2309.00071, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    parameters: Mapping[str, Any], dim: int, theta: float, max_positions: int, original: int
) -> RopeSpec:
    factor = float(parameters.get("factor") or max_positions / original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = {}
    for key in ("long_factor", "short_factor"):
        factors[key] = tuple(float(value) for value in parameters[key])
        if len(factors[key]) != dim // 2:
            raise ConfigError(
                f"config.json: rotary {key} has {len(factors[key])} numbers, but {dim // 2} (half the rotated "
                "dimensions of a head) are needed"
            )
    return RopeSpec(
        theta,
        dim,
        "longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=float(attention_factor),
        long_factors=factors["long_factor"],
        short_factors=factors["short_factor"],
    )


def rope_to_hf(rope: RopeSpec) -> dict[str, Any] | None:
    """The `rope_scaling` dict of a `RopeSpec` (None: no scaling); its theta and dim stand elsewhere in a config."""
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in _KEPT_LENGTH:
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.mscale_all_dim:
            scaling["mscale_all_dim"] = rope.mscale_all_dim
    if rope.scaling == "longrope":
        scaling |= {"long_factor": list(rope.long_factors), "short_factor": list(rope.short_factors)}
    if rope.scaling in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.attention_factor
    return scaling
