"""Pure functions of `cur_nimg`, images seen: there are no scheduler objects to save."""


def ema_beta(cur_nimg: int, batch_size: int, half_life_nimg: float, ramp: float) -> float:
    """The share of G_ema that survives one iteration.

    0.5 ** (batch / half-life), the half-life no longer than `ramp` × cur_nimg so that early weights are forgotten.
    """
    half_life = min(half_life_nimg, ramp * cur_nimg) if ramp > 0 else half_life_nimg
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0
