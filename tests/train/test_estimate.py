"""What a run will take, from a few of its iterations."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.chunk import ChunkReader
from pipeline.train import estimate
from pipeline.train.workers import WorkersConfig, fit_workers
from tests.train.test_loop import reader, spec_of

__all__ = ["reader"]

CPU = torch.device("cpu")
WORKERS = fit_workers(WorkersConfig(), 4, {"CPU": 2.0})


@pytest.mark.parametrize(("num_ranks", "in_tasks"), [(1, True), (1, False), (3, False)])
def test_iterations_are_timed_and_nothing_is_stored(
    tmp_path: Path, reader: ChunkReader, num_ranks: int, in_tasks: bool
) -> None:
    """R3GAN with all that its step has; reads are counted as they are, with what lies between the files of a chunk."""
    spec = dataclasses.replace(
        spec_of(str(tmp_path / "run"), reader),
        network=NetworkConfig(name="r3gan", z_dim=8, base_width=16, max_width=16, depth=1),
        step=StepConfig(
            loss="relativistic", penalty="r1_r2", augment=AugmentConfig(mode="fixed", p=(0.0, 0.3)), burn_in_kimg=0.1
        ),
    )
    before = sorted(tmp_path.rglob("*"))
    started = time.perf_counter()
    found = estimate.probe(spec, dataclasses.replace(reader, in_tasks=in_tasks), WORKERS, CPU, num_ranks, steps=5)
    assert found.steps == 5
    assert 0 < 5 * found.sec_per_step < time.perf_counter() - started
    assert found.hours(8 * 3600, 8) == pytest.approx(found.sec_per_step)
    rows = reader.index.rows(0, 30)
    sizes, offsets = rows["size"].to_numpy(), rows["offset"].to_numpy()
    assert sizes.mean() < found.read_bytes_per_sample < (offsets[-1] - offsets[0]) / 29
    assert 100e6 < found.peak_bytes < 100e9
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rank_gets_its_share(reader: ChunkReader) -> None:
    """The first of three has two of four lanes: the chunks 0 and 3, of the next group 6 and so on."""
    read: list[tuple[int, int]] = []
    blocks = estimate._blocks(reader, 3, read)
    assert [next(blocks)["position"][0].as_py() // 6 for _ in range(4)] == [0, 3, 6, 9]
    assert [samples for _, samples in read] == [6] * 4


def timed(each_sec: float, limit_sec: float, compiles: bool) -> tuple[int, int]:
    """Of iterations that take so long: how many were timed, and how many were done."""
    begun: list[int] = []

    def iterations() -> Iterator[None]:
        for number in itertools.count():
            begun.append(number)
            yield
            time.sleep(each_sec)

    count, elapsed_sec = estimate._time(iterations(), 20, limit_sec, CPU, compiles)
    assert elapsed_sec >= count * each_sec
    return count, len(begun) - 1


def test_there_is_an_end_to_it() -> None:
    """A slow iteration is timed at once, unless it compiled as well."""
    assert timed(0.001, 60.0, False) == (20, 22)
    assert timed(0.02, 0.01, False) == (1, 1)
    assert timed(0.02, 0.01, True) == (1, 2)
    count, done = timed(0.05, 1.0, False)
    assert 1 <= count < 20
    assert done == count + 2


def test_what_cannot_be_read_is_told(tmp_path: Path, reader: ChunkReader) -> None:
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        shard.unlink()
    with pytest.raises(storage.NotFoundError, match="shard-00000"):
        estimate.probe(spec_of(str(tmp_path / "run"), reader), reader, WORKERS, CPU, 1)
