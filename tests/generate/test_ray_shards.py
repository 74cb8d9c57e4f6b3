"""How shards are dealt out to workers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.generate.ray_shards import blocks_of


@given(st.integers(0, 200_000))
def test_every_shard_is_in_one_block(count: int) -> None:
    assert list(itertools.chain.from_iterable(blocks_of(range(count)))) == list(range(count))


@given(st.integers(1, 200_000))
def test_blocks_are_few_and_the_last_ones_small(count: int) -> None:
    sizes = [len(block) for block in blocks_of(range(count))]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= max(1, count / 1000)
    assert sizes[-1000:] == [1] * min(count, 1000)
    assert len(sizes) <= 7000  # of 1 ms each
