"""`ganymede train` as a user types it: goes on only with what it began with, fine-tunes, and says what it will take."""

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from jobs import cli, train
from jobs.terminal import Terminal
from pipeline import snapshot
from pipeline.gan.networks.build import NetworkConfig
from pipeline.stream import chunk
from pipeline.train import checkpoint, log
from pipeline.train.spec import TrainConfig
from pipeline.train.workers import fit_workers
from tests.jobs.test_train_and_generate_jobs import data, refused, train_here
from tests.small import make_dataset

__all__ = ["data"]


SMALL = NetworkConfig(z_dim=8, base_width=8)
SMALL_WORDS = ["--network.z-dim", "8", "--network.base-width", "8"]


def test_a_finished_run_is_not_taken_for_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str
) -> None:
    """Decided in the driver, from the checkpoint: no Ray is started for it."""
    monkeypatch.setattr(chunk, "_CHUNK_BYTES", 8_000)  # so that here, too, pixels need smaller chunks than files
    words = ["--dataset", data, "--out", str(tmp_path / "run"), "--train.total-kimg", "0.1"]
    train_here(train.TrainJob(dataset=data, out=str(tmp_path / "run"), train=TrainConfig(total_kimg=0.1)))
    assert cli.run_verb(train.VERB, words) == 0
    assert "already done" in capsys.readouterr().out
    make_dataset(str(tmp_path / "other"), num_samples=110)
    for other, named in (
        (["--train.seed", "7"], "seed was 0, now 7"),
        (["--train.batch-size", "32"], "batch_size was 64, now 32"),
        (["--train.num-lanes", "4"], "num_lanes was 8, now 4"),
        (["--feed.decode", "tasks"], "chunk_size was 72, now 24"),
        (["--step.d-steps", "2"], "real_batches was 1, now 2"),
        (["--dataset", str(tmp_path / "other")], "dataset_digest was"),
        (["--network.base-width", "16"], "'base_width': 64"),
    ):
        line = refused(capsys, train.VERB, [*words, *other])
        assert "cannot resume with other settings: " in line
        assert named in line


@pytest.mark.usefixtures("ray_session")
def test_without_a_cpu_to_read_a_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str) -> None:
    words = ["--dataset", data, "--out", str(tmp_path / "run"), "--step.precision", "fp32"]  # of bf16 some CPUs warn
    line = refused(capsys, train.VERB, [*words, "--workers.num-workers", "2", "--workers.cpus-per-worker", "4"])
    assert "2 workers of 4 CPUs on 8 CPUs leave none to read data; set fewer" in line
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(("network", "told"), [("dcgan", True), ("sngan", True), ("r3gan", False)])
def test_batch_statistics_are_spoken_of_where_there_are_any(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, network: str, told: bool
) -> None:
    """On the terminal and in the events, when another number of workers goes on."""
    url = str(tmp_path / "run")
    small = NetworkConfig(name=network, base_width=16, max_width=16, depth=1)  # type: ignore[arg-type]
    job = train.TrainJob(dataset=data, out=url, network=small, train=TrainConfig(total_kimg=0.1))
    train_here(job)
    last = checkpoint.latest_valid(url, pytest.fail)
    assert last is not None
    state = checkpoint.load(url, last)
    checkpoint.save(url, dataclasses.replace(state, progress={**state.progress, "world_size": 2}), 1)
    longer = dataclasses.replace(job, train=TrainConfig(total_kimg=0.2))
    found = train._open_run(longer, data, pytest.fail)
    train._say_start(longer, found, fit_workers(longer.workers, 8, {"CPU": 8.0}), Terminal("train"))
    assert ("2 workers before, 1 now: batch statistics" in capsys.readouterr().err) == told
    train_here(longer)
    (resumed,) = [event for event in log.read_events(url) if event["event"] == "resumed"]
    assert ("note" in resumed) == told


@pytest.fixture
def donor(tmp_path: Path, data: str) -> str:
    """A finished run."""
    url = str(tmp_path / "donor")
    train_here(train.TrainJob(dataset=data, out=url, network=SMALL, train=TrainConfig(total_kimg=0.1)))
    return url


def test_a_snapshot_that_a_run_cannot_begin_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, donor: str
) -> None:
    """Told before any Ray is started, by the real command and by the dry run."""
    words = ["--dataset", data, "--out", str(tmp_path / "run"), "--init-from", donor]
    line = refused(capsys, train.VERB, [*words, "--network.z-dim", "8", "--network.base-width", "16"])
    assert "network.base_width is 8 there and 16 here; set --network.base-width 8, or name another snapshot" in line
    assert cli.run_verb(train.VERB, [*words, "--dry-run"]) == 0
    assert "# no estimate: " in (said := capsys.readouterr().out)
    assert "network.z_dim is 8 there and 100 here" in said
    os.truncate(Path(snapshot.find(donor)) / "D.safetensors", 1000)
    assert "truncated or altered" in refused(capsys, train.VERB, [*words, *SMALL_WORDS])
    assert not (tmp_path / "run").exists()


def test_what_a_run_began_with_stays_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, donor: str
) -> None:
    """Its lineage holds the snapshot by digest, not by place, also when the snapshot is gone; the flag must stay."""
    short, digest = TrainConfig(total_kimg=0.1, init_from=donor), snapshot.load(snapshot.find(donor)).digest
    job = train.TrainJob(dataset=data, out=str(tmp_path / "run"), network=SMALL, train=short)
    shutil.copytree(snapshot.find(donor), tmp_path / "copy")
    elsewhere = dataclasses.replace(short, init_from=str(tmp_path / "copy"))
    lineages = [
        train._open_run(
            dataclasses.replace(job, out=str(tmp_path / "x"), train=settings), data, pytest.fail
        ).spec.lineage
        for settings in (short, elsewhere, dataclasses.replace(short, init_from=""))
    ]
    assert lineages[0] == lineages[1]
    assert lineages[0]["training_run"] != lineages[2]["training_run"]
    assert "init_from" not in lineages[2]
    train_here(job)
    shutil.rmtree(f"{donor}/snapshots")
    train_here(dataclasses.replace(job, train=dataclasses.replace(short, total_kimg=0.2)))
    source = snapshot.load(snapshot.find(job.out))
    assert (source.config.cur_nimg, source.config.lineage["init_from"]) == (256, digest)
    words = ["--dataset", data, "--out", job.out, *SMALL_WORDS, "--total-kimg", "0.2"]
    assert "begun with --train.init-from" in refused(capsys, train.VERB, words)
    assert cli.run_verb(train.VERB, [*words, "--init-from", donor]) == 0
    assert "already done" in capsys.readouterr().out
    words[3] = donor
    line = refused(capsys, train.VERB, [*words, "--init-from", job.out])
    assert "begun without --train.init-from, and goes on as it began; leave it out, or choose another out URL" in line


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_a_fine_tuned_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, donor: str
) -> None:
    """A rank works in another folder than the driver; the dataset has another class."""
    monkeypatch.chdir(tmp_path)
    make_dataset(str(tmp_path / "triangles"), classes=("square", "triangle"))
    words = ["--dataset", "triangles", "--out", "run", "--init-from", "donor"]
    assert cli.run_verb(train.VERB, [*words, *SMALL_WORDS, "--total-kimg", "0.1"]) == 0
    line = f"train: begins with the weights of {snapshot.find(donor)}; classes it does not know: triangle\n"
    assert line in capsys.readouterr().out
    (said,) = [event for event in log.read_events("run") if event["event"] == "initialised"]
    assert said["snapshot"] == snapshot.load(snapshot.find("run")).config.lineage["init_from"]
    assert (said["remade"], said["new_classes"]) == (["G.embed.weight", "D.plane.weight"], ["triangle"])


def comments(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> list[str]:
    """What `ganymede train --dry-run` says beside the configuration, which it prints as one can read it again."""
    assert cli.run_verb(train.VERB, [*words, "--dry-run"]) == 0
    output = capsys.readouterr()
    assert yaml.safe_load(output.out)["out"]
    return [line for line in output.out.splitlines() if line.startswith("# ")]


def test_train_dry_run_says_what_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str
) -> None:
    """No Ray is started and nothing is stored; a run that has begun is told what is left."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "run"
    words = ["--dataset", data, "--out", str(out), *SMALL_WORDS, "--workers.num-workers", "2"]
    said = comments(capsys, [*words, "--total-kimg", "640"])
    assert re.fullmatch(
        r"# workers: 2; each: [\d.]+ CPU, \d+ threads of torch, \d+ that decode; "
        rf"left to read: [\d.]+ of {os.cpu_count()} CPU of this machine",
        said[0],
    )
    assert re.fullmatch(
        r"# [\d,]+ img/s: 20 steps of worker 1 of 2, which added up no gradients with others, took [\d.e-]+ s each on "
        "this machine",
        said[1],
    )
    assert re.fullmatch(r"# about [\d.]+ (s|h) for 640,000 images, [\d.]+ core-hours", said[2])
    assert re.fullmatch(r"# [\d.]+ GB of memory a worker, [\d.]+ GB to be read", said[3])
    assert not out.exists()
    rate, sec = (float(re.search(pattern, said[1])[1].replace(",", "")) for pattern in (r"# ([\d,]+)", r"took (\S+)"))  # type: ignore[index]
    assert rate * sec == pytest.approx(64, rel=0.02)
    train_here(train.TrainJob(dataset=data, out=str(out), network=SMALL, train=TrainConfig(total_kimg=0.1)))
    before = sorted(out.rglob("*"))
    assert "for 192 images from checkpoint 1 on" in comments(capsys, [*words, "--total-kimg", "0.32"])[2]
    assert comments(capsys, [*words, "--total-kimg", "0.1"])[1] == "# nothing is left to do: 128 images seen"
    assert sorted(out.rglob("*")) == before


@pytest.mark.usefixtures("ray_session")
def test_train_dry_run_asks_the_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    words = ["--dataset", data, "--out", str(tmp_path / "run"), *SMALL_WORDS]
    assert comments(capsys, [*words, "--workers.num-workers", "2,8"])[0] == (
        "# workers: 2 to 8, here 7; each: 1 CPU, 1 threads of torch, 1 that decode; "
        "left to read: 1 of 8 CPU of the cluster at auto"
    )
    said = comments(capsys, [*words, "--workers.cpus-per-worker", "8"])
    assert said == [
        "# no estimate: 1 workers of 8 CPUs on 8 CPUs leave none to read data; "
        "set fewer --workers.num-workers or a smaller --workers.cpus-per-worker"
    ]


def test_train_dry_run_without_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--dataset", data, "--out", str(tmp_path / "run")]
    assert "1 workers need a GPU each, the cluster has 0" in comments(capsys, [*words, "--workers.use-gpu"])[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where a driver is too old
    assert "use_gpu is set and this machine has no GPU" in comments(capsys, [*words, "--workers.use-gpu"])[1]
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        shard.unlink()
    assert re.match(r"# no estimate: \S+tar: ", comments(capsys, words)[1])
    words[1] = str(tmp_path / "nothing")
    assert "no dataset here" in comments(capsys, words)[1]
