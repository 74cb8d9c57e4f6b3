"""One owner at a time, and what it takes to succeed one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.train import ownership
from pipeline.train.ownership import Ownership, OwnershipError

HOLD = (
    "import sys, time; from pipeline.train.ownership import Ownership\n"
    "with Ownership(sys.argv[1]) as owner:\n"
    "    print(owner.number, flush=True); time.sleep(60)\n"
)


@pytest.fixture(params=["local", "s3"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_owners_are_numbered_and_released(run_url: str) -> None:
    for number in (1, 2):
        with Ownership(run_url) as owner:
            assert owner.number == number == ownership.current(run_url)
            ownership.check(run_url, number)


def test_a_live_owner_is_not_succeeded_and_is_named(run_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, run_url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "1"
        with pytest.raises(OwnershipError, match=f"process {holder.pid} on "):
            Ownership(run_url)
        holder.kill()
        holder.wait()
        started = time.monotonic()
        with Ownership(run_url) as owner:  # dead on the same host: at once, no waiting for the heartbeat
            assert owner.number == 2
        assert time.monotonic() - started < 10


def test_an_owner_elsewhere_is_succeeded_when_its_heartbeat_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    owner = Ownership(url)  # never released: as if its host had vanished
    here = ownership.this_process()
    monkeypatch.setattr(ownership, "this_process", lambda: ownership.Process(**(vars(here) | {"host": "another"})))
    with pytest.raises(OwnershipError):
        Ownership(url)
    beat = tmp_path / "owners" / "000001.heartbeat"
    old = time.time() - 2 * ownership.STALE_SEC
    os.utime(beat, (old, old))
    with Ownership(url) as successor:
        assert successor.number == owner.number + 1
        with pytest.raises(OwnershipError, match="owner 2 has taken over from owner 1"):
            ownership.check(url, 1)


def test_a_reused_process_number_is_another_process() -> None:
    here = ownership.this_process()
    assert not ownership.is_dead(here)
    assert ownership.is_dead(ownership.Process(**(vars(here) | {"started_ticks": here.started_ticks - 1})))
    assert not ownership.is_dead(ownership.Process(**(vars(here) | {"host": "another", "pid": 1})))


def test_a_heartbeat_is_kept_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SEC", 0.1)
    beat = tmp_path / "owners" / "000001.heartbeat"
    with Ownership(str(tmp_path)):
        first = beat.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while beat.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert storage.stat(str(tmp_path / "owners" / "000001.released")) is not None
