"""Which networks a configuration names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from pipeline.gan.networks import dcgan, r3gan, sngan

NetworkName = Literal["dcgan", "sngan", "r3gan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The architecture of G and D; resolution, channels and classes come from the dataset."""

    name: NetworkName = "dcgan"
    """Architecture."""
    resolution: int = 0
    """Pixels a side that these settings are made for; another dataset is refused. 0: any."""
    labels: Literal["as-dataset", "required", "ignored"] = "as-dataset"
    """Learn classes where the dataset has them; refuse a dataset without; or learn none."""
    z_dim: int = 100
    """Size of the latent z."""
    base_width: int = 64
    """Channels of the largest stage: the full resolution, of dcgan half of it; doubled at each stage below."""
    max_width: int = 512
    """Most channels of a stage."""
    d_width_ratio: float = 1.0
    """Channels of D's stages as a share of G's."""
    depth: int = 0
    """Convolutions (dcgan) or residual blocks a stage; 0: one, of r3gan two."""
    group_width: int = 16
    """r3gan: channels of a group of its 3×3 convolutions."""
    g_embed_dim: int = 64
    """r3gan: size of G's class embedding; D's has as many as its widest stage."""
    bf16_stages: int = 0
    """r3gan: stages, from the full resolution down, that may compute in bf16; 0: all."""

    def __post_init__(self) -> None:
        if self.z_dim < 1 or not 1 <= self.base_width <= self.max_width:
            raise ValueError("z_dim must be at least 1, and base_width between 1 and max_width")
        if min(self.depth, self.bf16_stages, self.resolution) < 0 or min(self.group_width, self.g_embed_dim) < 1:
            raise ValueError(
                "depth, bf16_stages and resolution must not be negative, group_width and g_embed_dim be 1 or more"
            )
        if self.d_width_ratio <= 0 or round(self.base_width * self.d_width_ratio) < 1:
            raise ValueError("d_width_ratio must be above 0 and leave D at least one channel")
        widths = [round(width * r) for width in (self.base_width, self.max_width) for r in (1, self.d_width_ratio)]
        if self.name == "r3gan" and any(width % self.group_width for width in widths):
            raise ValueError(f"r3gan's widths {widths} are not all multiples of its group_width {self.group_width}")


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


def shape_for(config: NetworkConfig, resolution: int, channels: int, num_classes: int) -> ImageShape:
    """The shape that networks of a dataset get. Raises ValueError, naming the remedy, where they do not fit it."""
    if config.resolution not in (0, resolution):
        raise ValueError(
            f"network.resolution is {config.resolution} and the images have {resolution}²; prepare them with "
            f"--prepare.resolution {config.resolution}, or choose another preset"
        )
    if config.labels == "required" and not num_classes:
        raise ValueError(
            "network.labels is required and the dataset has no classes; prepare it from a folder a class (or see "
            "--prepare.label-field), or set --network.labels ignored"
        )
    classes = 0 if config.labels == "ignored" else num_classes
    return ImageShape(resolution=resolution, channels=channels, num_classes=classes)


def build(config: NetworkConfig, shape: ImageShape, seed: int) -> tuple[nn.Module, nn.Module]:
    """G and D with initial weights that depend on (config, shape, seed) only; on CPU, channels-last.

    G(z float [N, Z], label int64 [N]) → float32 NCHW; D(image float NCHW, label int64 [N]) → float32 logits [N].
    """
    G, D = assemble(config, shape)
    generator = torch.Generator().manual_seed(seed)
    for network in (G, D):
        _INITIALISE[config.name](network, generator)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return G, D


def assemble(config: NetworkConfig, shape: ImageShape) -> tuple[nn.Module, nn.Module]:
    """G and D before any weights are drawn: on the meta device it costs nothing."""
    return _ASSEMBLE[config.name](config, shape)


def _dcgan(config: NetworkConfig, shape: ImageShape) -> tuple[nn.Module, nn.Module]:
    g_widths, d_widths = _widths(config, 4, shape.resolution // 2)
    both = {"depth": config.depth or 1, "channels": shape.channels, "num_classes": shape.num_classes}
    return dcgan.Generator(widths=g_widths, z_dim=config.z_dim, **both), dcgan.Discriminator(widths=d_widths, **both)


def _sngan(config: NetworkConfig, shape: ImageShape) -> tuple[nn.Module, nn.Module]:
    g_widths, _ = _widths(config, 4, shape.resolution)
    _, d_widths = _widths(config, 8, shape.resolution // 2)
    both = {"depth": config.depth or 1, "channels": shape.channels, "num_classes": shape.num_classes}
    return sngan.Generator(widths=g_widths, z_dim=config.z_dim, **both), sngan.Discriminator(widths=d_widths, **both)


def _r3gan(config: NetworkConfig, shape: ImageShape) -> tuple[nn.Module, nn.Module]:
    g_widths, d_widths = _widths(config, 4, shape.resolution)
    both = {
        "depth": config.depth or 2,
        "group_width": config.group_width,
        "bf16_stages": config.bf16_stages or len(g_widths),
        "channels": shape.channels,
        "num_classes": shape.num_classes,
    }
    G = r3gan.Generator(widths=g_widths, z_dim=config.z_dim, embed_dim=config.g_embed_dim, **both)
    return G, r3gan.Discriminator(widths=d_widths, embed_dim=d_widths[0], **both)


_ASSEMBLE: Mapping[NetworkName, Callable[[NetworkConfig, ImageShape], tuple[nn.Module, nn.Module]]] = {
    "dcgan": _dcgan,
    "sngan": _sngan,
    "r3gan": _r3gan,
}
_INITIALISE: Mapping[NetworkName, Callable[[nn.Module, torch.Generator], None]] = {
    "dcgan": dcgan.initialise,
    "sngan": sngan.initialise,
    "r3gan": r3gan.initialise,
}


def _widths(config: NetworkConfig, lowest_px: int, highest_px: int) -> tuple[list[int], list[int]]:
    """Channels of G's and of D's stages from one resolution to another, doubling downwards up to the cap."""
    stages = (highest_px // lowest_px).bit_length()
    widths = [min(config.max_width, config.base_width * 2 ** (stages - 1 - i)) for i in range(stages)]
    return widths, [round(width * config.d_width_ratio) for width in widths]
