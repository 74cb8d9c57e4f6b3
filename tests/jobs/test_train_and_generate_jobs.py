"""`ganymede train`, `generate` and `run` as a user types them: what is wrong is told in one line, with exit code 2."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import cli, generate, generation, run, train
from jobs.cli import Verb
from jobs.terminal import Terminal
from pipeline import snapshot, storage
from pipeline.dataset import record
from pipeline.errors import InputError
from pipeline.gan.networks.build import NetworkConfig
from pipeline.generate import estimate, shard_writer
from pipeline.generate.factory import open_factory
from pipeline.generate.plan import GenerateConfig
from pipeline.generate.ray_generate import Workers
from pipeline.stream.batches import rank_batches
from pipeline.train import loop
from pipeline.train.spec import TrainConfig
from tests.generate.test_generate import make_snapshot
from tests.jobs.test_cli import heed_interrupts
from tests.s3_server import S3Server
from tests.small import make_dataset
from tests.stream.readers import block
from tests.train.test_loop import WORLD


def refused(
    capsys: pytest.CaptureFixture[str], verb: Verb, words: Sequence[str], code: int = cli.EXIT_BAD_INPUT
) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert cli.run_verb(verb, list(words)) == code
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if not line.startswith("log: ")]
    assert len(lines) == 1, output.err
    assert output.out == ""
    assert lines[0].startswith(f"ganymede {verb.name}: ")
    return lines[0]


@pytest.fixture
def data(tmp_path: Path) -> str:
    make_dataset(str(tmp_path / "data"))
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (["--split", "validation"], "no split 'validation'"),
        (["--preset", "dcgam"], "dcgan"),
        (["--train.total-kimgs", "1"], "total-kimg"),
        (["--train.total-kimg", "-1"], "total_kimg must be above 0"),
        (["--train.batch-size", "10"], "not a multiple of num_lanes"),
        (["--network.name", "biggan"], "dcgan"),
        (["--step.loss", "wgan"], "non_saturating"),
        (["--step.g-lr", "2e-4,1e-5"], "set burn_in_kimg above 0"),
        (["--preset", "r3gan-ffhq256"], "network.resolution is 256 and the images have 16²; prepare them with"),
        (["--workers.num-workers", "9"], "num_workers is 9; it must lie between 1 and train.num_lanes = 8"),
        (["--init-from", "nothing-here"], "nothing-here: no snapshot here"),
        (["--init-from", "ftp://x/y"], "neither a local path"),
    ],
)
def test_train_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, extra: list[str], why: str
) -> None:
    out = tmp_path / "run"
    assert why in refused(capsys, train.VERB, ["--dataset", data, "--out", str(out), *extra])
    assert not out.exists()


def test_train_refuses_a_dataset_without_the_classes_a_preset_wants(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_dataset(str(tmp_path / "data"), classes=())
    words = ["--dataset", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--network.labels", "required"]
    assert "the dataset has no classes; prepare it" in refused(capsys, train.VERB, words)


@pytest.mark.parametrize(
    ("tell", "job", "field", "said"),
    [
        (train._say_precision, train.TrainJob(dataset="d", out="o"), "step", "computes in fp32"),
        (generation._warn_of_emulation, generate.GenerateJob(snapshot="s", out="o"), "generate", "only emulates bf16"),
    ],
)
def test_a_cpu_without_bf16_is_told_before_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tell: Any, job: Any, field: str, said: str
) -> None:
    for found, precision, told in (({"avx512_bf16": True}, "bf16", False), ({}, "bf16", True), ({}, "fp32", False)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=found: found)
        owner = dataclasses.replace(getattr(job, field), precision=precision)
        tell(dataclasses.replace(job, **{field: owner}), Terminal("test"))
        assert (said in capsys.readouterr().err) == told


def test_train_refuses_what_is_no_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--dataset", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]
    assert "no dataset here" in refused(capsys, train.VERB, words)
    assert "neither a local path" in refused(
        capsys, train.VERB, ["--dataset", "ftp://x/y", "--out", str(tmp_path / "run")]
    )


def test_train_refuses_an_output_that_holds_a_dataset(capsys: pytest.CaptureFixture[str], data: str) -> None:
    before = sorted(entry.name for entry in storage.list_entries(data))
    assert "holds a dataset" in refused(capsys, train.VERB, ["--dataset", data, "--out", data])
    assert sorted(entry.name for entry in storage.list_entries(data)) == before


def train_here(job: train.TrainJob) -> None:
    """What `ganymede train` does, with one worker: this process."""
    found = train._open_run(train._resolved(job), job.dataset, pytest.fail)
    outlets = loop.Outlets(progress=lambda *_: None, report=lambda _: None)
    first = found.spec.data_step(found.at)
    chunks = range(found.spec.plan.first_chunk(first), 1000)
    batches = rank_batches((block(found.reader, n) for n in chunks), found.reader, first, 0, 1, 1)
    loop.run(dataclasses.replace(found.spec, owner=1), WORLD, found.start, batches, outlets)


@pytest.mark.parametrize(
    ("job", "cluster", "wanted"),
    [
        ({}, {"CPU": 8.0}, Workers(count=8)),
        ({"num_workers": 3}, {"CPU": 8.0}, Workers(count=3)),
        ({"num_workers": 9}, {"CPU": 8.0}, Workers(count=8)),
        ({"num_encoders": 3}, {"CPU": 8.0}, Workers(count=2, num_encoders=3)),
        ({"use_gpu": True}, {"CPU": 30.0, "GPU": 4.0}, Workers(count=4, use_gpu=True, num_encoders=7)),
        ({"use_gpu": True}, {"CPU": 128.0, "GPU": 1.0}, Workers(count=1, use_gpu=True, num_encoders=16)),
        (
            {"use_gpu": True, "num_encoders": 2},
            {"CPU": 9.0, "GPU": 4.0},
            Workers(count=4, use_gpu=True, num_encoders=2),
        ),
    ],
)
def test_generate_workers_fit_the_cluster(job: dict[str, int], cluster: dict[str, float], wanted: Workers) -> None:
    assert generation.fit_workers(generate.GenerateJob(snapshot="s", out="o", **job), cluster) == wanted


@pytest.mark.parametrize(
    ("job", "gpus", "why"),
    [
        ({"use_gpu": True}, 0, "needs a GPU and 1 CPUs, and the cluster has 0 GPUs and 8 CPUs; set --use-gpu false"),
        ({"use_gpu": True, "num_encoders": 9}, 2, "needs a GPU and 9 CPUs, .* or fewer --num-encoders"),
        ({"num_encoders": 9}, 0, "needs 9 CPUs, .*; set --num-encoders 1"),
    ],
)
def test_generate_without_room_for_a_worker(job: dict[str, int], gpus: int, why: str) -> None:
    with pytest.raises(InputError, match=why):
        generation.fit_workers(generate.GenerateJob(snapshot="s", out="o", **job), {"CPU": 8.0, "GPU": gpus})


def test_generate_asked_for_a_gpu_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this process; a worker's GPU is another matter, and the dry run goes on without its estimate."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    words = ["--snapshot", make_snapshot(str(tmp_path / "run")), "--out", str(tmp_path / "out"), "--use-gpu"]
    assert cli.run_verb(generate.VERB, [*words, "--dry-run"]) == 0
    assert "# no estimate: use_gpu is set and this machine has no GPU" in capsys.readouterr().out
    assert "has no GPU" in refused(capsys, generate.VERB, [*words, "--only-keys", "000000001"])


def test_generate_dry_run_says_what_it_will_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, bytes as they turn out to be, and a time; it stores nothing and stays a configuration file."""
    monkeypatch.setattr(generation, "_PROBE_SEC", 0.2)
    url, out = make_snapshot(str(tmp_path / "run")), tmp_path / "out"
    words = ["--snapshot", url, "--out", str(out), "--num-images", "2000", "--shard-size", "900"]
    assert cli.run_verb(generate.VERB, [*words, "--dry-run", "--num-workers", "4"]) == 0
    said = capsys.readouterr().out
    assert yaml.safe_load(said)["generate"]["num_images"] == 2000
    comments = [line for line in said.splitlines() if line.startswith("# ")]
    assert re.fullmatch(r"# 2,000 images in 3 shards, about [\d.]+ GB", comments[0])
    assert re.fullmatch(r"# [\d,]+ img/s on one core of this machine", comments[1])
    assert re.fullmatch(r"# about \d+ s with 4 workers, each with such a core", comments[2])
    assert not out.exists()
    source = snapshot.load(url)
    plan = generation.make_plan(generate.GenerateJob(snapshot=url, out="o"), source)
    factory = open_factory(plan, source.G_ema, source.D, torch.device("cpu"), 2)
    shard = shard_writer.build_shard(factory, 0)
    assert estimate.probe(factory, 0.1).bytes_per_image == pytest.approx(len(shard) / 1000, rel=0.02)


@pytest.mark.parametrize("verb", [train.VERB, generate.VERB], ids=lambda verb: verb.name)
@pytest.mark.parametrize("fault", ["bucket", "credentials", "endpoint"])
def test_s3_faults(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    s3_server: S3Server,
    s3: str,
    tmp_path: Path,
    verb: Verb,
    fault: str,
) -> None:
    out = f"{s3}/out"
    if fault == "bucket":
        out = "s3://no-such-bucket-here/out"
    elif fault == "credentials":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    words = {
        "train": ["--dataset", make_and_name(tmp_path)],
        "generate": ["--snapshot", make_snapshot(str(tmp_path / "run"))],
    }[verb.name]
    # A store may be up again, and keys do not change by themselves.
    code = cli.EXIT_FAILED if fault == "endpoint" else cli.EXIT_BAD_INPUT
    line = refused(capsys, verb, [*words, "--out", out], code)
    assert s3_server.environment()["AWS_SECRET_ACCESS_KEY"] not in line


def make_and_name(tmp_path: Path) -> str:
    make_dataset(str(tmp_path / "data"))
    return str(tmp_path / "data")


@pytest.mark.usefixtures("ray_session")  # Ray starts before the snapshot is read
@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (["--num-images", "0"], "num_images must be at least 1"),
        (["--num-images", "many"], "num"),
        (["--image-format", "gif"], "png"),
        (["--preset", "best"], "default"),
        (["--class-counts", "400,500,200"], "must add up to num_images 1000, not 1100"),
        (["--class-counts", "400,600"], "names 2 classes and the snapshot has 3"),
        (["--truncation", "-1"], "truncation must not be negative"),
        (["--labels", "as-dataset"], "give the numbers with --generate.class-counts"),
        (["--generate.labels", "as-dataset", "--class-counts", "400,300,300"], "give one of them"),
        (["--labels", "as-training"], "as-dataset"),
    ],
)
def test_generate_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, extra: list[str], why: str) -> None:
    url, out = make_snapshot(str(tmp_path / "run")), tmp_path / "out"
    assert why in refused(capsys, generate.VERB, ["--snapshot", url, "--out", str(out), *extra])
    assert not out.exists()


@pytest.mark.usefixtures("ray_session")
def test_generate_refuses_the_classes_of_a_dataset_that_had_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, out = make_snapshot(str(tmp_path / "run"), classes=()), tmp_path / "out"
    words = ["--snapshot", url, "--out", str(out), "--labels", "as-dataset"]
    assert "has no classes; set --generate.labels balanced" in refused(capsys, generate.VERB, words)
    assert not out.exists()


@pytest.mark.parametrize("labels", ["as-dataset", "ignored"])
def test_what_prepare_counted_reaches_the_generated_labels(tmp_path: Path, labels: str) -> None:
    """A dataset of runs, cut where the second class has half as many samples: 60 and 30."""
    make_dataset(str(tmp_path / "data"), num_samples=90, label_run=60)
    url = str(tmp_path / "run")
    job = train.TrainJob(
        dataset=str(tmp_path / "data"),
        out=url,
        allow_unshuffled=True,
        network=NetworkConfig(base_width=8, labels=labels),  # type: ignore[arg-type]
        train=TrainConfig(total_kimg=0.1),
    )
    train_here(job)
    source = snapshot.load(snapshot.find(url))
    config = GenerateConfig(labels="as-dataset", num_images=100)
    if labels == "ignored":
        assert source.config.class_counts == ()
    else:
        assert source.config.class_counts == (60, 30)
        plan = generation.make_plan(generate.GenerateJob(snapshot=url, out="o", generate=config), source)
        assert plan.class_counts == (67, 33)


def test_generate_makes_chosen_samples_again_without_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url, out = make_snapshot(str(tmp_path / "run")), tmp_path / "out"
    words = ["--snapshot", url, "--out", str(out), "--only-keys", "000000007,000000400"]
    for _ in range(2):  # the same again writes the same
        assert cli.run_verb(generate.VERB, words) == 0
        assert capsys.readouterr().out.count("generate: ") == 4
    assert sorted(path.name for path in out.iterdir()) == [
        f"{key}.{extension}" for key in ("000000007", "000000400") for extension in ("cls", "png")
    ]
    assert "is not of this plan" in refused(capsys, generate.VERB, [*words[:-1], "000001000"])


@pytest.mark.usefixtures("ray_session")
def test_generate_refuses_a_truncated_snapshot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.truncate(Path(make_snapshot(str(tmp_path / "run"))) / "G_ema.safetensors", 100)
    words = ["--snapshot", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert "truncated or altered" in refused(capsys, generate.VERB, words)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text('{"model_type": "llama"}')
    words[1] = str(tmp_path / "pickle")
    assert "not a snapshot of ganymede" in refused(capsys, generate.VERB, words)
    assert not (tmp_path / "out").exists()


def test_generate_refuses_a_url_that_holds_something_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str
) -> None:
    url = make_snapshot(str(tmp_path / "run"))
    before = sorted(entry.name for entry in storage.list_entries(data))
    assert "not a dataset of ours" in refused(capsys, generate.VERB, ["--snapshot", url, "--out", data])
    assert sorted(entry.name for entry in storage.list_entries(data)) == before


@pytest.mark.parametrize("verb", [train.VERB, generate.VERB, run.VERB], ids=lambda verb: verb.name)
def test_every_preset_dry_runs(capsys: pytest.CaptureFixture[str], verb: Verb) -> None:
    required = {
        "train": ["--dataset", "d", "--out", "o"],
        "generate": ["--snapshot", "s", "--out", "o"],
        "run": ["--source", "s", "--out", "o"],
    }[verb.name]
    for preset in verb.presets:
        assert cli.run_verb(verb, ["--preset", preset, "--dry-run", *required]) == 0
        assert "out: o" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_is_told_as_such_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Ray Train's own handler of SIGINT would leave with exit code 0."""
    make_dataset(str(tmp_path / "data"))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.train", "--dataset", str(tmp_path / "data"), "--out", str(out)]
    command += ["--network.base-width", "8", "--train.tick-kimg", "1", "--train.checkpoint-kimg", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen([*command, "--train.total-kimg", "1000"], text=True, preexec_fn=heed_interrupts, **pipes)
    deadline = time.monotonic() + 90
    while not list(out.glob("checkpoints/*/COMMIT.json")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    _, complaint = started.communicate(timeout=60)
    assert started.returncode == cli.EXIT_INTERRUPTED, complaint
    assert complaint.splitlines()[-1] == "ganymede train: interrupted"
    # A total that it has passed: the run ends where it stands, with a snapshot.
    done = subprocess.run([*command, "--train.total-kimg", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "goes on from checkpoint" in done.stdout
    assert list(out.glob("snapshots/*/config.json"))


@pytest.mark.parametrize(
    "verb", [pytest.param("train", marks=pytest.mark.slow), pytest.param("generate", marks=pytest.mark.long)]
)
def test_a_full_disk(tmp_path: Path, verb: str) -> None:
    """A real small file system, mounted in a namespace of its own: exit 2, one line, nothing half-written."""
    make_dataset(str(tmp_path / "data"), num_samples=200)
    snapshot_url, small = make_snapshot(str(tmp_path / "run")), tmp_path / "small"
    small.mkdir()
    words = {
        "train": f"jobs.train --dataset {tmp_path}/data --train.total-kimg 1 --train.tick-kimg 0.2 "
        "--train.checkpoint-kimg 0.2 --network.base-width 8",
        "generate": f"jobs.generate --snapshot {snapshot_url} --num-images 20000",
    }[verb]
    script = (
        f"mount -t tmpfs -o size=600k tmpfs {small} && "
        f"{shlex.quote(sys.executable)} -m {words} --out {small}/out; code=$?; "
        f"find {small} -type f -name '.tmp-*'; exit $code"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "disk" in done.stderr.splitlines()[-1]
    assert ".tmp-" not in done.stdout


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_the_score_to_reach_is_found_once_and_kept_in_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, out = make_snapshot(str(tmp_path / "run")), str(tmp_path / "out")
    words = ["--snapshot", url, "--out", out, "--num-images", "20", "--shard-size", "10", "--pilot-images", "50"]
    assert cli.run_verb(generate.VERB, [*words, "--reject-share", "0.5"]) == 0
    assert "makes a pilot of 50 images" in capsys.readouterr().out
    plan = record.stored_plan(out)
    assert isinstance(plan["reject_below"], float)
    before = {entry.name: storage.read(f"{out}/{entry.name}") for entry in storage.list_entries(out)}
    for lost in ("dataset.json", "train/shard-000001.tar", "train/index/part-00001.parquet"):
        storage.delete(f"{out}/{lost}")
    assert cli.run_verb(generate.VERB, [*words, "--reject-share", "0.5"]) == 0
    assert "pilot" not in capsys.readouterr().out
    assert {entry.name: storage.read(f"{out}/{entry.name}") for entry in storage.list_entries(out)} == before
    assert "plan differs in config.reject_share" in refused(capsys, generate.VERB, [*words, "--reject-share", "0.4"])
