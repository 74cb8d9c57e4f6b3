"""What each rank gets is what the plan says."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stream.batches import STEPS_AHEAD, FeedError, rank_batches
from pipeline.stream.chunk import BadDataError
from tests.stream.readers import block, damage, planned, ranks, reader_of


@pytest.mark.parametrize("in_tasks", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("first_step", [0, 5])
def test_all_ranks_together_get_the_planned_batch(
    tmp_path: Path, world_size: int, first_step: int, in_tasks: bool
) -> None:
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    dealt = ranks(reader, first_step, world_size, 7)
    for served, step in enumerate(range(first_step, first_step + 7)):
        parts = [batches[served] for batches in dealt]
        assert {part.step for part in parts} == {step}
        position = np.concatenate([part.position for part in parts])
        order = np.argsort(position)
        assert np.array_equal(position[order], np.arange(step * 8, step * 8 + 8))
        wanted = reader.plan.batch(step)
        assert np.array_equal(np.concatenate([part.image for part in parts])[order], planned(wanted))
        assert np.array_equal(np.concatenate([part.label for part in parts])[order], wanted % 2)
        assert np.array_equal(np.concatenate([part.sample for part in parts])[order], wanted)


def test_flips_and_crops_are_the_same_for_every_world_size_and_decoder(tmp_path: Path) -> None:
    seen = []
    for number, (world_size, in_tasks) in enumerate([(1, True), (1, False), (3, True), (4, False)]):
        reader = reader_of(str(tmp_path / str(number)), in_tasks=in_tasks, flip=True, crop_px=2)
        dealt = ranks(reader, 0, world_size, 5)
        image = np.concatenate([part.image for batches in zip(*dealt, strict=True) for part in batches])
        position = np.concatenate([part.position for batches in zip(*dealt, strict=True) for part in batches])
        seen.append(image[np.argsort(position)])
    assert all(np.array_equal(seen[0], other) for other in seen[1:])
    plain = planned(np.concatenate([reader.plan.batch(step) for step in range(5)]))
    assert not np.array_equal(seen[0], plain)


def test_a_dataset_smaller_than_a_group(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path), num_samples=4)
    batch = ranks(reader, 0, 1, 1)[0][0]
    assert np.array_equal(batch.label, reader.plan.batch(0) % 2)


def test_a_block_out_of_order_is_refused(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    blocks = iter([block(reader, n) for n in (0, 1, 3, 2)])
    with pytest.raises(FeedError, match="chunk 3 came where the plan has chunk 2"):
        next(rank_batches(blocks, reader, 0, 0, 1, 1))
    with pytest.raises(FeedError, match="ended before chunk 0"):
        next(rank_batches(iter([]), reader, 0, 0, 1, 1))


@pytest.mark.parametrize("in_tasks", [True, False])
def test_a_replaced_sample_has_the_label_of_the_one_shown(tmp_path: Path, in_tasks: bool) -> None:
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    damaged = {int(i) for n in (0, 1, 2, 3) for i in reader.plan.chunk(n)[:2]}
    damage(tmp_path, *damaged)
    batches = ranks(reader, 0, 1, 3)[0]
    for batch in batches:
        assert np.array_equal(batch.image, planned(batch.sample))
        assert np.array_equal(batch.label, batch.sample % 2)
        bad = [i for i in reader.plan.batch(batch.step) if int(i) in damaged]
        assert len(batch.replaced) == len(bad)
        assert not damaged & set(batch.sample.tolist())
    assert sum(len(batch.replaced) for batch in batches) == len(damaged)


def test_what_a_decoding_thread_raises_reaches_the_loop(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path), in_tasks=False)
    damage(tmp_path, *map(int, reader.plan.chunk(1)))
    with pytest.raises(BadDataError, match="no sample of 6"):
        ranks(reader, 0, 1, 3)


@pytest.mark.parametrize("in_tasks", [True, False])
def test_only_so_many_batches_are_made_ahead_and_the_threads_end(tmp_path: Path, in_tasks: bool) -> None:
    reader = reader_of(str(tmp_path), in_tasks=in_tasks, steps_per_group=1)
    drawn: list[int] = []

    def blocks() -> Iterator[pa.Table]:
        for n in range(10**6):
            drawn.append(n)
            yield block(reader, n)

    before = threading.active_count()
    batches = rank_batches(blocks(), reader, 0, 0, 1, 2)
    next(batches)
    time.sleep(0.5)
    # One batch taken, STEPS_AHEAD ready, and a group, of 4 chunks, fetched ahead of them.
    assert len(drawn) <= 4 * (1 + STEPS_AHEAD + 1)
    batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
