"""Which networks a configuration names."""

import dataclasses
from typing import Literal

import torch
from torch import nn

from pipeline.gan.networks import dcgan


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The architecture of G and D; resolution, channels and classes come from the dataset."""

    name: Literal["dcgan"] = "dcgan"
    """Architecture."""
    z_dim: int = 100
    """Size of the latent z."""
    base_width: int = 64
    """Channels at half the resolution; doubled at each stage below it."""
    max_width: int = 512
    """Most channels of a stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageShape:
    """What G makes and D sees."""

    resolution: int
    """Height and width in pixels, a power of two from 16 to 512."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    num_classes: int
    """Number of labels; 0: unconditional."""


def build(config: NetworkConfig, shape: ImageShape, seed: int) -> tuple[dcgan.Generator, dcgan.Discriminator]:
    """G and D with initial weights that depend on (config, shape, seed) only; on CPU, channels-last."""
    G = dcgan.Generator(**dataclasses.asdict(shape), **_sizes(config), z_dim=config.z_dim)
    D = dcgan.Discriminator(**dataclasses.asdict(shape), **_sizes(config))
    generator = torch.Generator().manual_seed(seed)
    networks: list[nn.Module] = [G, D]
    for network in networks:
        dcgan.initialise(network, generator)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return G, D


def _sizes(config: NetworkConfig) -> dict[str, int]:
    return {"base_width": config.base_width, "max_width": config.max_width}
