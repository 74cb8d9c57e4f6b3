"""`ganymede run`: images → shards → a trained GAN → shards of synthetic images that passed → published, in one go."""

import dataclasses
import datetime
import hashlib
import sys
import time
from typing import Literal

from jobs import cli, recipes, stages
from jobs.evaluate import EvaluateJob
from jobs.generate import GenerateJob
from jobs.prepare import PrepareJob
from jobs.stages import Stages, StoppedError
from jobs.terminal import Terminal
from jobs.train import TrainJob
from pipeline import periods, published, snapshot, storage
from pipeline.config import ConfigError, canonical_json, to_yaml
from pipeline.dataset import record
from pipeline.errors import InputError
from pipeline.evaluate.features import FeaturesConfig
from pipeline.evaluate.gates import GateConfig
from pipeline.evaluate.ray_evaluate import EvaluateConfig
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.generate.plan import GenerateConfig
from pipeline.prepare.plan import PrepareConfig
from pipeline.published import Entry, Publication
from pipeline.stream.chunk import FeedConfig
from pipeline.train import ownership
from pipeline.train.ownership import Ownership
from pipeline.train.spec import TrainConfig
from pipeline.train.workers import WorkersConfig

_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """The whole loop."""

    source: str
    """Images: a folder, a zip, IDX files, WebDataset shards, or fashion-mnist."""
    out: str
    """URL below which images/, training/, synthetic/, report/ and published/ are written; the same command again
    finishes them, and does again what depends on a setting or an image that has changed."""
    period: str = ""
    """Names a scheduled run, in UTC: 2026-11-22T05, 2026-11-22, 2026-W47, 2026-11, or this-hour, this-day, this-week,
    this-month. Each period has images of its own, and is published once. Empty: a run of its own."""
    catch_up: bool = False
    """Do the periods that were missed first, oldest first; without it they are listed."""
    begin_with: Literal["new", "published"] = "new"
    """Weights that a training begins with, as when the images have changed: new ones, or those of the snapshot that
    made what is current, where anything is published yet."""
    snapshot: Literal["last", "best"] = "last"
    """Of the training run: its last one, or that with the lowest FID of those that have one."""
    trial_images: int = 10_000
    """Images that are made and judged before the many, which a gate may thus spare; none where at most twice as many
    are wanted. 0: none."""
    prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)
    """Images to shards."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Architecture of G and D."""
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    """Loss, optimisers, precision, averaging."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length, order, intervals."""
    feed: FeedConfig = dataclasses.field(default_factory=FeedConfig)
    """How samples reach the networks."""
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)
    """Training processes and their resources."""
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    """What to make."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """How much of what was made is looked at."""
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    """What is compared."""
    gates: GateConfig = dataclasses.field(default_factory=GateConfig)
    """What must be found."""

    def __post_init__(self) -> None:
        if self.trial_images < 0:
            raise ConfigError(f"trial_images must be at least 0, not {self.trial_images}")
        if self.catch_up and not self.period:
            raise ConfigError("catch_up is set and no period; name one, as --period this-day")
        if self.begin_with == "published" and self.train.init_from:
            raise ConfigError("begin_with published and train.init_from both say what a training begins with; give one")
        if self.period:
            periods.resolve(self.period, _now())


def run(job: RunJob, terminal: Terminal) -> int:
    """Do what is left of a run, or of a period and those that were missed. Of several drivers at once one works."""
    out = storage.resolve(job.out)
    period = periods.resolve(job.period, _now()) if job.period else ""
    job = dataclasses.replace(job, out=out, period=period)
    storage.probe(out)
    entries = published.series(out)
    _tell_missed(job, entries, terminal)
    todo, codes = _todo(job, entries), []
    if todo:
        with Ownership(out) as owner:
            config_url = storage.join(out, "config", f"{owner.number:06d}.yaml")
            storage.put_if_absent(config_url, to_yaml(job).encode())
            entries = published.series(out)  # again: until now another driver may have published
            todo = _todo(job, entries)
            codes = [_once(dataclasses.replace(job, period=one), owner.number, terminal) for one in todo]
    if period not in todo:
        _tell_done(job, entries, terminal)
    return max(codes, default=cli.EXIT_DONE)  # 3 where any was refused


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _todo(job: RunJob, entries: list[Entry]) -> list[str]:
    """The periods to do; "" is a run of its own."""
    if not job.period:
        return [""]
    missed = published.missed(job.out, entries, job.period) if job.catch_up else []
    done = {entry.added.period for entry in entries}
    return [*missed, *(() if job.period in done else (job.period,))]


def _tell_missed(job: RunJob, entries: list[Entry], terminal: Terminal) -> None:
    if missed := published.missed(job.out, entries, job.period) if job.period else []:
        shown = ", ".join(missed[:_SHOWN]) + (f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else "")
        what = f"{len(missed)} periods were missed: {shown}"
        if job.catch_up:
            terminal.line(f"run: {what}; they come first")
        else:
            terminal.warn(f"{what}; --catch-up does them first")


def _tell_done(job: RunJob, entries: list[Entry], terminal: Terminal) -> None:
    (entry,) = [entry for entry in entries if entry.added.period == job.period]
    where = storage.join(job.out, entry.added.dataset)
    terminal.line(f"run: already done, {job.period} was published as number {entry.number}: {where}")


def _once(job: RunJob, owner: int, terminal: Terminal) -> int:
    """The loop, once: its exit code, which is that of the stage that ended it."""
    started, named = time.monotonic(), f" {job.period}" if job.period else ""
    if named:
        terminal.line(f"run: begins{named}")
    track = Stages(out=job.out, terminal=terminal)
    try:
        real, synthetic, publication = _loop(job, track)
    except StoppedError as stop:
        _summarise(job, track, owner, None)
        if job.period and stop.by_gate:
            published.note_refused(job.out, job.period, _below(job.out, stop.url))
        terminal.line(f"run:{named} refused, nothing is published: {stop.url}")
        return stop.code
    ownership.check(job.out, owner)
    entry = published.publish(job.out, publication)
    _summarise(job, track, owner, entry)
    terminal.line(f"run:{named} published as number {entry.number}: {storage.join(job.out, entry.added.dataset)}")
    shown = stages.picture(job.out, real, synthetic)
    took = time.monotonic() - started
    terminal.line(f"run: done in {took:.0f} s; real | synthetic, a row a class: {shown}")
    return cli.EXIT_DONE


def _loop(job: RunJob, track: Stages) -> tuple[str, str, Publication]:
    """All stages: the URLs of the images and of those made, and what can be published. Raises StoppedError where one
    says no.
    """
    real = stages.prepared(track, PrepareJob(source=job.source, out="", prepare=job.prepare))
    judged = EvaluateJob.reference_split in record.read(real)[0].splits
    if not judged and job.gates != GateConfig():
        raise InputError(f"gates are set, and {job.source} has no folder test/ to judge by; add one, or leave them out")
    training = TrainJob(
        dataset=real, out="", network=job.network, step=job.step, train=job.train, feed=job.feed, workers=job.workers
    )
    chosen = stages.trained(track, training, job.snapshot, _beginning(job))
    making = GenerateJob(snapshot=chosen, out="", generate=_of_period(job), use_gpu=job.workers.use_gpu)
    if judged:
        _try(job, track, real, making)
    synthetic = stages.generated(track, making)
    stages.verified(track, synthetic)
    report = ""
    if judged:
        report = stages.evaluated(track, _evaluation(job, real, synthetic, chosen))
    else:
        track.terminal.warn("no evaluation: the source has no folder test/ of images that are not trained on")
    publication = Publication(
        period=job.period,
        dataset=_below(job.out, synthetic),
        dataset_digest=record.read(synthetic)[1],
        report=_below(job.out, report),
        snapshot=_below(job.out, chosen),
        snapshot_digest=snapshot.load(chosen).digest,
    )
    return real, synthetic, publication


def _beginning(job: RunJob) -> str | None:
    """URL of the published snapshot that a training begins with; empty: there is none yet; None: none is wanted."""
    if job.begin_with == "new":
        return None
    entries = published.series(job.out)
    return storage.join(job.out, entries[-1].current.snapshot) if entries else ""


def _of_period(job: RunJob) -> GenerateConfig:
    """What to generate: a period has a seed of its own, so that each has other images."""
    if not job.period:
        return job.generate
    word = hashlib.sha256(f"{job.generate.seed}/{job.period}".encode()).digest()
    return dataclasses.replace(job.generate, seed=int.from_bytes(word[:6], "big"))


def _try(job: RunJob, track: Stages, real: str, making: GenerateJob) -> None:
    """Make and judge a few of the images, if there are many to come. Raises StoppedError where they do not pass."""
    wanted = making.generate
    if not job.trial_images or wanted.num_images <= 2 * job.trial_images:
        return
    few = dataclasses.replace(
        wanted,
        num_images=job.trial_images,
        shard_size=min(wanted.shard_size, job.trial_images),
        class_counts=_shares(wanted.class_counts, job.trial_images),
    )
    trial = stages.generated(track, dataclasses.replace(making, generate=few), "generate trial", "trial")
    stages.evaluated(track, _evaluation(job, real, trial, making.snapshot), "evaluate trial")


def _shares(counts: tuple[int, ...], total: int) -> tuple[int, ...]:
    """`total` divided as the counts are, by largest remainder."""
    if not counts:
        return ()
    parts = [divmod(count * total, sum(counts)) for count in counts]
    nearest = sorted(range(len(parts)), key=lambda label: (-parts[label][1], label))
    more = set(nearest[: total - sum(whole for whole, _ in parts)])
    return tuple(whole + (label in more) for label, (whole, _) in enumerate(parts))


def _evaluation(job: RunJob, real: str, synthetic: str, chosen: str) -> EvaluateJob:
    return EvaluateJob(
        real=real,
        synthetic=synthetic,
        snapshot=chosen,
        out="",
        evaluate=job.evaluate,
        features=job.features,
        gates=job.gates,
        cache=storage.join(job.out, "cache"),
    )


def _below(out: str, url: str) -> str:
    """A URL relative to that of the loop."""
    return url.removeprefix(out).lstrip("/")


def _summarise(job: RunJob, track: Stages, owner: int, entry: Entry | None) -> None:
    """Say and store what each stage took."""
    for line in stages.table(track.taken):
        track.terminal.line(f"run: {line}")
    body = {
        "period": job.period,
        "published": entry.number if entry else None,
        "stages": [dataclasses.asdict(one) for one in track.taken],
    }
    name = f"{owner:06d}{f'-{job.period}' if job.period else ''}.json"
    storage.put_if_absent(storage.join(job.out, "summary", name), canonical_json(body))


VERB = cli.Verb(
    name="run",
    help="prepare, train, generate, evaluate and publish in one go",
    config=RunJob,
    presets=recipes.RUN,
    run=run,
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
