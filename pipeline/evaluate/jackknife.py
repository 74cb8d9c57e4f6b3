"""How sure a number is that was computed from groups of samples, such as shards."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


def error_of(left_out: Sequence[float]) -> float:
    """The delete-a-group jackknife's standard error, from the values that leave one group out each (Efron 1982).

    A bootstrap would be biased for FID: it repeats samples, and fewer different ones mean a larger distance.
    """
    groups = len(left_out)
    assert groups > 1
    spread = np.asarray(left_out) - np.mean(left_out)
    return math.sqrt((groups - 1) / groups * float(spread @ spread))
