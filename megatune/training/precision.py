"""Which dtype a run computes in, and whether the device can."""

from __future__ import annotations

import torch

from megatune.errors import ConfigError

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


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet bf16 FLOP/s of the device; None where it is not known (then MFU is not given)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_BF16.items() if key in name), None)
