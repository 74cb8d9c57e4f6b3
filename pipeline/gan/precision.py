"""Which arithmetic: 16 bits where the hardware has it, and never for sums and outputs."""

import contextlib
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x as float32, or as it is where that is wider: in float64 everything stays so, which tests of gradients need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def supported(wanted: Precision, device: torch.device) -> Precision:
    """What a device computes natively of what was wanted: emulated bf16 is slower than float32."""
    return wanted if wanted == "fp32" or _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Convolutions and products of matrices in bf16, or everything as it comes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the type in which a convolution would take it here."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast, whatever surrounds it. The meta device has none to begin with."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
