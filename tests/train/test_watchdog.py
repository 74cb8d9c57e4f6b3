"""Runs that would wait for ever end, with the reason."""

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.stream.chunk import ChunkReader
from pipeline.train import log
from pipeline.train.ray_train import TrainError
from pipeline.train.watchdog import Watchdog
from pipeline.train.workers import ResourceError, WorkersConfig
from tests.train.test_loop import reader, spec_of
from tests.train.test_ray_train import ONE, fit_owned, training_workers

__all__ = ["reader"]


def slowly(waits_sec: list[float]) -> Iterator[Any]:
    for wait_sec in waits_sec:
        time.sleep(wait_sec)
        yield wait_sec


@pytest.mark.parametrize(
    ("waits_sec", "works_sec", "wanted"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], None),
        ([0.5, 0.0, 0.0], [0.0, 0.0, 0.0], ("first batch", 0.2)),
        ([0.1, 0.3, 0.3], [0.3, 0.3, 0.3], None),
        ([0.0, 0.0, 0.8], [0.0, 0.0, 0.0], ("batch", 0.5)),
        ([0.0, 0.0, 0.0], [0.0, 0.8, 0.0], ("end of an iteration", 0.5)),
    ],
)
def test_a_wait_that_is_too_long_is_told_once(waits_sec: list[float], works_sec: list[float], wanted: Any) -> None:
    config, told, looks = WorkersConfig(first_batch_sec=0.2, stalled_sec=0.5), list[Any](), itertools.count()

    def on_stuck(*what: Any) -> None:
        told.append(what)

    with Watchdog(config, on_stuck, lambda: next(looks)) as watchdog:
        for _, work_sec in zip(watchdog.watch(slowly(waits_sec)), works_sec, strict=True):
            time.sleep(work_sec)
    assert told == ([] if wanted is None else [wanted])
    assert next(looks) >= (1 if sum(waits_sec + works_sec) else 0)


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_gets_no_cpu_to_read_ends_with_the_reason(tmp_path: Path, reader: ChunkReader) -> None:
    import ray

    class Hog:
        """Holds the CPUs that it was made with."""

        def ready(self) -> None:
            """Answers once it runs."""

    config = dataclasses.replace(ONE.config, first_batch_sec=2.0)
    hog = ray.remote(num_cpus=7)(Hog).remote()
    ray.get(hog.ready.remote())
    try:
        with pytest.raises(ResourceError, match="no first batch after 2 s: 1 workers hold 1 CPUs each and 0 CPUs"):
            fit_owned(spec_of(str(tmp_path / "run"), reader), reader, dataclasses.replace(ONE, config=config))
    finally:
        ray.kill(hog)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("ray_session")
def test_workers_that_die_again_and_again_end_the_run(tmp_path: Path, reader: ChunkReader) -> None:
    """Each is killed before it has made a checkpoint; a later one's deaths are counted anew."""
    url, ended, killed = str(tmp_path / "run"), threading.Event(), set[int]()
    spec = spec_of(url, reader, total_kimg=400.0, checkpoint_kimg=400.0)

    def kill_each() -> None:
        while not ended.wait(0.1):
            for victim in set(training_workers()) - killed:
                time.sleep(1.0)
                with suppress(ProcessLookupError):  # the run ended meanwhile
                    os.kill(victim, signal.SIGKILL)
                    killed.add(victim)

    killer = threading.Thread(target=kill_each)
    killer.start()
    config = dataclasses.replace(ONE.config, max_failures=1)
    try:
        with pytest.raises(TrainError, match="2 failures without a new checkpoint, the last of worker 0"):
            fit_owned(spec, reader, dataclasses.replace(ONE, config=config))
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= 2
    assert [event["checkpoint"] for event in log.read_events(url) if event["event"] == "restarted"] == [None, None]
