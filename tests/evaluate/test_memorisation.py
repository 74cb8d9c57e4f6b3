"""Copies of training images are found, whatever was done to them; where there are none there is no alarm."""

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from pipeline.evaluate.gates import GateConfig
from pipeline.evaluate.memorisation import Small, _at_least, copy_test, findable_share, shrunk, to_training, within
from pipeline.images import Pixels
from tests.evaluate.pictures import pictures

ALARM = 0.01


def shifted(image: Pixels) -> Pixels:
    return np.roll(image, (1, -1), axis=(0, 1))


def jpeg(image: Pixels) -> Pixels:
    coded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 60, "GRAY", "Gray")
    return simplejpeg.decode_jpeg(coded, "GRAY").reshape(image.shape)


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "exact": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "shifted": shifted,
    "JPEG": jpeg,
}


@pytest.fixture(scope="module")
def training() -> Pixels:
    return pictures(4000, seed=0)


@pytest.fixture(scope="module")
def known(training: Pixels) -> Small:
    return shrunk(training)


@pytest.fixture(scope="module")
def held_out(known: Small) -> NDArray[np.float32]:
    return to_training(shrunk(pictures(2000, seed=1)), known).distance


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_half_a_percent_are_found(
    training: Pixels, known: Small, held_out: NDArray[np.float32], kind: str
) -> None:
    gen = pictures(2000, seed=2)
    for place in range(10):
        gen[7 * place] = COPIES[kind](training[100 + place])
    found = to_training(shrunk(gen), known)
    test = copy_test(found.distance, held_out)
    assert test.p_value < ALARM
    assert test.near >= 10
    assert found.place[: 7 * 10 : 7].tolist() == list(range(100, 110))


def test_a_clean_set_passes(known: Small, held_out: NDArray[np.float32]) -> None:
    assert copy_test(to_training(shrunk(pictures(2000, seed=2)), known).distance, held_out).p_value > ALARM


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Of 2,000 clean resamples about one in a hundred has a p-value under 0.01, and one in ten under 0.1."""
    chance = np.random.default_rng(5)
    values = np.array([copy_test(*chance.normal(size=(2, 3000)).astype(np.float32)).p_value for _ in range(2000)])
    for level in (0.01, 0.1):
        share = (values < level).mean()
        assert share < level + 3 * np.sqrt(level / 2000)
        assert share > level / 10  # it can alarm at all


def test_a_test_split_that_holds_training_images_blinds_it_only_to_as_few() -> None:
    """Two of 2,000 held-out images are training images; so are a hundred generated ones, or two."""
    chance = np.random.default_rng(0)
    held_out, gen = chance.uniform(1, 2, (2, 2000)).astype(np.float32)
    held_out[:2] = 0
    gen[:100] = 0
    assert copy_test(gen, held_out).p_value < 1e-6
    gen[2:100] = 1.5
    assert copy_test(gen, held_out).p_value > 0.05


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_probability_is_that_of_drawing_without_putting_back(r: int) -> None:
    """By every order of five of each kind."""
    orders = [set(places) for places in itertools.combinations(range(10), 5)]  # the places of held-out ones

    def before(places: set[int]) -> int:
        return sorted(places)[r - 1] - (r - 1)

    for near in range(6):
        share = Fraction(sum(before(places) >= near for places in orders), len(orders))
        assert _at_least(near, r, 5) == pytest.approx(float(share))


def test_repeated_images_are_told_within_a_set() -> None:
    gen = pictures(300, seed=3)
    gen[200:] = gen[:100]
    found = within(shrunk(gen))
    assert found.place[:100].tolist() == list(range(200, 300))
    assert (found.distance[:100] < 0.1).all()
    assert (found.distance[100:200] > 1).all()


def test_pictures_smaller_than_the_grid_keep_their_pixels() -> None:
    training = shrunk(pictures(50, seed=0, side=8))
    assert training.shape == (50, 8, 8, 1)
    found = to_training(training[:10], training)
    assert found.place.tolist() == list(range(10))


def test_the_share_that_can_be_found_is_found() -> None:
    """So many of n images nearer than all held-out ones alarm, and two fewer do not."""
    for n in (100, 1000, 10_000):
        share = findable_share(n, 1e-3)
        held_out = np.arange(1, n + 1, dtype=np.float32)
        clean = held_out - 0.5
        for count, alarms in ((round(share * n), True), (round(share * n) - 2, False)):
            gen = clean.copy()
            gen[n - count :] = 0.0
            assert (copy_test(gen, held_out).p_value <= 1e-3) == alarms, (n, count)
    assert findable_share(10_000, 1e-3) < 0.005 < findable_share(1000, 1e-3)
    assert findable_share(5, 1e-9) == 1.0


def test_candidates_hold_the_nearest_almost_always(known: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against looking at all of them, over all shifts."""
    held_out, known = shrunk(pictures(60, seed=1)), known[:1500]
    quick = to_training(held_out, known)
    monkeypatch.setattr("pipeline.evaluate.memorisation.CANDIDATES", len(known))
    whole = to_training(held_out, known)
    assert (quick.distance >= whole.distance - 1e-4).all()
    assert (quick.place == whole.place).mean() > 0.95


def test_the_gate_finds_half_a_percent_of_ten_thousand_images() -> None:
    """At the p-value that is the default of the gate and the number of images that is the default, for every kind."""
    training, limit = pictures(10_000, seed=0), GateConfig().min_copies_p_value
    known = shrunk(training)
    held_out, clean = (to_training(shrunk(pictures(10_000, seed)), known).distance for seed in (1, 2))
    assert copy_test(clean, held_out).p_value > limit
    for kind, change in COPIES.items():
        copied = np.stack([change(image) for image in training[100:150]])
        gen = clean.copy()
        gen[::200] = to_training(shrunk(copied), known).distance
        assert copy_test(gen, held_out).p_value < limit, kind
