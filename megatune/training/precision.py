"""Which dtype a run computes in, and whether the device can."""

from __future__ import annotations

import torch

from megatune import ops
from megatune.config.schema import Config
from megatune.errors import ConfigError
from megatune.models import Decoder

# On 2.11 dynamo traced some of our autograd functions with zero gradients (seen on an H200: rms_norm, rope); on 2.13
# every op's gradients are tested to equal the eager ones.
_COMPILE_NEEDS = (2, 13)

_PEAK_BF16 = {  # dense bf16 FLOP/s of NVIDIA's data sheets, without sparsity
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype behind `model.dtype`. auto: bf16 where the device has matrix units for it, else fp32.

    Raises ConfigError for bf16 on a GPU that has none.
    """
    if name == "fp32":
        return torch.float32
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        if name == "auto":
            return torch.float32
        raise ConfigError(
            f"model.dtype: bf16 needs a GPU of compute capability 8.0 or newer; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: set model.dtype: fp32"
        )
    if name == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def check_fp8(scaling: str | None, device: torch.device) -> None:
    """ConfigError where `model.fp8` asks for products that the GPU does not have."""
    if scaling is None or device.type != "cuda" or scaling in ops.fp8_products():
        return
    major, minor = torch.cuda.get_device_capability(device)
    has = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    if scaling == "blockwise" and "rowwise" in ops.fp8_products():
        raise ConfigError(f"model.fp8: blockwise needs a GPU of compute capability 9.0; {has}: use rowwise")
    raise ConfigError(
        f"model.fp8: {scaling} needs a GPU of compute capability 8.9 or newer; {has}: leave it out"
    )


def check_masters(config: Config, dtype: torch.dtype) -> None:
    """ConfigError where the optimizer updates bf16 weights, and the run computes in another `dtype`."""
    if config.optim.name == "adamw_bf16" and dtype != torch.bfloat16:
        raise ConfigError(
            f"optim.name: adamw_bf16 updates weights in bf16, and model.dtype: {config.model.dtype} computes in "
            f"{str(dtype).removeprefix('torch.')} here; set model.dtype: bf16, or optim.name: adamw"
        )


def masters(config: Config) -> str:
    """What the optimizer updates, for people."""
    return "bf16 (vectors fp32)" if config.optim.name == "adamw_bf16" else "fp32"


def can_compile() -> bool:
    """Whether this torch compiles decoder layers with right gradients."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _COMPILE_NEEDS


def compile_layers(model: Decoder) -> None:
    """torch.compile each decoder layer, in place, before sharding. ConfigError on a torch that gets it wrong."""
    if not can_compile():
        raise ConfigError(
            f"train.compile: true needs torch {'.'.join(map(str, _COMPILE_NEEDS))} or newer; torch {torch.__version__} "
            f"compiles some of the gradients wrongly: set it to false"
        )
    for layer in model.layers.values():
        layer.compile()


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet bf16 FLOP/s of the device; None where it is not known (then MFU is not given)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(name.replace("-", " ").split())
    return next((peak for key, peak in _PEAK_BF16.items() if set(key.split()) <= words), None)
