"""The trainer on real Ray: several ranks, a killed worker, and what a cluster can hold."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import snapshot, storage
from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.chunk import ChunkReader
from pipeline.stream.order import OrderPlan
from pipeline.train import log
from pipeline.train.ownership import Ownership
from pipeline.train.ray_train import fit
from pipeline.train.spec import RunSpec
from pipeline.train.workers import ResourceError, Workers, WorkersConfig, fit_workers
from tests.stream.test_feed import processes_running
from tests.train.test_loop import reader, spec_of

__all__ = ["reader"]

ONE = Workers(config=WorkersConfig(threads_per_worker=1, decode_threads=1), cpus=1, cluster_cpus=8, count=1)


def fit_owned(spec: RunSpec, reader: ChunkReader, workers: Workers, on_progress: Any = lambda *_: None) -> None:
    with Ownership(spec.run_url) as owner:
        fit(dataclasses.replace(spec, owner=owner.number), reader, workers, on_progress)


def training_workers() -> list[int]:
    """Process ids of the training workers that this process's Ray started."""
    commands = [(path.parent, path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [int(folder.name) for folder, command in commands if b"RayTrainWorker" in command]


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_three_ranks_train_to_the_end(tmp_path: Path, reader: ChunkReader) -> None:
    """R3GAN, with all that its step has: DDP through a double backward, gradients of parts added up, two batches."""
    url, seen = str(tmp_path / "run"), list[int]()
    spec = dataclasses.replace(
        spec_of(url, reader),
        network=NetworkConfig(name="r3gan", z_dim=8, base_width=16, max_width=16, depth=1),
        step=StepConfig(
            loss="relativistic",
            penalty="r1_r2",
            precision="fp32",
            micro_batch=1,
            augment=AugmentConfig(mode="fixed", p=(0.3,)),
        ),
    )

    def on_progress(cur_nimg: int, _: Mapping[str, Any]) -> None:
        seen.append(cur_nimg)

    fit_owned(spec, reader, dataclasses.replace(ONE, count=3), on_progress)
    assert seen[-1] == 160
    assert [stats["cur_nimg"] for stats in log.read_stats(url)] == [40, 80, 120, 160]
    assert all(stats["real_prob"] < 1 for stats in log.read_stats(url))  # means over the global batch, not over ranks
    assert snapshot.load(snapshot.find(url)).config.cur_nimg == 160


@pytest.mark.usefixtures("ray_session")
def test_recorded_positions_are_the_plan_through_changes_of_size(tmp_path: Path, reader: ChunkReader) -> None:
    """One run by 1, 4, then 3 workers, each stopping in mid-epoch and mid-group: no repeat, no gap."""
    url, plan = str(tmp_path / "run"), reader.plan
    for count, total_kimg in [(1, 0.08), (4, 0.2), (3, 0.32)]:
        spec = spec_of(url, reader, total_kimg=total_kimg, checkpoint_kimg=0.04, record_positions=True)
        fit_owned(spec, reader, dataclasses.replace(ONE, count=count))
        assert_as_planned(url, plan, int(total_kimg * 1000))
    sizes = [event["world_size"] for event in log.read_events(url) if event["event"] == "resumed"]
    assert sizes == [4, 3]


def assert_as_planned(url: str, plan: OrderPlan, total_nimg: int) -> None:
    """Each position of the run once, with the sample that the plan has there."""
    taken = log.read_positions(url).sort_by("position")
    assert np.array_equal(taken["position"].to_numpy(), np.arange(total_nimg))
    planned = np.concatenate([plan.batch(step) for step in range(total_nimg // plan.batch_size)])
    assert np.array_equal(taken["sample"].to_numpy(), planned)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "task",
    [
        pytest.param("MapBatches(ChunkReader)", marks=pytest.mark.slow),
        pytest.param("RayTrainWorker", marks=pytest.mark.long),  # test_resume kills one as well
    ],
)
def test_recorded_positions_are_the_plan_when_a_worker_is_killed(
    tmp_path: Path, reader: ChunkReader, task: str
) -> None:
    """Three ranks; a training worker, or a read worker, is killed after the first checkpoint."""
    url, killed = str(tmp_path / "run"), list[int]()
    settings = {"total_kimg": 2.0, "tick_kimg": 0.08, "checkpoint_kimg": 0.08, "record_positions": True}

    def kill_one() -> None:
        while not any(event["event"] == "checkpoint" for event in log.read_events(url)):
            time.sleep(0.02)
        victims = training_workers() if task == "RayTrainWorker" else processes_running(task)
        os.kill(victims[0], signal.SIGKILL)
        killed.append(victims[0])

    killer = threading.Thread(target=kill_one)
    killer.start()
    fit_owned(spec_of(url, reader, **settings), reader, dataclasses.replace(ONE, count=3))
    killer.join()
    assert killed
    assert_as_planned(url, reader.plan, 2000)


@pytest.mark.usefixtures("ray_session")
def test_what_the_user_can_mend_is_told_in_its_own_words(tmp_path: Path, reader: ChunkReader) -> None:
    """And is not tried again, not even by a run that may fail without limit."""
    config = dataclasses.replace(ONE.config, max_failures=-1)
    (tmp_path / "data" / "train" / "shard-000000.tar").unlink()
    started = time.monotonic()
    with pytest.raises(storage.NotFoundError, match=r"^\S*shard-000000\.tar: [^\n]*$"):
        fit_owned(spec_of(str(tmp_path / "run"), reader), reader, dataclasses.replace(ONE, config=config))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("config", "cpus", "wanted"),
    [
        (WorkersConfig(), 2, (1, 1.0, 2)),
        (WorkersConfig(num_workers=(2,)), 2, (2, 0.5, 1)),
        (WorkersConfig(num_workers=(3,)), 8, (3, 1.0, 2)),
        (WorkersConfig(num_workers=(3,), cpus_per_worker=0.25, threads_per_worker=5), 2, (3, 0.25, 5)),
    ],
)
def test_workers_leave_a_cpu_to_read(config: WorkersConfig, cpus: float, wanted: tuple[int, float, int]) -> None:
    workers = fit_workers(config, 8, {"CPU": cpus})
    assert (workers.count, workers.cpus, workers.threads(workers.count)) == wanted
    assert workers.count * workers.cpus <= cpus - 1


@pytest.mark.parametrize(
    ("config", "cluster", "why"),
    [
        (WorkersConfig(), {"CPU": 1.0}, "leave none to read"),
        (WorkersConfig(num_workers=(2,), cpus_per_worker=1), {"CPU": 2.0}, "leave none to read"),
        (WorkersConfig(num_workers=(9,)), {"CPU": 64.0}, "between 1 and train.num_lanes = 8"),
        (WorkersConfig(num_workers=(4, 9)), {"CPU": 64.0}, "between 1"),
        (WorkersConfig(num_workers=(4, 8), use_gpu=True), {"CPU": 64.0, "GPU": 3.0}, "4 workers need a GPU each"),
        (WorkersConfig(use_gpu=True), {"CPU": 64.0}, "GPU each, the cluster has 0"),
    ],
)
def test_what_a_cluster_cannot_hold(config: WorkersConfig, cluster: dict[str, float], why: str) -> None:
    with pytest.raises(ResourceError, match=why):
        fit_workers(config, 8, cluster)


@pytest.mark.parametrize(
    "settings", [{"num_workers": (0,)}, {"num_workers": (3, 2)}, {"num_workers": ()}, {"stalled_sec": 0.0}]
)
def test_what_no_cluster_can_hold(settings: dict[str, Any]) -> None:
    with pytest.raises(ResourceError):
        WorkersConfig(**settings)


def test_an_elastic_run_asks_for_its_fewest_workers_and_gets_as_many_as_fit() -> None:
    workers = fit_workers(WorkersConfig(num_workers=(1, 4)), 8, {"CPU": 2.0})
    assert (workers.fewest, workers.count, workers.cpus, workers.elastic) == (1, 4, 1.0, True)
    assert [workers.threads(size) for size in (1, 2, 4)] == [2, 1, 1]
