"""Schedules and the moving average's factor against closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.gan import schedules


@pytest.mark.parametrize(
    ("cur_nimg", "cosine", "linear"),
    [
        (0, 2.0, 2.0),
        (250, 2.0 - 1.5 * (1 - math.sqrt(0.5)) / 2, 1.625),
        (500, 1.25, 1.25),
        (1000, 0.5, 0.5),
        (10**9, 0.5, 0.5),
    ],
)
def test_values_by_hand(cur_nimg: int, cosine: float, linear: float) -> None:
    assert schedules.value_at((2.0, 0.5), cur_nimg, 1000.0, "cosine") == pytest.approx(cosine)
    assert schedules.value_at((2.0, 0.5), cur_nimg, 1000.0, "linear") == pytest.approx(linear)


@given(st.integers(0, 10**10), st.floats(0, 1e9), st.sampled_from(["cosine", "linear"]))
def test_one_value_holds(cur_nimg: int, burn_in: float, shape: schedules.BurnIn) -> None:
    assert schedules.value_at((3.0,), cur_nimg, burn_in, shape) == 3.0


@given(st.floats(0, 10), st.floats(0, 10), st.lists(st.integers(0, 2000), min_size=2).map(sorted))
def test_a_value_goes_one_way_between_its_ends(start: float, end: float, clocks: list[int]) -> None:
    for shape in ("cosine", "linear"):
        found = [schedules.value_at((start, end), clock, 1000.0, shape) for clock in clocks]
        assert found == sorted(found, reverse=start > end)
        assert all(min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9 for value in found)


@pytest.mark.parametrize("nimg", [0, 64, 100_000])
def test_ema_beta_is_the_closed_form(nimg: int) -> None:
    assert schedules.ema_beta(nimg, 64, 1000.0, 0.0) == pytest.approx(0.5 ** (64 / 1000))
    ramped = schedules.ema_beta(nimg, 64, 1000.0, 0.05)
    assert ramped == pytest.approx(0.5 ** (64 / min(1000, 0.05 * nimg)) if nimg else 0.0)
    assert schedules.ema_beta(nimg, 64, 0.0, 0.05) == 0.0
