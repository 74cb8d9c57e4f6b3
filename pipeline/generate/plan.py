"""What a generation run will make: pure, written before anything is made, and equal on every rerun."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import images, philox
from pipeline.config import ConfigError, to_dict

_MAX_COUNTED_IMAGES = 2**31
"""With class counts: a number times a step stays below 2**63."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to make, and how it is stored."""

    num_images: int = 1000
    """Images to make."""
    seed: int = 0
    """Seed of the noise: image i depends on (snapshot, seed, i) only."""
    labels: Literal["balanced", "as-dataset"] = "balanced"
    """Which class image i shows: balanced takes them in turn, as-dataset gives each the share of the images that it has
    of the dataset which was trained on, well mixed."""
    class_counts: tuple[int, ...] = ()
    """Images of each class, by label, well mixed; they must add up to num_images. Empty: as `labels` says."""
    truncation: float = 1.0
    """z is multiplied by this: below 1 images are more alike and more typical of their class."""
    shard_size: int = 1000
    """Images of a shard."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """Encoding of the images."""
    quality: int = 95
    """Quality of jpeg and webp, 1 to 100."""
    micro_batch: int = 0
    """Images of one forward pass; 0: 100, and fewer of more than 72² pixels, so that a CPU's caches hold what lies
    between two layers; on a GPU sixteen times as many, up to 256."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the forward pass."""
    compile: bool = False
    """torch.compile G. Pays on GPUs, in long runs."""
    score: bool = False
    """Store with each image what D says of it as it is stored: its logit, higher is more like a real one."""

    reject_share: float = 0.0
    """Share of images, those that D likes least, that are tried again with other noise; 0: none. D's score of a pilot
    of images says how low that is."""
    pilot_images: int = 10_000
    """Images of the pilot."""
    max_tries: int = 8
    """Noises tried for one image; if none of them is good enough, the best is taken."""

    def __post_init__(self) -> None:
        self._check_rejection()
        for name, least in (("num_images", 1), ("shard_size", 1), ("micro_batch", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        self._check_classes()
        if self.truncation < 0:
            raise ConfigError(f"truncation must not be negative, and is {self.truncation}")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must lie between 1 and 100, not {self.quality}")

    def _check_rejection(self) -> None:
        if not 0 <= self.reject_share < 1:
            raise ConfigError(f"reject_share must be at least 0 and below 1, and is {self.reject_share}")
        if self.pilot_images < 1 or self.max_tries < 2:
            raise ConfigError("pilot_images must be at least 1 and max_tries at least 2")

    def _check_classes(self) -> None:
        counts = self.class_counts
        if counts and self.labels == "as-dataset":
            raise ConfigError(
                "class_counts and labels as-dataset both say how many images a class has; give one of them"
            )
        if counts and (min(counts) < 0 or sum(counts) != self.num_images):
            raise ConfigError(
                f"class_counts {counts} must not be negative and must add up to num_images {self.num_images}, "
                f"not {sum(counts)}"
            )
        if (counts or self.labels == "as-dataset") and self.num_images > _MAX_COUNTED_IMAGES:
            raise ConfigError(
                f"num_images must be at most {_MAX_COUNTED_IMAGES} with class_counts or labels as-dataset"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """A run worked out: shards, seeds, labels."""

    config: GenerateConfig
    snapshot_digest: str
    resolution: int
    channels: int
    z_dim: int
    classes: tuple[str, ...]
    reject_below: float | None = None
    """An image of which D's logit is lower is tried again; None: every image is taken."""
    dataset_counts: tuple[int, ...] = ()
    """Samples of each class in the dataset that was trained on, by label; empty: not known."""

    def __post_init__(self) -> None:
        if self.config.labels == "as-dataset":
            self._check_dataset_counts()
        if self.config.class_counts and len(self.config.class_counts) != len(self.classes):
            raise ConfigError(
                f"class_counts names {len(self.config.class_counts)} classes and the snapshot has {len(self.classes)}; "
                "give one number for each"
            )

    def _check_dataset_counts(self) -> None:
        assert len(self.dataset_counts) in (0, len(self.classes))
        if not self.classes:
            raise ConfigError("labels is as-dataset and the snapshot has no classes; set --generate.labels balanced")
        if not any(self.dataset_counts):
            raise ConfigError(
                "labels is as-dataset and the snapshot does not say how many samples each class had: it or its dataset "
                "was made by an earlier version; give the numbers with --generate.class-counts, or prepare and train "
                "again"
            )

    @property
    def num_shards(self) -> int:
        """Shards of the run."""
        return -(-self.config.num_images // self.config.shard_size)

    def seeds(self, shard: int) -> NDArray[np.int64]:
        """The numbers i of the images of a shard: int64, ascending."""
        start = shard * self.config.shard_size
        return np.arange(start, min(start + self.config.shard_size, self.config.num_images), dtype=np.int64)

    @functools.cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each class, by label; empty without classes."""
        if self.config.labels == "as-dataset":
            return apportion(self.config.num_images, self.dataset_counts)
        return self.config.class_counts or apportion(self.config.num_images, [1] * len(self.classes))

    def labels(self, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
        """The class of image i: in turn, or so that each run of images has its share of every class; 0 without."""
        if self.config.labels == "balanced" and not self.config.class_counts:
            return seeds % max(1, len(self.classes))
        # A step of about the golden ratio of the total, without a common factor, visits each place once and leaves no
        # part of the range for long; class c owns counts[c] places in a row. No table of all images is needed.
        places = seeds * _golden_step(self.config.num_images) % self.config.num_images
        return np.searchsorted(np.cumsum(self.class_counts), places, side="right").astype(np.int64)

    def noise(self, seeds: NDArray[np.int64], attempt: int = 0) -> NDArray[np.float32]:
        """z of image i, float32 [n, Z], from a stream keyed (seed, i), and of its later attempts."""
        return self._normals(philox.stream_key(self.config.seed, "generate/z", *([attempt] if attempt else [])), seeds)

    def pilot(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """z, float32 [P, Z], and label of the pilot's images: none of the plan's, its classes in the same shares."""
        places = np.arange(self.config.pilot_images, dtype=np.int64)
        z = self._normals(philox.stream_key(self.config.seed, "generate/pilot"), places)
        return z, self.labels(places * self.config.num_images // self.config.pilot_images)

    def _normals(self, key: philox.Key, places: NDArray[np.int64]) -> NDArray[np.float32]:
        return philox.normals(key, places, self.z_dim) * np.float32(self.config.truncation)

    def to_dict(self) -> Mapping[str, Any]:
        """The plan as plan.json holds it: all that the stored bytes depend on."""
        config = dict(to_dict(self.config))
        body: dict[str, Any] = {
            "compile": config.pop("compile"),
            "config": config,
            "snapshot_digest": self.snapshot_digest,
            "encoder": images.encoder(self.config.image_format),
            "threads_per_worker": 1,
        }
        # Where the config does not say them already; so the plans of earlier versions stay what they are.
        if self.config.labels == "as-dataset":
            body["class_counts"] = self.class_counts
        if self.config.reject_share:
            body["reject_below"] = self.reject_below
        else:
            for name in ("reject_share", "pilot_images", "max_tries"):
                del config[name]
        return body


def with_micro_batch(config: GenerateConfig, resolution: int, use_gpu: bool) -> GenerateConfig:
    """The configuration with a micro-batch, where it leaves that open. Measured on two cores, DCGAN at 256², bf16:
    6.6 ms an image in passes of 8, 19.6 ms in passes of 100; at 32² more is a little faster.
    """
    pixels, most = (2**23, 256) if use_gpu else (2**19, 100)
    return dataclasses.replace(config, micro_batch=config.micro_batch or max(1, min(most, pixels // resolution**2)))


def apportion(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` shared out in proportion to whole weights, not all 0, by largest remainders: each share is its quota
    rounded down or up, and of equal remainders the first is rounded up. No weights: no shares.
    """
    whole = sum(weights)
    quotas = [divmod(total * weight, whole) for weight in weights]  # whole numbers: exact, whatever the size
    shares = [share for share, _ in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda place: -quotas[place][1])  # stable: ties in order
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return tuple(shares)


def _golden_step(total: int) -> int:
    """The number nearest to total / φ from below that has no factor in common with it."""
    step = max(1, int(total * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, total) > 1:
        step -= 1
    return step
