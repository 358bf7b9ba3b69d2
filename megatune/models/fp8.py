"""Linear layers of a decoder in 8 bit floating point."""

from __future__ import annotations

from typing import Literal

from megatune.errors import ConfigError
from megatune.models.decoder import Decoder
from megatune.models.spec import DecoderSpec
from megatune.ops import Fp8Recipe
from megatune.parallel.tensor import Linear


def use_fp8(model: Decoder, scaling: Literal["rowwise", "blockwise"]) -> None:
    """Let the linear layers of the decoder's layers compute in fp8, in place; head and embeddings stay as they are.
    Blockwise, RMS norms give them their input in 8 bits only. `check_fp8` says for which models."""
    for layer in model.layers.values():
        for linear in layer.modules():
            if isinstance(linear, Linear):
                linear.fp8 = Fp8Recipe(scaling)
        layer.join_norms()


def check_fp8(spec: DecoderSpec, scaling: Literal["rowwise", "blockwise"]) -> None:
    """ConfigError for a model that `use_fp8` is not for."""
    what = f"model.fp8: {scaling}"
    if spec.moe is not None or spec.mla is not None:
        kind = "experts" if spec.moe is not None else "latent attention"
        raise ConfigError(f"{what} is not for models with {kind}, such as this one; leave it out")
    sizes = {
        "hidden size": spec.hidden_size,
        "width of all query heads": spec.num_heads * spec.head_dim,
        "width of the fused q, k and v": spec.qkv.rows,
        "inner size": spec.mlp_size,
    }
    step = 16 if scaling == "rowwise" else 128
    for name, size in sizes.items():
        if size % step:
            instead = "leave it out" if size % 16 else "use rowwise"
            raise ConfigError(
                f"{what} needs sizes that are multiples of {step}, and this model's {name} is {size}; {instead}"
            )
