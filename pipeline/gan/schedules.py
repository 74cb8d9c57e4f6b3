"""Pure functions of `cur_nimg`, images seen: there are no scheduler objects to save."""

import math
from typing import Literal

Schedule = tuple[float, ...]
"""One value that holds, or two: where it starts and where it has arrived once the burn-in is over."""

BurnIn = Literal["cosine", "linear"]


def value_at(schedule: Schedule, cur_nimg: int, burn_in_nimg: float, shape: BurnIn) -> float:
    """The value at a clock: start + (end − start) · t, or with ½ (1 − cos π t), t = min(1, cur_nimg / burn-in)."""
    start, end = schedule[0], schedule[-1]
    if start == end or cur_nimg >= burn_in_nimg:
        return end
    share = cur_nimg / burn_in_nimg
    return start + (end - start) * (share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2)


def ema_beta(cur_nimg: int, batch_size: int, half_life_nimg: float, ramp: float) -> float:
    """The share of G_ema that survives one iteration.

    0.5 ** (batch / half-life), the half-life no longer than `ramp` × cur_nimg so that early weights are forgotten.
    """
    half_life = min(half_life_nimg, ramp * cur_nimg) if ramp > 0 else half_life_nimg
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0
