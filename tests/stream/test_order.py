"""The order plan's promises, as properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import plan as prepare_plan
from pipeline.stream.order import OrderPlan, rank_lanes


@st.composite
def plans(draw: st.DrawFn, max_samples: int = 400) -> OrderPlan:
    lanes, lane_size, steps = (draw(st.integers(1, most)) for most in (5, 4, 4))
    chunk_size = lane_size * steps
    return OrderPlan(
        num_samples=draw(st.integers(1, max_samples)),
        seed=draw(st.integers(0, 2**32)),
        batch_size=lanes * lane_size,
        num_lanes=lanes,
        steps_per_group=steps,
        runs_per_chunk=draw(st.sampled_from([m for m in range(1, chunk_size + 1) if chunk_size % m == 0])),
    )


@given(plans(), st.integers(0, 5))
def test_every_sample_once_an_epoch_but_for_the_remainder(plan: OrderPlan, epoch: int) -> None:
    m = plan.chunks_per_epoch
    served = np.concatenate([plan.chunk(n) for n in range(epoch * m, (epoch + 1) * m)])
    assert served.min() >= 0
    assert served.max() < plan.num_samples
    counts = np.bincount(served, minlength=plan.num_samples)
    if plan.chunk_size <= plan.num_samples:
        assert counts.max() == 1
        assert (counts == 0).sum() == plan.num_samples % plan.chunk_size
    else:  # a chunk wraps around a dataset smaller than itself
        assert counts.max() - counts.min() <= 1


@given(plans())
def test_a_chunk_is_so_many_runs_of_consecutive_samples(plan: OrderPlan) -> None:
    if plan.chunk_size < plan.num_samples:
        samples = np.sort(plan.chunk(0))
        # Each run ends in a gap, and one more where a run wraps at N; neighbours may meet.
        assert np.sum(np.diff(samples) != 1) <= plan.runs_per_chunk


@given(plans(), st.integers(0, 40))
def test_the_union_of_the_ranks_is_the_batch_for_every_world_size(plan: OrderPlan, step: int) -> None:
    group, part = divmod(step, plan.steps_per_group)
    wanted = plan.batch(step)
    for world_size in range(1, plan.num_lanes + 1):
        got = {}
        for rank in range(world_size):
            for lane in rank_lanes(plan, group, plan.first_chunk(step), rank, world_size):
                rows = slice(part * plan.lane_size, (part + 1) * plan.lane_size)
                got[lane] = plan.chunk(group * plan.num_lanes + lane)[rows]
        assert sorted(got) == list(range(plan.num_lanes))
        assert np.array_equal(np.concatenate([got[lane] for lane in sorted(got)]), wanted)


@given(plans(), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_restriping_at_any_step_changes_nothing(plan: OrderPlan, segments: list[tuple[int, int]]) -> None:
    """Segments of a run, each (world size, steps): every rank deals itself its share of a plan begun at that step."""
    served, step = [], 0
    for wanted, steps in [*segments, (1, 1)]:
        world_size, first_chunk, begun = min(wanted, plan.num_lanes), plan.first_chunk(step), step
        for step in range(begun, begun + steps):
            group, part = divmod(step, plan.steps_per_group)
            rows = slice(part * plan.lane_size, (part + 1) * plan.lane_size)
            lanes = {
                lane: plan.chunk(group * plan.num_lanes + lane)[rows]
                for rank in range(world_size)
                for lane in rank_lanes(plan, group, first_chunk, rank, world_size)
            }
            served += [lanes[lane] for lane in sorted(lanes)]
        step += 1
    assert np.array_equal(np.concatenate(served), np.concatenate([plan.batch(t) for t in range(step)]))


@given(plans(), st.integers(0, 60), st.integers(0, 60))
def test_a_plan_started_at_any_step_covers_the_rest(plan: OrderPlan, first: int, more: int) -> None:
    last = first + more
    chunks = range(plan.first_chunk(first), plan.first_chunk(first) + plan.num_chunks(first, last))
    needed = {n for step in range(first, last + 1) for n in plan.group_chunks(step // plan.steps_per_group)}
    assert needed <= set(chunks)
    assert plan.first_chunk(first) % plan.num_lanes == 0
    assert max(needed) + plan.num_lanes == chunks[-1]  # a group more, which ranks draw ahead


@given(plans(), st.integers(1, 5))
def test_epochs_differ(plan: OrderPlan, epoch: int) -> None:
    if plan.num_samples >= 100:
        m = plan.chunks_per_epoch
        first, later = (np.concatenate([plan.chunk(e * m + i) for i in range(m)]) for e in (0, epoch))
        assert not np.array_equal(first, later)


def test_a_billion_samples_are_no_trouble() -> None:
    plan = OrderPlan(num_samples=10**9, seed=0, batch_size=4096, num_lanes=64, steps_per_group=16)
    samples = plan.batch(10**7)
    assert samples.min() >= 0
    assert samples.max() < 10**9
    assert len(np.unique(samples)) == 4096


def test_order_is_golden() -> None:
    plan = OrderPlan(num_samples=50, seed=1, batch_size=4, num_lanes=2, steps_per_group=2)
    assert [plan.batch(step).tolist() for step in (0, 1, 100)] == [[13, 12, 45, 44], [15, 14, 47, 46], [6, 3, 22, 24]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_differ_by_one_lane_at_most(world_size: int) -> None:
    plan = OrderPlan(num_samples=1000, seed=0, batch_size=8, num_lanes=4, steps_per_group=2)
    for group in range(6):
        sizes = [len(rank_lanes(plan, group, 0, rank, world_size)) for rank in range(world_size)]
        assert sum(sizes) == 4
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_batches_of_a_prepared_dataset_are_mixed_like_independent_draws(classes: int) -> None:
    """Samples sorted by class, shuffled as `prepare` does, read by the plan: entropy of the classes of a batch."""
    count, batch_size = 30_000, 64
    labels = np.sort(np.arange(count) % classes)[prepare_plan.order(0, "train", count)]
    plan = OrderPlan(num_samples=count, seed=1, batch_size=batch_size, num_lanes=8, steps_per_group=16)
    batches = [labels[plan.batch(step)] for step in range(200)]
    draws = np.random.default_rng(0).integers(0, classes, (200, batch_size))
    assert np.mean([entropy(batch) for batch in batches]) >= 0.95 * np.mean([entropy(draw) for draw in draws])


def entropy(labels: np.ndarray) -> float:
    share = np.bincount(labels) / len(labels)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())
