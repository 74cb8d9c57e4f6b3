"""Moments merge as if they had never been apart, and FID is the formula of the paper."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.evaluate.moments import Moments, fid, fid_of_groups, merged, moments, without


def features(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> NDArray[np.float64]:
    """Correlated, and far from zero."""
    chance = np.random.default_rng(seed)
    return chance.normal(size=(count, width)) @ chance.normal(size=(width, width)) + 100 + shift


def assert_close(found: Moments, wanted: Moments) -> None:
    assert found.count == wanted.count
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(found.scatter, wanted.scatter, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 2**32))
def test_parts_merge_and_come_apart(sizes: list[int], seed: int) -> None:
    whole = features(sum(sizes), seed=seed)
    parts = [moments(part) for part in np.split(whole, np.cumsum(sizes)[:-1])]
    assert_close(merged(parts), moments(whole))
    assert_close(without(moments(whole), parts[0]), moments(whole[sizes[0] :]))


def by_the_paper(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    covariances = [np.cov(side, rowvar=False) for side in (one, other)]
    apart = one.mean(0) - other.mean(0)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("width", [1, 6, 64])
def test_fid_is_scipys(width: int) -> None:
    one, other = features(500, width, seed=1), features(300, width, seed=2, shift=0.5)
    wanted = (
        by_the_paper(one, other)
        if width > 1
        else (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    )
    assert fid(moments(one), moments(other)) == pytest.approx(wanted, rel=1e-6)


def test_fid_of_fewer_samples_than_numbers() -> None:
    """Both covariances are singular: by the singular values of the samples themselves."""
    one, other = features(20, 64, seed=1), features(30, 64, seed=2)
    scaled = [(side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (one, other)]
    shared = np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum()
    wanted = ((one.mean(0) - other.mean(0)) ** 2).sum() + sum((side**2).sum() for side in scaled) - 2 * shared
    assert fid(moments(one), moments(other)) == pytest.approx(wanted, rel=1e-6)


def test_fid_of_a_set_and_itself_is_nothing() -> None:
    one = moments(features(100))
    assert fid(one, one) == pytest.approx(0.0, abs=1e-9 * np.trace(one.covariance))


def test_the_error_is_how_far_repeated_draws_lie_apart() -> None:
    """Of normal features 200 times over; the jackknife is known to be a little too large."""
    chance = np.random.default_rng(3)
    drawn = []
    for _ in range(200):
        real, gen = (np.split(chance.normal(size=(400, 4)) + shift, 10) for shift in (0, 0.3))
        drawn.append(fid_of_groups([moments(group) for group in real], [moments(group) for group in gen]))
    spread = np.std([one.value for one in drawn])
    assert 0.8 * spread < np.mean([one.error for one in drawn]) < 1.5 * spread
