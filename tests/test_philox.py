"""Randomness is golden-tested: no library upgrade may move it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import philox


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        # The known answers published with the Random123 library, philox4x32 with 10 rounds.
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_words_are_the_published_ones(counter: list[int], key: tuple[int, int], wanted: list[int]) -> None:
    assert philox.philox4x32(philox.Key(*key), np.array([counter], dtype=np.uint64))[0].tolist() == wanted


def test_streams_and_values_are_golden() -> None:
    key = philox.stream_key(7, "z", 3)
    assert key == philox.Key(1860875987, 2156622200)
    assert philox.normals(key, np.array([0, 10**9]), 3).tolist() == [
        [0.43172743916511536, 0.6020026803016663, -0.054047562181949615],
        [0.5123530626296997, 0.1890115737915039, -0.8902782797813416],
    ]
    assert philox.permutation(key, 8).tolist() == [0, 3, 5, 4, 6, 1, 2, 7]
    assert philox.below(key, 10**12) == 150_982_565_656


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 9))
def test_a_value_depends_on_its_index_alone(index: list[int], count: int, more: int) -> None:
    key = philox.stream_key(1, "test")
    together = philox.normals(key, np.array(index), count + more)
    for row, i in enumerate(index):
        assert np.array_equal(philox.normals(key, np.array([i]), count)[0], together[row, :count])


@given(st.integers(1, 3000), st.integers(0, 100))
def test_permutation_holds_each_once(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(philox.permutation(philox.stream_key(seed, "p"), size)), np.arange(size))


@given(st.integers(1, 2**31), st.integers(0, 2**40))
def test_integers_stay_in_bounds(bound: int, index: int) -> None:
    value = philox.integers(philox.stream_key(0, "i"), np.array([index]), bound)[0]
    assert 0 <= value < bound
    assert 0 <= philox.below(philox.stream_key(index, "b"), bound) < bound


def test_uniforms_never_reach_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, wanted in ((0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24), (2**31, 0.5 + 2.0**-24)):
        monkeypatch.setattr(philox, "words", lambda *_, word=word: np.full((1, 1), word, np.uint64))
        assert philox.uniforms(philox.Key(0, 0), np.zeros(1, np.int64), 1)[0, 0] == np.float32(wanted)


def test_signs_are_the_bits_of_the_words() -> None:
    key, index = philox.stream_key(7, "signs"), np.array([3, 10**10])
    words = philox.words(key, index, 2)
    wanted = [[1 if int(words[row, bit // 32]) >> bit % 32 & 1 else -1 for bit in range(40)] for row in range(2)]
    assert philox.signs(key, index, 40).tolist() == wanted


def test_normals_are_normal() -> None:
    values = philox.normals(philox.stream_key(0, "moments"), np.arange(20_000), 10).astype(np.float64)
    # 200,000 draws: the standard errors of mean, variance and kurtosis are 0.0022, 0.0032 and 0.011; five of each.
    assert abs(values.mean()) < 0.011
    assert abs(values.var() - 1) < 0.016
    assert abs((values**4).mean() - 3) < 0.11
    assert np.abs(np.corrcoef(values.T) - np.eye(10)).max() < 5 / np.sqrt(20_000)


def test_streams_differ() -> None:
    index = np.arange(100)
    draws = [
        philox.words(philox.stream_key(*stream), index, 1).tolist()
        for stream in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 1))
    ]
    assert len({str(draw) for draw in draws}) == len(draws)
