"""A run whose cluster grows, shrinks, and says beforehand that it will."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.train import checkpoint, log
from pipeline.train.ray_elastic import possible_workers
from tests.generate.ray_cluster import RayCluster, run_cluster
from tests.small import make_dataset
from tests.train.run_driver import reader_of
from tests.train.test_ray_train import assert_as_planned

_WAIT_SEC = 150.0


@pytest.mark.parametrize(
    ("cpus", "each", "wanted"),
    [
        ([2.0], 1.0, 1),
        ([1.0], 1.0, 0),
        ([2.0, 1.0, 1.0], 1.0, 3),
        ([4.0], 0.75, 4),
        ([2.0], 1 / 3, 3),  # 2 // (1 / 3) is 5, and 1 CPU has room for 3 though 3 × 0.333… is not quite 1
        ([8.0, 8.0], 3.0, 4),
        ([], 1.0, 0),
    ],
)
def test_workers_that_fit_leave_a_cpu_to_read(cpus: list[float], each: float, wanted: int) -> None:
    nodes = {str(number): {"CPU": count} for number, count in enumerate(cpus)}
    assert possible_workers(nodes, {"CPU": each}) == wanted


def test_each_worker_has_its_gpu_on_a_node_of_its_own() -> None:
    nodes = {"head": {"CPU": 8.0}, "a": {"CPU": 4.0, "GPU": 2.0}, "b": {"CPU": 1.0, "GPU": 4.0}}
    assert possible_workers(nodes, {"CPU": 1.0, "GPU": 1.0}) == 3


def events(url: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in log.read_events(url) if event["event"] == kind]


def wait_for(found: Callable[[], Any], driver: "subprocess.Popen[str]") -> None:
    deadline_sec = time.monotonic() + _WAIT_SEC
    while not found():
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        assert time.monotonic() < deadline_sec, "it did not come"
        time.sleep(0.1)


@contextmanager
def started(cluster: RayCluster, settings: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.run_driver", json.dumps(settings)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=cluster.environment, text=True, **output) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def settings_of(tmp_path: Path, **train: Any) -> dict[str, Any]:
    make_dataset(str(tmp_path / "data"), num_samples=50)
    intervals = {
        "total_kimg": 10_000.0,
        "tick_kimg": 0.08,
        "checkpoint_kimg": 0.08,
        "record_positions": True,
        "deterministic": False,
    }
    workers = {"num_workers": [1, 3], "threads_per_worker": 1, "decode_threads": 1, "resize_sec": 1.0}
    return {
        "data": str(tmp_path / "data"),
        "run": str(tmp_path / "run"),
        "train": intervals | train,
        "workers": workers,
    }


def finish(cluster: RayCluster, settings: dict[str, Any]) -> tuple[int, str]:
    """Let another driver go on for some steps, to the end; `cur_nimg` there, and what it said."""
    last = checkpoint.latest_valid(settings["run"], print)
    assert last is not None
    total_nimg = last.cur_nimg + 400
    shorter = settings | {"train": settings["train"] | {"total_kimg": total_nimg / 1000}}
    with started(cluster, shorter) as driver:
        said = driver.communicate()[0]
    assert driver.returncode == 0, said[-3000:]
    return total_nimg, said


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_grows_and_shrinks_with_its_cluster(tmp_path: Path) -> None:
    """1 worker on two CPUs, then 2 and 3 as machines join, then 2 as one dies: each sample once, as planned."""
    settings = settings_of(tmp_path)
    url = settings["run"]
    with run_cluster(2, _environment()) as cluster:
        with started(cluster, settings) as driver:
            wait_for(lambda: events(url, "checkpoint"), driver)
            for size in (2, 3):
                cluster.add_node(1)
                wait_for(lambda size=size: size in [event["world_size"] for event in events(url, "resumed")], driver)
            cluster.drop_node(1)
            wait_for(lambda: events(url, "resumed")[-1]["world_size"] == 2, driver)
            before = len(events(url, "checkpoint"))
            wait_for(lambda: len(events(url, "checkpoint")) > before, driver)
        total_nimg, said = finish(cluster, settings)
    sizes = [event["world_size"] for event in events(url, "resumed")]
    restarts = events(url, "restarted")
    wasted = [event["wasted_steps"] for event in restarts]
    print(f"sizes {sizes}, wasted steps {wasted}, {[event['reason'] for event in restarts]}")
    assert sizes[:3] == [2, 3, 2]
    assert len(restarts) >= 3  # with nothing wasted too, where it came right after a checkpoint
    assert max(wasted) <= 2 * 10  # a checkpoint each 10 steps, and one that was being written
    assert f"done, {sum(wasted)} steps wasted" in said
    assert_as_planned(url, reader_of(settings["data"]).plan, total_nimg)


def apart(tmp_path: Path, num_workers: list[int], **workers: Any) -> dict[str, Any]:
    """Settings for a head of one CPU, which reads, and machines of two CPUs, with a worker each. No checkpoint."""
    settings = settings_of(tmp_path, checkpoint_kimg=10_000.0)
    settings["workers"] |= {"num_workers": num_workers, "cpus_per_worker": 2.0} | workers
    return settings


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_word_of_preemption_leads_to_a_checkpoint(tmp_path: Path) -> None:
    """One of two machines says that it will go: there is a checkpoint before that, and one worker goes on from it."""
    settings = apart(tmp_path, [1, 2])
    url = settings["run"]
    with run_cluster(1, _environment()) as cluster:
        for _ in range(2):
            cluster.add_node(2)
        with started(cluster, settings) as driver:
            wait_for(lambda: log.read_stats(url), driver)
            assert not events(url, "checkpoint")
            told_sec = time.time()
            cluster.drain_node(1, 60.0)
            wait_for(lambda: events(url, "checkpoint"), driver)
            cluster.drop_node(1)
            wait_for(lambda: events(url, "resumed"), driver)
        total_nimg, _ = finish(cluster, settings)
    (preempted, *_), (kept, *_), (resumed, *_) = (events(url, kind) for kind in ("preempted", "checkpoint", "resumed"))
    print(f"from the word to the checkpoint: {kept['time_sec'] - told_sec:.1f} s")
    assert preempted["cur_nimg"] == kept["cur_nimg"] == resumed["cur_nimg"] > 0
    assert (resumed["world_size_before"], resumed["world_size"]) == (2, 1)
    assert_as_planned(url, reader_of(settings["data"]).plan, total_nimg)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_whose_workers_find_no_room_ends_with_the_reason(tmp_path: Path) -> None:
    """Two workers, no fewer, and one of their machines is lost for good."""
    settings = apart(tmp_path, [2], no_room_sec=8.0)
    with run_cluster(1, _environment()) as cluster:
        for _ in range(2):
            cluster.add_node(2)
        with started(cluster, settings) as driver:
            wait_for(lambda: log.read_stats(settings["run"]), driver)
            cluster.drop_node(1)
            said = driver.communicate(timeout=_WAIT_SEC)[0]
    assert driver.returncode == 1, said[-3000:]
    last = said.strip().splitlines()[-1]
    assert last.startswith("TrainError: 2 workers of {'CPU': 2.0} found no room; free are CPU "), last
    assert last.endswith("run again when the cluster has room")


def _environment() -> dict[str, str]:
    fast = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    return dict(os.environ) | fast | {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2"}
