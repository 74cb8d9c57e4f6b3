"""Every metric of one set of images against a reference, each with its standard error."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.jackknife import Estimate, error_of
from pipeline.evaluate.kernel import kid_of_groups
from pipeline.evaluate.moments import fid_of_groups, moments
from pipeline.evaluate.neighbours import neighbourhood

NAMES = ("fid", "kid", "precision", "recall", "density", "coverage", "inception_score")
GROUPS = 10
K = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What the metrics need of N samples."""

    features: NDArray[np.float32]
    """[N, F]."""
    logits: NDArray[np.float32]
    """[N, K], of the classifier whose features they are."""
    labels: NDArray[np.int64]
    """[N]; 0 without classes."""

    def of(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Described":
        """Some of the samples."""
        return Described(features=self.features[rows], logits=self.logits[rows], labels=self.labels[rows])


def compare(reference: Described, other: Described) -> Mapping[str, Estimate]:
    """FID, KID, precision, recall, density and coverage of `other`, and its Inception Score.

    Both sides have the same number of samples, at least 2 · GROUPS: FID and recall of sets of other sizes are other
    numbers. Samples are in an order that says nothing, so that slices of it are like draws. Errors of FID and KID are
    of both sides' draws; those of precision, density and Inception Score of `other`'s, of recall and coverage of
    `reference`'s, the other side as it is.
    """
    assert len(reference.features) == len(other.features) >= 2 * GROUPS
    sides = [np.array_split(side.features.astype(np.float64), GROUPS) for side in (reference, other)]
    near = neighbourhood(reference.features, other.features, K)
    means = {
        "precision": near.precise.astype(np.float64),
        "recall": near.recalled.astype(np.float64),
        "density": near.density,
        "coverage": near.covered.astype(np.float64),
    }
    result = {
        "fid": fid_of(reference, other),
        "kid": kid_of_groups(*sides),
        **{name: of_groups(np.array_split(values, GROUPS), _mean) for name, values in means.items()},
        "inception_score": of_groups(np.array_split(other.logits, GROUPS), inception_score),
    }
    assert tuple(result) == NAMES
    return result


def of_classes(sides: Sequence[Described], num_classes: int) -> Mapping[int, Sequence[Described]]:
    """What there is of each class on each side, the first samples of it: as many as the side with the fewest has. A
    class with fewer than 2 · GROUPS on one side is left out.
    """
    result = {}
    for label in range(num_classes):
        rows = [np.flatnonzero(side.labels == label) for side in sides]
        count = min(map(len, rows))
        if count >= 2 * GROUPS:
            result[label] = [side.of(some[:count]) for side, some in zip(sides, rows, strict=True)]
    return result


def fid_of(reference: Described, other: Described) -> Estimate:
    """FID alone, of samples as `compare` takes them."""
    sides = (np.array_split(side.features, GROUPS) for side in (reference, other))
    return fid_of_groups(*([moments(group) for group in side] for side in sides))


def of_groups(groups: Sequence[NDArray[np.floating]], statistic: Callable[[NDArray[np.floating]], float]) -> Estimate:
    """A statistic of all samples, and its error from leaving out each group."""
    left_out = [statistic(np.concatenate([*groups[:out], *groups[out + 1 :]])) for out in range(len(groups))]
    return Estimate(value=statistic(np.concatenate(groups)), error=error_of(left_out))


def inception_score(logits: NDArray[np.floating]) -> float:
    """exp E KL(p(y|x) ‖ p(y)), from a classifier's logits [N, K] (Salimans et al. 2016, section 4): between 1 and K."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_each = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    each = np.exp(log_each)
    log_all = np.log(each.mean(axis=0))
    return math.exp(float((each * (log_each - log_all)).sum(axis=1).mean()))


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.mean())
