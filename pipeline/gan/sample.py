"""Noise and labels → pixels."""

import torch
from torch import nn

from pipeline.gan.pixels import to_pixels


@torch.no_grad()
def sample(G: nn.Module, z: torch.Tensor, label: torch.Tensor, *, precision: str) -> torch.Tensor:
    """z float32 [N, Z], label int64 [N] → uint8 NHWC [0, 255]. G must be in eval mode."""
    assert not G.training
    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return to_pixels(G(z, label))
