"""`ganymede train` on shards that others wrote, and on what is not shuffled, as a user types it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import cli, train
from pipeline.dataset import record
from tests.dataset import strangers
from tests.jobs.test_train_and_generate_jobs import refused
from tests.small import make_dataset

SMALL = ["--network.base-width", "8", "--train.total-kimg", "0.1", "--train.batch-size", "16", "--train.num-lanes", "2"]
SMALL += ["--foreign.resolution", "16", "--network.z-dim", "8"]


def words(dataset: str | Path, out: Path, *more: str) -> list[str]:
    return ["--dataset", str(dataset), "--out", str(out), *SMALL, *more]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(300)
def test_train_on_foreign_shards(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """From S3; the same command again uses the index, and so does another run that names it."""
    url, out = strangers.write_shards(str(request.getfixturevalue("s3"))), tmp_path / "run"
    assert cli.run_verb(train.VERB, words(url, out)) == 0
    said = capsys.readouterr()
    assert f"train: indexed 6 shards, train 60 images: {out}/index" in said.out
    assert "112 images seen" in said.out
    assert cli.run_verb(train.VERB, words(url, out)) == 0
    said = capsys.readouterr()
    assert f"already indexed, train 60 images: {out}/index" in said.out
    assert "already done" in said.out
    assert "differs in config" in refused(capsys, train.VERB, words(url, out, "--foreign.channels", "1"))
    shared = words(url, tmp_path / "other", "--index", str(out / "index"), "--split", "none")
    assert cli.run_verb(train.VERB, shared) == cli.EXIT_BAD_INPUT  # no such split: told after the index is found
    assert "already indexed" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("default")
def test_sorted_foreign_shards_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = strangers.write_shards(str(tmp_path / "pets"), sort=True)
    capsys.readouterr()
    assert cli.run_verb(train.VERB, words(url, tmp_path / "run")) == cli.EXIT_BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "20 samples of one class follow each other on average, 1.5 would" in line
    assert f"`ganymede prepare --source {url} --out URL`" in line
    assert not list((tmp_path / "run").glob("checkpoints"))


def refused_in_ray(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The last line on stderr; progress lines come before it."""
    capsys.readouterr()
    assert cli.run_verb(train.VERB, list(arguments)) == cli.EXIT_BAD_INPUT
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.err.splitlines()[-1]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (strangers.shard(0, 3)[:5000], "truncated"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
        (strangers.shard(0, 3) * 2, "goes on after"),
        (strangers.tar_of([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1")]), "not together"),
        (strangers.tar_of([("a.jpg", b"")]), "has no label at cls"),
    ],
)
def test_a_bad_shard_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes, why: str
) -> None:
    url = strangers.write(strangers.write_shards(str(tmp_path / "pets")), {"bad.tar": data})
    line = refused_in_ray(capsys, words(url, tmp_path / "run"))
    assert why in line
    assert "bad.tar" in line


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a.tar.gz"], "compressed tars"),
        (["train/a.tar", "b.tar"], "outside the split folders"),
        (["a.jpg"], "no dataset here"),
    ],
)
def test_what_is_no_set_of_shards(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, names: list[str], why: str
) -> None:
    url = strangers.write(str(tmp_path / "pets"), dict.fromkeys(names, b""))
    assert why in refused(capsys, train.VERB, words(url, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_dataset_of_ours_is_not_taken_for_foreign(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_dataset(str(tmp_path / "data"))
    (tmp_path / "data" / "dataset.json").unlink()
    record.settle_plan(str(tmp_path / "empty"), {}, {})
    shutil.copy(tmp_path / "empty" / "plan.json", tmp_path / "data")
    assert "unfinished dataset" in refused(capsys, train.VERB, words(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize(("label_run", "ratio"), [(17, 8.5), (16, 8.0)])
def test_unshuffled_data_of_our_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, label_run: int, ratio: float
) -> None:
    """Above 8 times the runs of independent draws it is refused, unless told otherwise; nothing is written before."""
    count = 20 * label_run
    made = make_dataset(str(tmp_path / "data"), num_samples=count, shard_size=count, label_run=label_run)
    assert made.label_run_ratio("train") == ratio
    job = train.TrainJob(dataset=str(tmp_path / "data"), out=str(tmp_path / "run"))
    if ratio <= 8:
        train._open(job, job.dataset)
        return
    line = refused(capsys, train.VERB, words(tmp_path / "data", tmp_path / "run"))
    assert "17 samples of one class follow each other on average, 2.0 would" in line
    assert not (tmp_path / "run").exists()
    allowed = train.TrainJob(dataset=job.dataset, out=job.out, allow_unshuffled=True)
    assert train._open(allowed, allowed.dataset)[0].plan.num_samples == count


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_index_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """SIGKILL of the whole process group as soon as some parts are there; the index then is as if nothing had been."""
    url = strangers.write_shards(str(tmp_path / "pets"), num_shards=200, each=20)
    out = tmp_path / "index"
    # A split that is not there ends the command right after the index: nothing is trained.
    command = [sys.executable, "-m", "jobs.train", *words(url, tmp_path / "run"), "--split", "none", "--index"]
    done = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, timeout=100)
    assert "no split 'none'" in done.stderr
    started = subprocess.Popen([*command, str(out)], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob("train/index/*")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    assert not (out / "dataset.json").exists()
    assert 0 < len(list(out.glob("train/index/part*"))) < 200
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=100)
    assert "indexed 200 shards, train 4000 images" in done.stdout
    stored = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if not path.name.startswith(".tmp")}
    whole = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")}
    assert stored == whole
