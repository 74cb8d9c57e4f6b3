"""The plan of `prepare`, pure."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.prepare import plan as plans
from pipeline.prepare import sources
from pipeline.prepare.plan import PrepareConfig
from tests.prepare import trees


@given(st.dictionaries(st.sampled_from(["train", "test", "val"]), st.integers(1, 5000)), st.integers(1, 700))
def test_units_cover_every_position_once(counts: dict[str, int], shard_size: int) -> None:
    units = plans.units(counts, shard_size)
    for split, count in counts.items():
        covered = [i for u in units if u.split == split for i in range(u.start, u.stop)]
        assert covered == list(range(count))
    assert all(u.start == u.number * shard_size and 0 < u.stop - u.start <= shard_size for u in units)


@given(st.integers(0, 2**40), st.integers(1, 3000))
def test_order_is_a_permutation_of_its_seed_and_split(seed: int, count: int) -> None:
    order = plans.order(seed, "train", count)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, plans.order(seed, "train", count))
    if count > 20:
        assert not np.array_equal(order, plans.order(seed + 1, "train", count))
        assert not np.array_equal(order, plans.order(seed, "test", count))


@pytest.mark.parametrize(
    "bad",
    [
        {"resolution": 48},
        {"resolution": 8},
        {"resolution": 1024},
        {"channels": 4},
        {"quality": 0},
        {"shard_size": 0},
        {"max_corrupt_fraction": 1.0},
        {"label_field": "json:"},
        {"label_field": "class"},
        {"label_field": "column:"},
        {"class_names": ("a", "a")},
    ],
)
def test_values_out_of_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PrepareConfig(**bad)  # type: ignore[arg-type]


@given(st.integers(0, 2**40), st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(1, 50))
def test_order_of_blocks_is_a_permutation_of_its_seed(seed: int, sizes: list[int], shard_size: int) -> None:
    blocks = np.array(sizes)
    order = plans.order_of_blocks(seed, "train", blocks, shard_size)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    assert np.array_equal(order, plans.order_of_blocks(seed, "train", blocks, shard_size))


@pytest.mark.parametrize(("per_block", "num_blocks", "reads"), [(100, 3000, 11), (1000, 300, 80), (7, 40_000, 11)])
def test_a_block_is_read_by_few_shards_and_shards_look_like_the_whole(
    per_block: int, num_blocks: int, reads: int
) -> None:
    """Ten classes, sorted: the worst that a source can be."""
    shard_size, count = 1024, per_block * num_blocks
    order = plans.order_of_blocks(3, "train", np.full(num_blocks, per_block), shard_size)
    labels = order * 10 // count
    shards = [order[start : start + shard_size] for start in range(0, count, shard_size)]
    touched = [np.unique(shard // per_block) for shard in shards]
    assert np.bincount(np.concatenate(touched)).mean() <= reads
    full = [np.bincount(labels[start : start + shard_size], minlength=10) for start in range(0, count - 1024, 1024)]
    assert np.abs(np.array(full) / shard_size - 0.1).max() < 0.06  # independent draws: 0.1 ± 0.01
    runs = 1 + int((labels[1:] != labels[:-1]).sum())
    assert abs(count / runs - 1 / 0.9) < 0.01


def test_few_blocks_are_one_shuffle() -> None:
    order = plans.order_of_blocks(3, "train", np.full(100, 100), 1024)
    touched = [len(np.unique(order[start : start + 1024] // 100)) for start in range(0, 9216, 1024)]
    assert min(touched) == 100
    assert not np.array_equal(order, plans.order_of_blocks(4, "train", np.full(100, 100), 1024))


def test_plan_holds_what_the_bytes_depend_on_and_no_more(tmp_path: Path) -> None:
    source = sources.scan(trees.write_folder(tmp_path, trees.folder_files(4)))
    plan = plans.make(source, PrepareConfig())
    assert plan == plans.make(source, PrepareConfig(max_corrupt_fraction=0.5))
    assert plan["splits"] == {"train": 4}
    assert plan["classes"] == ["cat", "dog"]
    assert str(tmp_path) not in str(plan)
    for change in (PrepareConfig(seed=1), PrepareConfig(fit="pad"), PrepareConfig(image_format="webp")):
        assert plans.make(source, change) != plan


def test_limit_is_rounded_down() -> None:
    assert [plans.corrupt_limit(n, 0.01) for n in (1, 99, 100, 250)] == [0, 0, 1, 2]
