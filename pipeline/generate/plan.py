"""What a generation run will make: pure, written before anything is made, and equal on every rerun."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import images, philox
from pipeline.config import ConfigError, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to make, and how it is stored."""

    num_images: int = 1000
    """Images to make."""
    seed: int = 0
    """Seed of the noise: image i depends on (snapshot, seed, i) only."""
    labels: Literal["balanced"] = "balanced"
    """Which class image i shows: balanced takes them in turn."""
    shard_size: int = 1000
    """Images of a shard."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """Encoding of the images."""
    quality: int = 95
    """Quality of jpeg and webp, 1 to 100."""
    micro_batch: int = 100
    """Images of one forward pass."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the forward pass."""

    def __post_init__(self) -> None:
        for name in ("num_images", "shard_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must lie between 1 and 100, not {self.quality}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """A run worked out: shards, seeds, labels."""

    config: GenerateConfig
    snapshot_digest: str
    resolution: int
    channels: int
    z_dim: int
    classes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """Shards of the run."""
        return -(-self.config.num_images // self.config.shard_size)

    def seeds(self, shard: int) -> NDArray[np.int64]:
        """The numbers i of the images of a shard: int64, ascending."""
        start = shard * self.config.shard_size
        return np.arange(start, min(start + self.config.shard_size, self.config.num_images), dtype=np.int64)

    def labels(self, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
        """The class of image i: in turn; 0 without classes."""
        return seeds % max(1, len(self.classes))

    def noise(self, seeds: NDArray[np.int64]) -> NDArray[np.float32]:
        """z of image i, float32 [n, Z], from a stream keyed (seed, i)."""
        return philox.normals(philox.stream_key(self.config.seed, "generate/z"), seeds, self.z_dim)

    def to_dict(self) -> Mapping[str, Any]:
        """The plan as plan.json holds it: all that the stored bytes depend on."""
        return {
            "config": to_dict(self.config),
            "snapshot_digest": self.snapshot_digest,
            "encoder": images.encoder(self.config.image_format),
            "threads_per_worker": 1,
            "compile": False,
        }
