"""An object store that goes away while a run trains: it waits, and ends with what it committed if it must."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.storage import StorageUnavailableError
from pipeline.stream.chunk import ChunkReader
from pipeline.train import checkpoint, log, loop
from pipeline.train.loop import Outlets
from tests.s3_proxy import FaultPlan, Proxy, proxy, run_proxy
from tests.s3_server import S3Server
from tests.small import make_dataset
from tests.train.run_driver import reader_of
from tests.train.test_loop import WORLD, assert_bit_equal, batches_from, final_state, reader, spec_of, train
from tests.train.test_ray_train import assert_as_planned

__all__ = ["proxy", "reader"]

_NOTHING = FaultPlan(seed=0, probabilities={"unavailable": 1.0}, max_in_row=10**9)


def train_and_lose_the_store(spec: Any, reader: ChunkReader, settings: type[Proxy], back_sec: float) -> None:
    """Train; after the tick at 80 images the store is gone, for so many seconds."""

    def report(stats: Mapping[str, float]) -> None:
        if stats["cur_nimg"] == 80:
            settings.plan = _NOTHING
            threading.Timer(back_sec, setattr, [settings, "plan", None]).start()

    loop.run(spec, WORLD, None, batches_from(reader, 0), Outlets(progress=lambda *_: None, report=report))


def test_a_store_that_comes_back_is_waited_for(
    s3: str, tmp_path: Path, reader: ChunkReader, proxy: type[Proxy]
) -> None:
    quiet = str(tmp_path / "quiet")
    train(spec_of(quiet, reader), reader)
    train_and_lose_the_store(spec_of(s3, reader), reader, proxy, 3.0)
    assert final_state(s3)[0] == 160
    assert_bit_equal(final_state(s3)[1], final_state(quiet)[1])
    assert [stats["cur_nimg"] for stats in log.read_stats(s3)] == [40, 80, 120, 160]


def test_a_store_that_stays_away_ends_the_run_and_loses_nothing(
    s3: str, reader: ChunkReader, proxy: type[Proxy]
) -> None:
    train(spec_of(s3, reader, total_kimg=0.08), reader)
    committed = checkpoint.latest_valid(s3, pytest.fail)
    started = time.monotonic()
    resumed = spec_of(s3, reader, storage_timeout_sec=2.0)

    def report(stats: Mapping[str, float]) -> None:
        if stats["cur_nimg"] == 120:
            proxy.plan = _NOTHING

    with pytest.raises(StorageUnavailableError, match="after 5 attempts"):
        loop.run(resumed, WORLD, committed, batches_from(reader, 10), Outlets(progress=lambda *_: None, report=report))
    assert time.monotonic() - started < 30.0
    proxy.plan = None
    assert checkpoint.latest_valid(s3, pytest.fail) == committed
    train(spec_of(s3, reader), reader)
    assert final_state(s3)[0] == 160


def test_patience_ends_with_its_time_or_when_told() -> None:
    calls = list[float]()

    def call() -> None:
        calls.append(time.monotonic())
        raise StorageUnavailableError("gone")

    with pytest.raises(StorageUnavailableError):
        storage.patiently(call, 1.2)
    assert len(calls) == 3  # at once, after half a second, and at the end
    assert 1.2 <= calls[-1] - calls[0] < 3.0
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(StorageUnavailableError):
        storage.patiently(call, 100.0, stop)


@contextmanager
def run_behind(target: S3Server, settings: dict[str, Any]) -> Iterator[tuple[type[Proxy], "subprocess.Popen[str]"]]:
    """A driver, with a Ray of its own, that has S3 through the proxy."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.run_driver", json.dumps(settings)]
    with run_proxy(target) as (handler, url):
        environment = dict(os.environ) | target.environment() | {"AWS_ENDPOINT_URL": url}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, text=True, **output) as driver:
            try:
                yield handler, driver
            finally:
                driver.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "returns", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.long)]
)
def test_a_whole_run_whose_store_goes_away(s3: str, s3_server: S3Server, returns: bool) -> None:
    """Dataset, checkpoints and logs on S3, gone for 10 s or for good: exit 0 and all as planned, or exit 1 in time."""
    make_dataset(f"{s3}/data", num_samples=50)
    url, timeout_sec = f"{s3}/run", 60.0 if returns else 5.0
    intervals = {"total_kimg": 2.4, "tick_kimg": 0.2, "checkpoint_kimg": 0.4, "record_positions": True}
    settings = {
        "data": f"{s3}/data",
        "run": url,
        "timeout_sec": timeout_sec,
        "train": intervals | {"storage_timeout_sec": timeout_sec},
    }
    with run_behind(s3_server, settings) as (handler, driver):
        while checkpoint.latest_valid(url, pytest.fail) is None:
            assert driver.poll() is None, driver.communicate()[0][-3000:]
            time.sleep(0.2)
        handler.plan = _NOTHING
        gone = time.monotonic()
        committed = checkpoint.latest_valid(url, pytest.fail)
        if returns:
            threading.Timer(10.0, setattr, [handler, "plan", None]).start()
        said = driver.communicate(timeout=200)[0]
    print(f"ended {time.monotonic() - gone:.0f} s after the store went away, exit code {driver.returncode}")
    if returns:
        assert driver.returncode == 0, said[-3000:]
        assert_as_planned(url, reader_of(f"{s3}/data").plan, 2_400)
    else:
        assert driver.returncode == 1, said[-3000:]
        assert "run the same command again to go on" in said.splitlines()[-1]
        assert time.monotonic() - gone < 90.0
        last = checkpoint.latest_valid(url, pytest.fail)
        assert last is not None
        assert committed is not None
        assert last.number >= committed.number
