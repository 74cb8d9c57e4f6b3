"""What is read in each case, and how a contender is told."""

import dataclasses
from pathlib import Path

from pipeline.images import ImageFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One dataset and the batches to make of it."""

    name: str
    resolution: int
    """Height and width in pixels; three channels."""
    image_format: ImageFormat
    num_samples: int
    shard_size: int
    """Samples a shard."""
    batch_size: int
    """B, images of a batch."""
    highest_rate: int
    """Images a second that no contender reaches: plans are made long enough for it."""

    @property
    def extension(self) -> str:
        """Of the images in a shard."""
        return {"jpeg": "jpg", "png": "png"}[self.image_format]

    def folder(self, cache: Path) -> Path:
        """Where its dataset lies."""
        return cache / f"{self.name}-{self.num_samples}"

    def shards(self, cache: Path) -> list[str]:
        """Its tars, by path."""
        return sorted(map(str, (self.folder(cache) / "train").glob("*.tar")))


def cases(quick: bool) -> list[Case]:
    """The two cases of the benchmark, small if `quick`."""
    jpeg256 = Case(
        name="jpeg256",
        resolution=256,
        image_format="jpeg",
        num_samples=1_000 if quick else 36_000,
        shard_size=125 if quick else 1_000,
        batch_size=64,
        highest_rate=12_000,
    )
    png32 = Case(
        name="png32",
        resolution=32,
        image_format="png",
        num_samples=4_000 if quick else 200_000,
        shard_size=500 if quick else 5_000,
        batch_size=256,
        highest_rate=60_000,
    )
    return [jpeg256, png32]
