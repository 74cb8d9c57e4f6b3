"""`ganymede verify` and `ganymede gc` as a user types them."""

import os
import time
from pathlib import Path

import pytest

from jobs import cli, gc, verify
from pipeline import storage
from pipeline.dataset import record
from tests.small import make_dataset


@pytest.fixture
def url(tmp_path: Path) -> str:
    out = str(tmp_path / "data")
    record.settle_plan(out, {}, {})
    make_dataset(out)
    return out


def names(url: str) -> list[str]:
    return [entry.name for entry in storage.list_entries(url)]


@pytest.mark.usefixtures("ray_session")
def test_verify_says_yes_or_no(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert cli.run_verb(verify.VERB, ["--dataset", url]) == cli.EXIT_DONE
    assert "verify: 100 images as their index says" in capsys.readouterr().out
    os.truncate(f"{url}/train/shard-000001.tar", 1000)
    Path(f"{url}/train/shard-000002.tar").unlink()
    assert cli.run_verb(verify.VERB, ["--dataset", url]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert "shard-000001.tar" in told
    assert "shard-000002.tar" in told
    assert "2 problems" in told.splitlines()[-1]


def test_verify_refuses_what_is_no_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run_verb(verify.VERB, ["--dataset", str(tmp_path)]) == cli.EXIT_BAD_INPUT
    assert "no dataset here" in capsys.readouterr().err


def test_gc_lists_before_it_removes(capsys: pytest.CaptureFixture[str], url: str) -> None:
    kept = names(url)
    for stranger in ("train/shard-000099.tar", "train/index/part-00099.parquet", "notes.txt"):
        storage.put(storage.join(url, stranger), b"left")
    storage.put(storage.join(url, "events/generate.yaml"), b"told")
    for words in ([], ["--remove"]):
        assert cli.run_verb(gc.VERB, ["--dataset", url, *words]) == cli.EXIT_DONE
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("gc: train/shard-000099.tar", "gc: notes.txt", "gc: 3 "))
        assert "events" not in shown
        assert len(names(url)) == (len(kept) + 1 if words else len(kept) + 4)
    assert sorted([*kept, "events/generate.yaml"]) == sorted(names(url))
    assert cli.run_verb(gc.VERB, ["--dataset", url, "--remove"]) == cli.EXIT_DONE
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_finds_what_a_killed_writer_left(url: str) -> None:
    """An old temporary file, not one that may still be written."""
    for name, age_sec in ((".tmp-0123456789abcdef", 7200), (".tmp-fedcba9876543210", 60)):
        path = Path(url) / "train" / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_sec,) * 2)
    assert cli.run_verb(gc.VERB, ["--dataset", url, "--remove"]) == cli.EXIT_DONE
    assert not (Path(url) / "train" / ".tmp-0123456789abcdef").exists()
    assert (Path(url) / "train" / ".tmp-fedcba9876543210").exists()


def test_gc_gives_an_unfinished_dataset_up_only_when_told(capsys: pytest.CaptureFixture[str], url: str) -> None:
    Path(f"{url}/{record.NAME}").unlink()
    before = names(url)
    assert cli.run_verb(gc.VERB, ["--dataset", url, "--remove"]) == cli.EXIT_BAD_INPUT
    assert "give it up with --abandon" in capsys.readouterr().err
    assert names(url) == before
    assert cli.run_verb(gc.VERB, ["--dataset", url, "--abandon", "--remove"]) == cli.EXIT_DONE
    *_, last, total = capsys.readouterr().out.splitlines()
    assert last == f"gc: {record.PLAN_NAME}"
    assert total.startswith(f"gc: {len(before)} removed")
    assert names(url) == []


def test_gc_refuses_what_is_no_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert cli.run_verb(gc.VERB, ["--dataset", str(tmp_path), "--abandon", "--remove"]) == cli.EXIT_BAD_INPUT
    assert "no dataset here" in capsys.readouterr().err
    assert (tmp_path / "photo.jpg").exists()


def test_gc_on_s3(s3: str) -> None:
    make_dataset(f"{s3}/data")
    storage.put(f"{s3}/data/train/shard-000099.tar", b"left")
    assert cli.run_verb(gc.VERB, ["--dataset", f"{s3}/data", "--remove"]) == cli.EXIT_DONE
    assert storage.stat(f"{s3}/data/train/shard-000099.tar") is None
    assert storage.stat(f"{s3}/data/train/shard-000000.tar") is not None
