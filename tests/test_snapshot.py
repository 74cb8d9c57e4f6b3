"""What a snapshot says of the dataset that it was trained on."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import snapshot
from pipeline.config import ConfigError
from pipeline.snapshot import SnapshotError, Taken
from tests.generate.test_generate import make_snapshot


def test_it_carries_the_class_counts(tmp_path: Path) -> None:
    plain = snapshot.load(make_snapshot(str(tmp_path)))
    assert plain.config.class_counts == ()
    config = dataclasses.replace(plain.config, class_counts=(6, 3, 0))
    url = snapshot.save(str(tmp_path), config, plain.G_ema, plain.D)
    assert snapshot.load(url).config == config
    assert snapshot.load(url).digest != plain.digest


def test_one_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    config = Path(make_snapshot(str(tmp_path))) / "config.json"
    body = json.loads(config.read_text())
    del body["class_counts"]
    config.write_text(json.dumps(body))
    assert snapshot.load(str(config.parent)).config.class_counts == ()


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, -1], ["many", 1, 2], None, 7])
def test_counts_that_are_no_counts(tmp_path: Path, counts: object) -> None:
    config = Path(make_snapshot(str(tmp_path))) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_counts": counts}))
    with pytest.raises(SnapshotError, match=r"config\.json is not a snapshot's of ganymede"):
        snapshot.load(str(config.parent))


def test_counts_of_other_classes_are_not_written(tmp_path: Path) -> None:
    config = snapshot.load(make_snapshot(str(tmp_path))).config
    with pytest.raises(ConfigError, match="must be 3 numbers, one a class"):
        dataclasses.replace(config, class_counts=(1, 2))


def test_of_those_at_intervals_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """What the end of a run left stays too, and what has no FID yet."""
    run_url = str(tmp_path)
    plain = snapshot.load(make_snapshot(str(tmp_path / "other")))
    fids = {
        (1, 10): 5.0,
        (1, 20): 3.0,
        (1, 30): 9.0,
        (1, 40): 8.0,
        (1, 90): 7.0,
        (1, 95): None,
        (2, 45): 6.0,
        (2, 50): 8.5,
    }
    for (attempt, cur_nimg), fid in fids.items():
        url = snapshot.save(run_url, dataclasses.replace(plain.config, cur_nimg=cur_nimg), plain.G_ema, plain.D)
        taken = Taken(attempt=attempt, cur_nimg=cur_nimg, name=url.rpartition("/")[2])
        snapshot.note_taken(run_url, taken)
        if cur_nimg == 40:  # an interval made it; a run that was ended there ends with it
            snapshot.note_end(run_url, taken)
        assert snapshot.was_taken(run_url, attempt, cur_nimg)
        assert not snapshot.was_taken(run_url, attempt + 1, cur_nimg)
        assert taken in snapshot.without_fid(run_url)
        if fid is not None:
            snapshot.note_fid(run_url, taken, fid)
    assert [taken.cur_nimg for taken in snapshot.without_fid(run_url)] == [95]
    snapshot.prune(run_url)
    assert [cur_nimg for cur_nimg in range(100) if snapshot.exists(run_url, cur_nimg)] == [20, 40, 50, 95]
    best = snapshot.best(run_url)
    assert best is not None
    assert (snapshot.load(best[0]).config.cur_nimg, best[1]) == (20, 3.0)
    assert snapshot.was_taken(run_url, 1, 10)
    assert len(list(tmp_path.glob("snapshots/*/*.safetensors"))) == 4 * 2
    assert snapshot.clock(snapshot.find(run_url)) == 95


def test_what_is_used_is_the_first_that_has_seen_enough_and_stays(tmp_path: Path) -> None:
    """Though the run has gone on since, and has better ones."""
    run_url, plain = str(tmp_path), snapshot.load(make_snapshot(str(tmp_path / "other")))
    urls = {}
    for cur_nimg, fid in {10: 9.0, 20: 8.0, 32: 8.5, 40: 3.0, 64: 4.0}.items():
        url = snapshot.save(run_url, dataclasses.replace(plain.config, cur_nimg=cur_nimg), plain.G_ema, plain.D)
        taken = Taken(attempt=1, cur_nimg=cur_nimg, name=url.rpartition("/")[2])
        snapshot.note_taken(run_url, taken)
        snapshot.note_fid(run_url, taken, fid)
        urls[cur_nimg] = url
    assert [snapshot.first(run_url, wanted) for wanted in (30, 32, 33, 65)] == [urls[32], urls[32], urls[40], None]
    assert snapshot.best(run_url, up_to=32) == (urls[20], 8.0)
    assert snapshot.best(run_url) == (urls[40], 3.0)
    assert snapshot.best(run_url, up_to=5) is None
    snapshot.keep(run_url, urls[20])
    snapshot.prune(run_url)
    assert [cur_nimg for cur_nimg in urls if snapshot.exists(run_url, cur_nimg)] == [20, 40, 64]
