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
        {"class_names": ("a", "a")},
    ],
)
def test_values_out_of_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PrepareConfig(**bad)  # type: ignore[arg-type]


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
