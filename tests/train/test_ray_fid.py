"""FID beside training, on real Ray: of every snapshot, waited for by nobody; the best snapshot is kept by it."""

import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from jobs import train as verb
from jobs.terminal import Terminal
from pipeline import snapshot, storage
from pipeline.dataset.index import IndexReader
from pipeline.stream.chunk import ChunkReader
from pipeline.train import log, ownership, ray_fid, ray_train
from pipeline.train.ownership import OwnershipError
from pipeline.train.ray_fid import Fids
from pipeline.train.spec import RunSpec
from tests.train.indexes import Broken, Gated, like
from tests.train.test_loop import final_state, reader, spec_of, train
from tests.train.test_ray_train import ONE, fit_owned

__all__ = ["reader"]

SOME = {"snapshot_kimg": 0.04, "fid_samples": 40}

pytestmark = pytest.mark.usefixtures("ray_session")


class Counted:
    """In place of the task: notes what is started."""

    def __init__(self) -> None:
        self.task, self.clocks = ray_fid._task, list[int]()

    def remote(self, *arguments: Any) -> Any:
        self.clocks.append(snapshot.clock(arguments[-1]))
        return self.task.remote(*arguments)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(ray_fid, "_task", counted)
    return counted


def drive(spec: RunSpec, index: IndexReader) -> list[str]:
    """All FIDs that are to come; returns what is said."""
    said = list[str]()
    fids = Fids(spec, index)
    try:
        fids.wait(lambda _: None, said.append)
    finally:
        fids.stop()
    return said


def fids_of(url: str) -> dict[int, float]:
    return {int(stats["cur_nimg"]): stats["fid"] for stats in log.read_stats(url) if "fid" in stats}


def clocks(url: str) -> list[int]:
    """Of the snapshots that are there."""
    return [cur_nimg for cur_nimg in range(0, 2000, 8) if snapshot.exists(url, cur_nimg)]


def scalars(folder: Path) -> dict[int, float]:
    """Step → `fid` in TensorBoard's files: records of length, its checksum, data, its checksum."""
    found: dict[int, float] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                assert value.tag == "fid"
                found[event.step] = value.simple_value
    return found


def test_each_snapshot_has_its_fid_and_the_best_is_kept(
    tmp_path: Path, reader: ChunkReader, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run: four snapshots, the last one its end's."""
    url, shown = str(tmp_path / "run"), list[float]()

    def on_progress(_: int, values: Mapping[str, Any]) -> None:
        shown.extend([values["fid"]] if "fid" in values else [])

    fit_owned(spec_of(url, reader, **SOME), reader, ONE, on_progress)
    fids = fids_of(url)
    assert list(fids) == [40, 80, 120, 160]
    assert all("img_per_sec" in stats for stats in log.read_stats(url))
    assert scalars(tmp_path / "run" / "tensorboard" / "fid") == pytest.approx(fids)
    assert shown == list(fids.values())
    lowest = min(fids, key=lambda cur_nimg: fids[cur_nimg])
    assert clocks(url) == sorted({lowest, 160})
    found = snapshot.best(url)
    assert found is not None
    assert (snapshot.load(found[0]).config.cur_nimg, found[1]) == (lowest, fids[lowest])
    assert snapshot.clock(snapshot.find(url)) == 160
    verb._say_best(url, Terminal("train"))
    said = f"train: best snapshot by FID: {found[0]} (FID {found[1]:.2f} at 0 kimg)\n"
    assert capsys.readouterr().out.endswith(said)


def test_training_ends_while_the_first_fid_is_still_awaited(
    tmp_path: Path, reader: ChunkReader, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the ranks nor the driver wait for a task that was started while they trained."""
    url, gate = str(tmp_path / "run"), tmp_path / "gate"
    at_end = list[tuple[int, int]]()
    monkeypatch.setattr(ray_fid, "_LIST_SEC", 0.0)
    monkeypatch.setattr(ray_train, "Fids", lambda spec, index: Fids(spec, like(index, Gated, gate=gate)))

    def on_progress(cur_nimg: int, _: Mapping[str, Any]) -> None:
        if cur_nimg == 1600 and not at_end:
            at_end.append((len(counted.clocks), len(fids_of(url))))
            gate.touch()

    opens = threading.Timer(60, gate.touch)  # for a driver that would wait
    opens.start()
    settings = {"total_kimg": 1.6, "tick_kimg": 0.08, "snapshot_kimg": 0.8, "fid_samples": 40}
    fit_owned(spec_of(url, reader, **settings), reader, ONE, on_progress)
    opens.cancel()
    assert at_end == [(1, 0)]
    assert list(fids_of(url)) == [800, 1600]


def test_what_fails_is_told_and_ends_nothing(
    tmp_path: Path, reader: ChunkReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run")
    monkeypatch.setattr(ray_train, "Fids", lambda spec, index: Fids(spec, like(index, Broken)))
    fit_owned(spec_of(url, reader, **SOME | {"snapshot_kimg": 0.08}), reader, ONE)
    assert final_state(url)[0] == 160
    failed = [event for event in log.read_events(url) if event["event"] == "fid_failed"]
    assert [event["cur_nimg"] for event in failed] == [80, 160]
    assert {event["reason"] for event in failed} == {"InputError: rows 0 to 50 cannot be read"}
    assert (clocks(url), fids_of(url), snapshot.best(url)) == ([80, 160], {}, None)


def test_a_resumed_run_leaves_alone_what_is_done(tmp_path: Path, reader: ChunkReader, counted: Counted) -> None:
    """What was not noted is found again, to the bit; so is all in another run."""
    some = SOME | {"snapshot_kimg": 0.08}
    whole, parts = (spec_of(str(tmp_path / name), reader, **some) for name in ("whole", "parts"))
    train(whole, reader)
    assert drive(whole, reader.index) == []
    short = spec_of(parts.run_url, reader, total_kimg=0.08, **some)
    train(short, reader)
    drive(short, reader.index)
    assert counted.clocks == [80, 160, 80]
    for name in ("fid/0001-000000000080.json", "stats/0001-fid-000000000080.jsonl"):
        storage.delete(f"{parts.run_url}/{name}")
    train(parts, reader)
    drive(parts, reader.index)
    assert counted.clocks[3:] == [80, 160]
    assert fids_of(parts.run_url) == fids_of(whole.run_url)


def test_without_intervals_or_samples_nothing_is_to_come(tmp_path: Path, reader: ChunkReader, counted: Counted) -> None:
    for name, settings in (("a", {"fid_samples": 40}), ("b", {"snapshot_kimg": 0.04, "fid_samples": 0})):
        spec = spec_of(str(tmp_path / name), reader, total_kimg=0.08, **settings)
        train(spec, reader)
        assert drive(spec, reader.index) == []
    assert counted.clocks == []
    assert clocks(str(tmp_path / "b")) == [40, 80]


def test_the_end_of_a_run_does_not_wait_for_long(
    tmp_path: Path, reader: ChunkReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(str(tmp_path / "run"), reader, total_kimg=0.04, **SOME)
    train(spec, reader)
    monkeypatch.setattr(ray_fid, "_WAIT_SEC", 2.0)
    started = time.monotonic()
    said = drive(spec, like(reader.index, Gated, gate=tmp_path / "gate"))
    assert 2.0 <= time.monotonic() - started < 10.0
    assert said == ["ends without the FID of its last snapshots, which took more than 2 s"]


def test_a_former_owner_notes_and_removes_nothing(tmp_path: Path, reader: ChunkReader) -> None:
    spec = spec_of(str(tmp_path / "run"), reader, total_kimg=0.08, **SOME)
    train(spec, reader)
    storage.put_if_absent(f"{spec.run_url}/owners/000002.json", b"{}")
    with pytest.raises(OwnershipError, match="owner 2 has taken over"):
        drive(spec, reader.index)
    assert ownership.current(spec.run_url) == 2
    assert (fids_of(spec.run_url), clocks(spec.run_url)) == ({}, [40, 80])
