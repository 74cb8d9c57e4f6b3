"""Drivers in processes of their own: killed at each step of a checkpoint, two on one run, one that was only slow."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.train import checkpoint, log, ownership
from pipeline.train.checkpoint import COMMIT
from tests.failpoint_control import DELETE_STEPS, PUT_STEPS
from tests.train.drivers import Drivers, run_drivers
from tests.train.test_loop import assert_bit_equal, final_state

SHORT = {"total_kimg": 0.16, "checkpoint_kimg": 0.04, "num_to_keep": 2}
LONG = SHORT | {"total_kimg": 1.0}


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory, s3_env: dict[str, str]) -> Iterator[Drivers]:
    with run_drivers(tmp_path_factory.mktemp("drivers"), s3_env) as drivers:
        yield drivers


End = tuple[int, dict[str, Any]]
"""`cur_nimg` and tensors of a last checkpoint."""


@pytest.fixture(scope="module")
def end(drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> End:
    """Of a short run that nothing happened to."""
    return undisturbed(drivers, str(tmp_path_factory.mktemp("short")), SHORT)


@pytest.fixture(scope="module")
def long_end(drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> End:
    """Of a long one."""
    return undisturbed(drivers, str(tmp_path_factory.mktemp("long")), LONG)


def undisturbed(drivers: Drivers, run_url: str, settings: Mapping[str, Any]) -> End:
    assert drivers.run(run_url, **settings) == 0
    cur_nimg, tensors = final_state(run_url)
    assert cur_nimg == 1000 * settings["total_kimg"]
    return cur_nimg, tensors


def check_end(run_url: str, end: End) -> None:
    """To the bit."""
    cur_nimg, tensors = final_state(run_url)
    assert cur_nimg == end[0]
    assert_bit_equal(tensors, end[1])


def die_at(drivers: Drivers, run_url: str, steps: Sequence[str], skip: int, **settings: Any) -> None:
    """Start a driver of the run again and again, each being killed at one of the steps, until one ends by itself."""
    before = len(drivers.failpoints.killed())
    for step in steps:
        drivers.failpoints.arm(step, skip)
    for _ in steps:
        assert drivers.run(run_url, **settings) == -signal.SIGKILL
        checkpoint.latest_valid(run_url, pytest.fail)
        assert all(len(names) > len(checkpoint.OBJECTS) for names in stored(run_url).values() if COMMIT in names)
    last = drivers.start(run_url, **settings)
    assert drivers.wait(last) == 0, drivers.said(last)
    assert sorted(drivers.failpoints.killed()[before:]) == sorted(steps)


def stored(run_url: str) -> dict[int, set[str]]:
    """Number of a checkpoint → names of its objects."""
    found: dict[int, set[str]] = {}
    for entry in storage.list_entries(f"{run_url}/checkpoints"):
        number, name = entry.name.split("/")
        found.setdefault(int(number), set()).add(name)
    return found


def owners(run_url: str) -> dict[int, int]:
    """Number of a committed checkpoint → its owner."""
    committed = [number for number, names in stored(run_url).items() if COMMIT in names]
    urls = {number: f"{run_url}/checkpoints/{number:06d}/{COMMIT}" for number in committed}
    return {number: json.loads(storage.read(url))["owner"] for number, url in urls.items()}


def test_a_kill_at_the_commit_leaves_a_run_that_resumes(tmp_path: Path, drivers: Drivers, end: End) -> None:
    url = str(tmp_path)
    steps = ("before checkpoint G.pt put", "before checkpoint COMMIT.json put", "after checkpoint COMMIT.json put")
    die_at(drivers, url, steps, skip=1, **SHORT)
    check_end(url, end)
    assert len(stored(url)) == SHORT["num_to_keep"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("steps", "skip", "store"), [(PUT_STEPS + DELETE_STEPS, 0, "s3"), (PUT_STEPS, 1, "local")])
def test_a_kill_at_each_step_of_a_checkpoint_leaves_a_run_that_resumes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    drivers: Drivers,
    long_end: End,
    steps: Sequence[str],
    skip: int,
    store: str,
) -> None:
    """At the first checkpoint, where there is none to go back to, and at the second; and where old ones are deleted."""
    url = str(tmp_path) if store == "local" else str(request.getfixturevalue("s3"))
    die_at(drivers, url, steps, skip, **LONG)
    check_end(url, long_end)
    assert len(stored(url)) == LONG["num_to_keep"]


def test_a_second_driver_names_the_first_and_succeeds_it_when_it_died(
    tmp_path: Path, drivers: Drivers, end: End
) -> None:
    url = str(tmp_path)
    first = drivers.start_frozen(url, "before checkpoint G.pt put", skip=1, **SHORT)
    second = drivers.start(url, **SHORT)
    assert drivers.wait(second) == 1
    assert f"OwnershipError: {url}: process {first} on {socket.gethostname()} drives this run" in drivers.said(second)
    os.kill(first, signal.SIGKILL)
    assert drivers.wait(first) == -signal.SIGKILL  # on a busy machine it lives on for a while
    started = time.monotonic()
    assert drivers.run(url, **SHORT) == 0
    assert time.monotonic() - started < ownership.STALE_SEC / 4  # no waiting for the heartbeat to go stale
    assert set(owners(url).values()) == {2}
    check_end(url, end)


@pytest.mark.parametrize(
    ("step", "late"), [("after checkpoint G.pt put", {}), ("before checkpoint COMMIT.json put", {2: 1})]
)
def test_an_owner_that_was_only_slow_commits_no_more(
    tmp_path: Path, drivers: Drivers, end: End, step: str, late: dict[int, int]
) -> None:
    """Stopped when it has begun its second checkpoint; unless it had checked already and was about to commit."""
    url, keep_all = str(tmp_path), SHORT | {"num_to_keep": 9}
    first = drivers.start_frozen(url, step, skip=1, **keep_all)
    os.kill(first, signal.SIGSTOP)
    old = time.time() - 2 * ownership.STALE_SEC
    os.utime(tmp_path / "owners" / "000001.heartbeat", (old, old))
    assert drivers.run(url, **keep_all) == 0
    before = owners(url)
    assert sorted(before.values()) == [1, 2, 2, 2]
    drivers.failpoints.thaw()
    os.kill(first, signal.SIGCONT)
    assert drivers.wait(first) == 1
    assert f"OwnershipError: {url}: owner 2 has taken over from owner 1" in drivers.said(first)
    assert owners(url) == before | late
    check_end(url, end)
    assert [event["owner"] for event in log.read_events(url) if event["event"] == "finished"] == [2]


def test_what_a_former_owner_left_under_its_number_stops_nobody(tmp_path: Path, drivers: Drivers, end: End) -> None:
    url = str(tmp_path)
    driver = drivers.start_frozen(url, "before checkpoint G_ema.pt put", **SHORT)
    storage.put_if_absent(f"{url}/checkpoints/000001/G_ema.pt", b"of another trajectory")
    drivers.failpoints.thaw()
    assert drivers.wait(driver) == 0, drivers.said(driver)
    committed = [event["number"] for event in log.read_events(url) if event["event"] == "checkpoint"]
    assert committed[0] == 2
    check_end(url, end)
