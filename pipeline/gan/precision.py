"""Sums and outputs that must not be taken in 16 bits."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x as float32, or as it is where that is wider: in float64 everything stays so, which tests of gradients need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
