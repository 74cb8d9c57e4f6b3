"""Published recipes, and small ones for two cores: networks, step, batch and length under one name."""

import dataclasses
from collections.abc import Mapping

from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset sets. Lengths follow the source; where it names none, a round figure."""

    network: NetworkConfig
    step: StepConfig
    batch_size: int
    """B, images of the global batch."""
    num_lanes: int
    """The most workers."""
    total_kimg: float
    """Length in thousand images."""
    mirror: bool = False
    """Train on each image and its mirror image."""


# Radford et al. 2016, section 4: z 100, batch 128, Adam 2e-4 with beta1 0.5.
_DCGAN = Recipe(network=NetworkConfig(), step=StepConfig(), batch_size=128, num_lanes=8, total_kimg=5000.0)

# Half the published width and batch: what two cores train to recognisable garments in five minutes.
_DCGAN_SMALL = Recipe(
    network=NetworkConfig(z_dim=64, base_width=32), step=StepConfig(), batch_size=64, num_lanes=8, total_kimg=360.0
)

# Miyato et al. 2018, table 3 and appendix B: five D steps a G step, 100,000 G steps of 64, decay to 0.
_SNGAN = Recipe(
    network=NetworkConfig(name="sngan", z_dim=128, base_width=256, max_width=256, d_width_ratio=0.5),
    step=StepConfig(
        loss="hinge",
        d_steps=5,
        g_lr=(2e-4, 0.0),
        d_lr=(2e-4, 0.0),
        beta1=0.0,
        beta2=(0.9,),
        burn_in="linear",
        burn_in_kimg=6400.0,
    ),
    batch_size=64,
    num_lanes=8,
    total_kimg=6400.0,
)


def _r3gan(
    *,
    resolution: int,
    width: tuple[int, int],
    classes: bool,
    gamma: float,
    ema_kimg: float,
    augment_p: float,
    burn_in_kimg: float,
    total_kimg: float,
    batch_size: int,
    group_width: int = 16,
    bf16_stages: int = 4,
) -> Recipe:
    """Huang et al. 2024, appendix: every value goes from its start to its end by one cosine over the burn-in."""
    network = NetworkConfig(
        name="r3gan",
        resolution=resolution,
        labels="required" if classes else "ignored",
        z_dim=64,
        base_width=width[0],
        max_width=width[1],
        group_width=group_width,
        bf16_stages=bf16_stages,
    )
    step = StepConfig(
        loss="relativistic",
        penalty="r1_r2",
        gamma=(gamma, gamma / 10),
        g_lr=(2e-4, 5e-5),
        d_lr=(2e-4, 5e-5),
        beta1=0.0,
        beta2=(0.9, 0.99),
        ema_half_life_kimg=(0.0, ema_kimg),
        ema_ramp=0.0,
        burn_in_kimg=burn_in_kimg,
        augment=AugmentConfig(mode="fixed", p=(0.0, augment_p)),
    )
    return Recipe(network=network, step=step, batch_size=batch_size, num_lanes=64, total_kimg=total_kimg, mirror=True)


# R3GAN's mathematics at a size that two cores train to garments in minutes: small batches and long steps, since a run
# is short. With batch 64 and half the step, or gamma falling to 0.1, shapes were there and stripes over them.
_R3GAN_TINY = Recipe(
    network=NetworkConfig(
        name="r3gan", resolution=32, z_dim=64, base_width=32, max_width=128, d_width_ratio=0.5, depth=1
    ),
    step=StepConfig(
        loss="relativistic",
        penalty="r1_r2",
        gamma=(1.0, 0.2),
        g_lr=(1e-3, 2e-4),
        d_lr=(1e-3, 2e-4),
        beta1=0.0,
        beta2=(0.9, 0.99),
        ema_half_life_kimg=(0.0, 10.0),
        ema_ramp=0.0,
        burn_in_kimg=100.0,
    ),
    batch_size=32,
    num_lanes=8,
    total_kimg=150.0,
)

RECIPES: Mapping[str, Recipe] = {
    "dcgan": _DCGAN,
    "dcgan-small": _DCGAN_SMALL,
    "sngan": _SNGAN,
    "r3gan-tiny": _R3GAN_TINY,
    "r3gan-cifar10": _r3gan(
        resolution=32,
        width=(768, 768),
        classes=True,
        gamma=0.05,
        ema_kimg=5000.0,
        augment_p=0.55,
        burn_in_kimg=20_000.0,
        total_kimg=250_000.0,
        batch_size=512,
        bf16_stages=3,
    ),
    "r3gan-ffhq64": _r3gan(
        resolution=64,
        width=(384, 768),
        classes=False,
        gamma=2.0,
        ema_kimg=500.0,
        augment_p=0.3,
        burn_in_kimg=20_000.0,
        total_kimg=100_000.0,
        batch_size=256,
    ),
    "r3gan-ffhq256": _r3gan(
        resolution=256,
        width=(96, 768),
        classes=False,
        gamma=150.0,
        ema_kimg=500.0,
        augment_p=0.3,
        burn_in_kimg=20_000.0,
        total_kimg=100_000.0,
        batch_size=256,
    ),
    "r3gan-imagenet32": _r3gan(
        resolution=32,
        width=(1536, 1536),
        classes=True,
        gamma=0.5,
        ema_kimg=50_000.0,
        augment_p=0.5,
        burn_in_kimg=200_000.0,
        total_kimg=1_000_000.0,
        batch_size=4096,
        group_width=32,
        bf16_stages=3,
    ),
    "r3gan-imagenet64": _r3gan(
        resolution=64,
        width=(1536, 1536),
        classes=True,
        gamma=1.0,
        ema_kimg=50_000.0,
        augment_p=0.4,
        burn_in_kimg=200_000.0,
        total_kimg=1_000_000.0,
        batch_size=4096,
        group_width=32,
    ),
}
