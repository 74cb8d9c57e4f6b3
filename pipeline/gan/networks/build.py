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

    def __post_init__(self) -> None:
        if self.z_dim < 1 or not 1 <= self.base_width <= self.max_width:
            raise ValueError("z_dim must be at least 1, and base_width between 1 and max_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageShape:
    """What G makes and D sees."""

    resolution: int
    """Height and width in pixels, a power of two from 16 to 512."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    num_classes: int
    """Number of labels; 0: unconditional."""

    def __post_init__(self) -> None:
        if self.resolution not in (16, 32, 64, 128, 256, 512) or self.channels not in (1, 3) or self.num_classes < 0:
            raise ValueError(f"no network for {self.resolution}² × {self.channels} and {self.num_classes} classes")


# A class that speaks as loud as z (std 1) is all that G hears: images of a class then hardly differed (spread over z
# 0.48 of the real images' after 80 kimg of Fashion-MNIST, against 0.80 with 0.3).
_G_EMBEDDING_STD = 0.3


def build(config: NetworkConfig, shape: ImageShape, seed: int) -> tuple[dcgan.Generator, dcgan.Discriminator]:
    """G and D with initial weights that depend on (config, shape, seed) only; on CPU, channels-last."""
    G = dcgan.Generator(**dataclasses.asdict(shape), **_sizes(config), z_dim=config.z_dim)
    D = dcgan.Discriminator(**dataclasses.asdict(shape), **_sizes(config))
    generator = torch.Generator().manual_seed(seed)
    networks: list[tuple[nn.Module, float]] = [(G, _G_EMBEDDING_STD), (D, 1.0)]
    for network, embedding_std in networks:
        dcgan.initialise(network, generator, embedding_std=embedding_std)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return G, D


def _sizes(config: NetworkConfig) -> dict[str, int]:
    return {"base_width": config.base_width, "max_width": config.max_width}
