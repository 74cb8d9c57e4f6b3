"""Precision, recall, density and coverage are those of the `prdc` package, in little memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prdc import compute_prdc

from pipeline.evaluate import neighbours
from pipeline.evaluate.neighbours import Neighbourhood, neighbourhood


def means(found: Neighbourhood) -> dict[str, float]:
    return {
        "precision": found.precise.mean(),
        "recall": found.recalled.mean(),
        "density": found.density.mean(),
        "coverage": found.covered.mean(),
    }


def sets(seed: int, sizes: tuple[int, int], shift: float, spread: float) -> list[NDArray[np.float64]]:
    chance = np.random.default_rng(seed)
    return [chance.normal(size=(sizes[0], 8)) + 50, chance.normal(size=(sizes[1], 8)) * spread + 50 + shift]


@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(8, 80), st.integers(8, 80)),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(1, 6),
)
def test_it_is_what_the_package_says(seed: int, sizes: tuple[int, int], shift: float, spread: float, k: int) -> None:
    real, gen = sets(seed, sizes, shift, spread)
    assert means(neighbourhood(real, gen, k)) == pytest.approx(compute_prdc(real, gen, k))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, gen = sets(0, (70, 50), 0.5, 1.0)
    whole = neighbourhood(real, gen)
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 7 * 70 * 8)
    parts = neighbourhood(real, gen)
    for name in ("precise", "density", "recalled", "covered"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_each_defect_moves_what_it_should() -> None:
    real, same = sets(1, (400, 400), 0.0, 1.0)
    good = means(neighbourhood(real, same))
    narrow = means(neighbourhood(real, 50 + 0.3 * (same - 50)))
    far = means(neighbourhood(real, same + 5))
    repeated = means(neighbourhood(real, np.repeat(same[:10], 40, axis=0)))
    assert narrow["precision"] > good["precision"]
    assert narrow["recall"] < 0.7 * good["recall"]
    assert far["precision"] == far["coverage"] == 0
    assert repeated["recall"] == 0
    assert repeated["coverage"] < 0.3 * good["coverage"]


def test_single_precision_is_enough_for_features_far_from_zero() -> None:
    """Distances among features at 1,000, whose squares drown in float32 unless they are centred."""
    real, gen = (side + 1000 for side in sets(2, (300, 300), 0.3, 1.0))
    exact = means(neighbourhood(real, gen))
    single = means(neighbourhood(real.astype(np.float32), gen.astype(np.float32)))
    assert single == pytest.approx(exact, abs=0.01)
