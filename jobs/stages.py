"""The stages of `ganymede run`. Each writes to a URL that is named by the digest of its settings and of what goes in,
so one that is done for the same is skipped, and one for anything else never meets it.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jobs import cli, evaluate, generate, generation, prepare, train, verify
from jobs.evaluate import EvaluateJob
from jobs.generate import GenerateJob
from jobs.prepare import PrepareJob
from jobs.terminal import Terminal
from jobs.train import TrainJob
from jobs.verify import VerifyJob
from pipeline import config, images, snapshot, storage
from pipeline.config import to_dict
from pipeline.dataset import record, sheet
from pipeline.evaluate import features
from pipeline.prepare import plan as prepare_plan

_KEY_DIGITS = 12
_CONTINUED: tuple[str, ...] = (
    "total_kimg",
    "tick_kimg",
    "checkpoint_kimg",
    "num_to_keep",
    "snapshot_kimg",
    "fid_samples",
    "max_replaced_fraction",
    "storage_timeout_sec",
    "record_positions",
)
"""Settings of train with which a run can go on where it stood with others."""
_COLUMNS, _ROWS, _GAP_PX = 10, 10, 16


class StoppedError(Exception):
    """A stage did not end well; it has told why."""

    def __init__(self, code: int, url: str, by_gate: bool) -> None:
        super().__init__(code, url)
        self.code = code
        self.by_gate = by_gate
        """Another try would find the same: not so where what was stored is damaged, which can be mended."""
        self.url = url
        """What the stage wrote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage took."""

    name: str
    url: str
    """Of what it wrote, or looked at."""
    images: int
    """Made, seen or looked at."""
    sec: float
    size_bytes: int
    """Of all that lies at `url`; 0 where the stage was done before."""
    done_before: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """Runs them below one URL, and keeps what each took."""

    out: str
    terminal: Terminal
    taken: list[Stage] = dataclasses.field(default_factory=list)

    def url(self, folder: str, made_from: Mapping[str, Any]) -> str:
        """Where what is made from that lies."""
        return storage.join(self.out, folder, config.digest(made_from)[:_KEY_DIGITS])

    def run(self, name: str, url: str, done_before: bool, work: Callable[[], int], count: Callable[[], int]) -> None:
        """Do the work, also where it is done: it says so. `count` then tells the images. Raises StoppedError."""
        started = time.monotonic()
        code = work()
        if code != cli.EXIT_DONE:
            raise StoppedError(code, url, by_gate=code == cli.EXIT_REFUSED and name.startswith("evaluate"))
        size_bytes = 0 if done_before else sum(entry.size_bytes for entry in storage.list_entries(url))
        sec = time.monotonic() - started
        stage = Stage(name=name, url=url, images=count(), sec=sec, size_bytes=size_bytes, done_before=done_before)
        self.taken.append(stage)


def prepared(stages: Stages, job: PrepareJob) -> str:
    """The source as a dataset: its URL. Another one when the source has changed."""
    source = prepare.scan(job)
    url = stages.url("images", prepare_plan.make(source, job.prepare))
    placed = dataclasses.replace(job, out=url)
    stages.run(
        "prepare",
        url,
        _is_dataset(url),
        lambda: prepare.run_scanned(placed, source, stages.terminal),
        lambda: _num_samples(url),
    )
    return url


def trained(stages: Stages, job: TrainJob, choice: str, beginning: str | None) -> str:
    """The URL of a snapshot: the `last` one of the length that is wanted, or the `best` by FID until there, where that
    is known. A run goes on where the same was trained less long; a new one begins with the snapshot at `beginning`, if
    that is not empty, and None is another run than that.
    """
    made_from = {"dataset": record.read(job.dataset)[1], "from_published": beginning is not None}
    url = stages.url("training", made_from | trained_by(job))
    began_with = _began_with(url)
    if began_with is None:
        began_with = beginning or job.train.init_from
    placed = dataclasses.replace(job, out=url, train=dataclasses.replace(job.train, init_from=began_with))
    stages.run(
        "train",
        url,
        snapshot.first(url, job.train.total_nimg) is not None,
        lambda: train.run(placed, stages.terminal),
        lambda: snapshot.clock(_last(url, job.train.total_nimg)),
    )
    chosen = _chosen(url, job.train.total_nimg, choice)
    snapshot.keep(url, chosen)
    return chosen


def trained_by(job: TrainJob) -> dict[str, Any]:
    """The settings that make another training of it, and not the same one gone on with."""
    adaptive = job.step.augment.mode == "adaptive"  # once a tick
    settings = {
        name: value
        for name, value in to_dict(job.train).items()
        if name not in _CONTINUED or (adaptive and name == "tick_kimg")
    }
    return {"train": settings} | {name: to_dict(getattr(job, name)) for name in ("network", "step", "feed")}


def generated(stages: Stages, job: GenerateJob, name: str = "generate", folder: str = "synthetic") -> str:
    """The URL of the images that a snapshot makes."""
    url = stages.url(folder, generation.make_plan(job, snapshot.load(job.snapshot)).to_dict())
    placed = dataclasses.replace(job, out=url)
    stages.run(
        name,
        url,
        _is_dataset(url),
        lambda: generate.run(placed, stages.terminal),
        lambda: _num_samples(url),
    )
    return url


def verified(stages: Stages, url: str) -> None:
    """Read what was generated again, once."""
    note = storage.join(stages.out, "verified", record.read(url)[1][:_KEY_DIGITS])
    done_before = storage.stat(note) is not None

    def work() -> int:
        if done_before:
            stages.terminal.line(f"verify: already done: {url}")
            return cli.EXIT_DONE
        code = verify.run(VerifyJob(dataset=url), stages.terminal)
        if code == cli.EXIT_DONE:
            storage.put_if_absent(note, b"")
        return code

    stages.run("verify", url, done_before, work, lambda: _num_samples(url))


def evaluated(stages: Stages, job: EvaluateJob, name: str = "evaluate") -> str:
    """The URL of the report of an evaluation that passed. Raises StoppedError for one that did not."""
    made_from: dict[str, Any] = {"real": record.read(job.real)[1], "synthetic": record.read(job.synthetic)[1]}
    made_from |= {part: to_dict(getattr(job, part)) for part in ("evaluate", "features", "gates")}
    url = stages.url("report", made_from | {"weights": features.digest(job.features)})
    placed = dataclasses.replace(job, out=url)
    report = storage.join(url, evaluate.REPORT)
    stages.run(
        name,
        url,
        storage.stat(report) is not None,
        lambda: evaluate.run(placed, stages.terminal),
        lambda: int(json.loads(storage.read(report))["found"]["num_samples"]),
    )
    return url


def picture(out: str, real: str, synthetic: str) -> str:
    """Real images left, synthetic ones right, a row a class: the URL of a PNG."""
    url = storage.join(out, "pictures", f"{synthetic.rpartition('/')[2]}.png")
    if storage.stat(url) is None:
        halves = []
        for dataset_url in (real, synthetic):
            dataset, _ = record.read(dataset_url)
            halves.append(sheet.class_rows(dataset_url, dataset, "train", _COLUMNS, _ROWS))
        # Of one with classes and one without, the latter has one row.
        height = max(map(len, halves))
        halves = [np.pad(half, ((0, height - len(half)), (0, 0), (0, 0))) for half in halves]
        gap = np.full((height, _GAP_PX, halves[0].shape[2]), 255, np.uint8)
        pixels = np.concatenate([halves[0], gap, halves[1]], axis=1)
        storage.put_if_absent(url, images.encode(pixels, "png", 100))
    return url


def table(taken: Sequence[Stage]) -> list[str]:
    """What each stage took, a line each."""
    lines = [f"{'stage':16} {'images':>13} {'GB':>8} {'seconds':>8} {'img/s':>9}  where"]
    for one in taken:
        worked = not one.done_before
        size = f"{one.size_bytes / 1e9:,.3f}" if worked else "-"
        rate = f"{one.images / one.sec:,.0f}" if worked else "-"
        lines.append(f"{one.name:16} {one.images:>13,} {size:>8} {one.sec:>8,.1f} {rate:>9}  {one.url}")
    return lines


def _began_with(run_url: str) -> str | None:
    """What the first owner of a training run was told to begin with; None: it has yet to begin."""
    try:
        settings = config.mapping_from_yaml(storage.read(storage.join(run_url, "config", "000001.yaml")).decode())
    except storage.NotFoundError:
        return None
    return str(settings["train"]["init_from"])


def _is_dataset(url: str) -> bool:
    return storage.stat(storage.join(url, record.NAME)) is not None


def _last(url: str, total_nimg: int) -> str:
    """Not the furthest one: the run may have gone on since, by the word of another command."""
    return snapshot.first(url, total_nimg) or snapshot.find(url)


def _chosen(url: str, total_nimg: int, choice: str) -> str:
    last = _last(url, total_nimg)
    best = snapshot.best(url, snapshot.clock(last)) if choice == "best" else None
    return best[0] if best is not None else last


def _num_samples(url: str) -> int:
    dataset, _ = record.read(url)
    return sum(dataset.num_samples(split) for split in dataset.splits)
