"""The README's promise: one command, real images to synthetic ones; killed anywhere, the same command finishes it."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import images, storage
from pipeline.dataset import record
from pipeline.dataset.index import IndexReader
from pipeline.train import checkpoint, log
from tests.small import read_by_webdataset

ROOT = Path(__file__).parents[2]
SHORT = (
    "--train.total-kimg 20 --train.tick-kimg 5 --train.checkpoint-kimg 5 --generate.num-images 6000 "
    "--generate.shard-size 250 --train.record-positions "
    "--evaluate.classifier-steps 20 --evaluate.num-samples 500 --evaluate.utility-steps 0"
)
PREPARED, TRAINED, GENERATED, JUDGED = "images", "training", "synthetic", "report"
VERBS = "log|prepare|train|generate|verify|evaluate|run|warning"
LINE = re.compile(rf"({VERBS}): |make|^\S*ganymede run |^\S*python\S* -m |^touch ")

pytestmark = pytest.mark.timeout(1500)


def start(out: Path, flags: str = "") -> subprocess.Popen[str]:
    """`make demo`, in a process group of its own. The images come from where the README says."""
    command = ["make", "demo", f"DEMO={out}", f"DEMO_FLAGS={flags}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(out: Path, flags: str = "") -> tuple[str, float]:
    """Run it to its end: what it printed, and how long it took."""
    started = time.monotonic()
    process = start(out, flags)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return printed, time.monotonic() - started


def kill_when(out: Path, flags: str, ready: Callable[[], bool], delay_sec: float) -> None:
    """SIGKILL to the whole process group, `delay_sec` after `ready`."""
    process = start(out, flags)
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay_sec)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def only(folder: Path) -> Path:
    """The one folder in it, whose name is the digest of what went in."""
    (found,) = folder.iterdir()
    return found


def digests(folder: Path, *names: str) -> dict[str, str]:
    entries = [entry.name for name in names for entry in storage.list_entries(str(folder / name))]
    paths = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    visible = [path for path in paths if not path.name.startswith(".tmp-")]
    assert len(entries) == len(visible)
    # events/*.yaml say how the run was started, its places included; all else is compared.
    stored = [path for path in visible if path.suffix != ".yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in stored}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo that trains for a minute, once: where it is, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "short"
    return out, finish(out, SHORT)[0]


@pytest.mark.slow
def test_the_demo_is_quiet_and_is_made_once(short: tuple[Path, str]) -> None:
    out, printed = short
    print(printed)
    assert [line for line in printed.splitlines() if not LINE.match(line)] == []
    assert printed.count("log: ") == 1
    again, again_sec = finish(out, SHORT)
    assert again_sec <= 20
    assert again.count("already done") == 5


@pytest.mark.slow
def test_the_webdataset_library_reads_what_came_out(short: tuple[Path, str]) -> None:
    synthetic = only(short[0] / GENERATED)
    samples = read_by_webdataset(sorted((synthetic / "train").glob("*.tar")))
    assert samples == [(f"{i:09d}", i % 10, (32, 32, 3)) for i in range(6_000)]
    assert record.read(str(synthetic))[0].num_samples("train") == 6_000


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, float [n, 1, 32, 32] in [0, 1], and their labels."""
    dataset, _ = record.read(str(folder))
    reader = IndexReader(str(folder / split), dataset.splits[split])
    rows = reader.rows(0, reader.num_samples).to_pylist()
    shards = {name: (folder / split / name).read_bytes() for name in {row["shard"] for row in rows}}
    pixels = [
        images.decode(shards[row["shard"]][row["offset"] : row["offset"] + row["size"]], channels=1).pixels
        for row in rows
    ]
    label = torch.tensor([row["label"] for row in rows])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, label


def classifier(image: torch.Tensor, label: torch.Tensor) -> nn.Module:
    """A small convolutional network, two passes over half of the images."""
    torch.manual_seed(0)
    image = image.contiguous(memory_format=torch.channels_last)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for batch in torch.randperm(len(image) // 2).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(image[batch]), label[batch]).backward()
            optimiser.step()
    return net.eval()


def predictions(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in image.split(1000)])


@pytest.mark.long
def test_the_demo_is_quick_and_good(tmp_path: Path) -> None:
    """A classifier that learnt from real images knows the synthetic ones."""
    printed, elapsed_sec = finish(tmp_path)
    print(printed)
    assert elapsed_sec <= 720
    torch.set_num_threads(2)
    net = classifier(*load(only(tmp_path / PREPARED), "train"))
    real, real_label = load(only(tmp_path / PREPARED), "test")
    assert (predictions(net, real) == real_label).float().mean() > 0.85  # else it is no judge
    image, label = load(only(tmp_path / GENERATED), "train")
    agrees = (predictions(net, image) == label).float()
    by_class = [agrees[label == one].mean().item() for one in range(10)]
    print(json.dumps({"agreement": agrees.mean().item(), "by_class": by_class}))
    assert agrees.mean() >= 0.7
    assert min(by_class) >= 0.4
    # One picture a class would agree as well: images of a class must differ among themselves as real ones do.
    for one in range(10):
        spread = image[label == one].std(0).mean() / real[real_label == one].std(0).mean()
        assert spread > 0.4, f"class {one}: spread {spread:.2f} of the real images'"


@pytest.mark.long
def test_killed_in_every_step_it_ends_the_same(short: tuple[Path, str], tmp_path: Path) -> None:
    seed = int(os.environ.get("GANYMEDE_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}: set GANYMEDE_TEST_SEED to repeat")
    chance = random.Random(seed)
    quiet, killed = short[0], tmp_path / "killed"

    def shards(name: str, at_least: int) -> Callable[[], bool]:
        return lambda: len(list((killed / name).glob("*/train/*.tar"))) >= at_least

    def checkpoints(at_least: int) -> Callable[[], bool]:
        return lambda: len(list((killed / TRAINED).glob("*/checkpoints/*/COMMIT.json"))) >= at_least

    kill_when(killed, SHORT, shards(PREPARED, chance.randint(1, 10)), 0.0)
    assert not list((killed / PREPARED).glob("*/dataset.json"))
    kill_when(killed, SHORT, checkpoints(chance.randint(1, 3)), chance.uniform(0, 2))
    assert digests(killed, PREPARED) == digests(quiet, PREPARED)
    kill_when(killed, SHORT, shards(GENERATED, chance.randint(1, 12)), 0.0)
    assert not list((killed / GENERATED).glob("*/dataset.json"))
    finish(killed, SHORT)

    runs = [only(out / TRAINED) for out in (quiet, killed)]
    events = list(log.read_events(str(runs[1])))
    resumed = [event for event in events if event["event"] == "resumed"]
    assert resumed
    assert resumed[0]["cur_nimg"] > 0
    ends = [checkpoint.latest_valid(str(run), pytest.fail) for run in runs]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].cur_nimg == ends[1].cur_nimg == 20_032
    # The driver died and another went on: no sample was repeated, none left out.
    taken = [log.read_positions(str(run)).sort_by("position") for run in runs]
    assert np.array_equal(taken[1]["position"].to_numpy(), np.arange(20_032))
    assert taken[1]["sample"].equals(taken[0]["sample"])
    # dcgan on one worker: to the bit. Hence the snapshots, and all that is made of them, are equal too.
    assert runs[0].name == runs[1].name
    assert digests(runs[1], "snapshots") == digests(runs[0], "snapshots")
    assert digests(killed, GENERATED) == digests(quiet, GENERATED)
    found = [json.loads((only(out / JUDGED) / "report.json").read_text())["found"] for out in (quiet, killed)]
    assert found[0] == found[1]
    assert digests(killed, "published") == digests(quiet, "published")
