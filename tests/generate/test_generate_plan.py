"""Which class an image shows: shares that add up, are proportional, and do not depend on anything but the counts."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.dataset import record
from pipeline.generate.plan import GenerateConfig, GeneratePlan, apportion

CLASSES = ("circle", "square", "star")
weights = st.lists(st.integers(0, 10**7), min_size=1, max_size=12).filter(any)


def plan_of(
    classes: tuple[str, ...] = CLASSES, dataset_counts: tuple[int, ...] = (), **settings: object
) -> GeneratePlan:
    return GeneratePlan(
        config=GenerateConfig(**settings),  # type: ignore[arg-type]
        snapshot_digest="s",
        resolution=16,
        channels=1,
        z_dim=8,
        classes=classes,
        dataset_counts=dataset_counts,
    )


@given(st.integers(1, 10**9), weights)
def test_shares_add_up_and_are_proportional_within_one(total: int, counts: list[int]) -> None:
    shares = apportion(total, counts)
    quotas = [Fraction(total * count, sum(counts)) for count in counts]
    assert sum(shares) == total
    assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    # No one who was rounded down was left with more than one who was rounded up.
    left = [quota - int(quota) for share, quota in zip(shares, quotas, strict=True) if share <= quota]
    given_more = [quota - int(quota) for share, quota in zip(shares, quotas, strict=True) if share > quota]
    assert not given_more or max(left, default=Fraction(0)) <= min(given_more)


@given(st.integers(1, 1000), st.data())
def test_the_order_of_classes_decides_between_equals_only(total: int, data: st.DataObject) -> None:
    counts = data.draw(weights)
    order = data.draw(st.permutations(range(len(counts))))
    shares, moved = apportion(total, counts), apportion(total, [counts[place] for place in order])
    for count in set(counts):
        equals = [share for share, own in zip(shares, counts, strict=True) if own == count]
        assert equals == sorted(equals, reverse=True)  # the lower label has the one more
    if len({count * total % sum(counts) for count in counts}) == len(counts):
        assert moved == tuple(shares[place] for place in order)


@pytest.mark.parametrize(
    ("total", "counts", "wanted"),
    [
        (10, [1, 1, 1], (4, 3, 3)),
        (11, [1, 1, 1], (4, 4, 3)),
        (2, [1, 2, 1], (1, 1, 0)),  # remainders ½, 0, ½
        (1, [1, 1000], (0, 1)),
        (7, [0, 5, 0], (0, 7, 0)),
        (100, [416, 338, 216, 30], (42, 34, 21, 3)),
        (3, [2**60, 2**60 + 1], (1, 2)),  # remainders that a float cannot tell apart
        (5, [], ()),
    ],
)
def test_known_shares(total: int, counts: list[int], wanted: tuple[int, ...]) -> None:
    assert apportion(total, counts) == wanted


@given(st.lists(st.integers(0, 400), min_size=3, max_size=3).filter(any), st.integers(1, 1500), st.data())
def test_as_dataset_is_exact_well_mixed_and_random_access(counts: list[int], total: int, data: st.DataObject) -> None:
    plan = plan_of(dataset_counts=tuple(counts), labels="as-dataset", num_images=total)
    labels = plan.labels(np.arange(total))
    assert tuple(np.bincount(labels, minlength=3).tolist()) == plan.class_counts == apportion(total, counts)
    same = plan_of(num_images=total, class_counts=plan.class_counts)
    assert np.array_equal(labels, same.labels(np.arange(total)))
    some = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=9)))
    assert np.array_equal(plan.labels(some), labels[some])
    if total >= 300:  # each tenth has its share, within two standard deviations of independent draws
        for part in np.array_split(labels, 10):
            share = np.bincount(part, minlength=3) - np.array(plan.class_counts) * len(part) / total
            assert abs(share).max() <= len(part) ** 0.5


@given(st.integers(1, 100), st.integers(0, 7))
def test_class_counts_are_those_of_the_labels_in_turn_too(total: int, num_classes: int) -> None:
    plan = plan_of(tuple("abcdefg"[:num_classes]), num_images=total)
    labels = plan.labels(np.arange(total))
    assert plan.class_counts == tuple(np.bincount(labels, minlength=num_classes).tolist()[:num_classes])


def test_the_stored_plan_says_the_numbers_and_earlier_plans_stay_what_they_were() -> None:
    first = plan_of(dataset_counts=(6, 3, 1), labels="as-dataset", num_images=20)
    stored = json.loads(record.encode_json(first.to_dict()))
    assert stored["config"]["labels"] == "as-dataset"
    assert stored["class_counts"] == [12, 6, 2]
    for plain in (plan_of(num_images=20), plan_of(num_images=20, class_counts=(5, 5, 10))):
        assert plain.to_dict().keys() == {"config", "snapshot_digest", "encoder", "threads_per_worker", "compile"}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"classes": ()}, "has no classes; set --generate.labels balanced"),
        ({}, "does not say how many samples each class had.*--generate.class-counts"),
        ({"dataset_counts": (0, 0, 0)}, "does not say how many samples each class had"),
        ({"dataset_counts": (1, 1, 1), "class_counts": (400, 300, 300)}, "both say how many images a class has"),
        ({"dataset_counts": (1, 1, 1), "num_images": 2**31 + 1}, "at most 2147483648"),
    ],
)
def test_as_dataset_is_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        plan_of(labels="as-dataset", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_counts_of_the_dataset_change_nothing_unless_asked_for() -> None:
    plan = plan_of(dataset_counts=(6, 3, 1), num_images=9)
    assert plan.labels(np.arange(9)).tolist() == [0, 1, 2] * 3
    assert plan.to_dict() == plan_of(num_images=9).to_dict()
