"""All that is said of copies: of training images, and within the generated set."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from pipeline.evaluate.memorisation import CopyTest, Neighbours, findable_share
from pipeline.images import Pixels

ALARM = 1e-3
"""The p-value that `findable_share` is stated for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """Of N generated images."""

    test: CopyTest
    """Whether more of them lie near to training images than held-out images do."""
    num_tested: int
    """Images a side that the test compares."""
    training_samples: int
    """Training images that they were looked for in."""
    training_images: int
    """Of so many that there are."""
    to_training: Neighbours
    """The nearest training image of each."""
    inside: Neighbours
    """The nearest other generated image of each."""
    repeated_in_reference: int
    """Held-out images with another one nearer than the test's limit."""
    exact_in_training: int
    """Generated images equal to a training image, at the size at which classifiers see them."""
    exact_inside: int
    """Generated images equal to an earlier generated one, at that size."""

    def report(self) -> Mapping[str, Any]:
        """As JSON will have it."""
        return {
            **dataclasses.asdict(self.test),
            "num_tested": self.num_tested,
            "training_samples": self.training_samples,
            "training_images": self.training_images,
            "findable_share": self._findable_share(),
            "repeated": int((self.inside.distance < self.test.limit).sum()),
            "repeated_in_reference": self.repeated_in_reference,
            "exact_in_training": self.exact_in_training,
            "exact_inside": self.exact_inside,
        }

    def _findable_share(self) -> float:
        """Of copies of any training image: only those of images that were looked in can be found."""
        return min(1.0, findable_share(self.num_tested, ALARM) * self.training_images / self.training_samples)


def exact(gen: Pixels, training: Pixels) -> tuple[int, int]:
    """How many of the generated images are equal to a training image, and how many to an earlier generated one."""
    digests, known = _digests(gen), set(_digests(training))
    return sum(digest in known for digest in digests), len(digests) - len(set(digests))


def _digests(pixels: Pixels) -> list[bytes]:
    return [hashlib.sha256(one.tobytes()).digest() for one in pixels]
