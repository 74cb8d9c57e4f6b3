"""`ganymede train`: a dataset → checkpoints, logs and a snapshot."""

import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch

from jobs import cli, recipes
from jobs.foreign import find_dataset
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import config, snapshot, storage
from pipeline.config import to_dict, to_yaml
from pipeline.dataset import record
from pipeline.dataset.foreign import ForeignConfig
from pipeline.dataset.index import IndexReader, open_split
from pipeline.gan import precision
from pipeline.gan.networks.build import ImageShape, NetworkConfig, shape_for
from pipeline.gan.step import StepConfig
from pipeline.stream import chunk
from pipeline.stream.chunk import ChunkReader, Decoder, FeedConfig
from pipeline.stream.order import OrderPlan
from pipeline.train import checkpoint, log
from pipeline.train.ownership import Ownership
from pipeline.train.ray_train import WorkersConfig, fit, fit_workers
from pipeline.train.spec import RunSpec, TrainConfig

_MEASURED_SAMPLES = 1000
_MAX_LABEL_RUN_RATIO = 8.0
_CONTENT = ("network", "step", "train", "feed")
"""Settings that what is learnt depends on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training run."""

    dataset: str
    """URL of a dataset that `prepare` or `generate` wrote, or of WebDataset shards of any make, which are indexed."""
    out: str
    """URL of the run: checkpoints, snapshots, logs. The same command again goes on from its last checkpoint."""
    split: str = "train"
    """Split of the dataset to learn from."""
    index: str = ""
    """URL for the index of foreign shards, made once and shared by runs that name it; empty: index/ below `out`."""
    foreign: ForeignConfig = dataclasses.field(default_factory=ForeignConfig)
    """How foreign shards are read; other datasets say it themselves."""
    allow_unshuffled: bool = False
    """Train even where samples of one class follow each other in long runs."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Architecture of G and D."""
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    """Loss, optimisers, precision, averaging."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length, order, intervals."""
    feed: FeedConfig = dataclasses.field(default_factory=FeedConfig)
    """How samples reach the networks."""
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)
    """Processes and their resources."""


def run(job: TrainJob, terminal: Terminal) -> int:
    """Train, or say that it is done already."""
    job = dataclasses.replace(job, dataset=storage.resolve(job.dataset), out=storage.resolve(job.out))
    _refuse_dataset(job.out)
    index_url = storage.resolve(job.index) if job.index else storage.join(job.out, "index")
    spec, reader = _open(job, find_dataset(job.dataset, index_url, job.foreign, terminal))
    start = checkpoint.latest_valid(job.out, terminal.warn)
    if start is not None:
        checkpoint.refuse_other(checkpoint.json_state(job.out, start.number, "config"), spec.identity, job.out)
    finished = start is not None and start.cur_nimg >= spec.train.total_nimg
    if start is not None and finished and snapshot.exists(job.out, start.cur_nimg):
        terminal.line(f"train: already done, {start.cur_nimg:,} images seen: {job.out}")
        return cli.EXIT_DONE
    storage.probe(job.out)
    _say_precision(job, terminal)
    start_ray(terminal)
    workers = fit_workers(job.workers, spec.train.num_lanes, ray.cluster_resources())
    with Ownership(job.out) as owner:
        _save_config(job, owner.number)
        spec = dataclasses.replace(spec, owner=owner.number)
        at = start.cur_nimg if start is not None else 0
        if start is not None:
            terminal.line(f"train: goes on from checkpoint {start.number}, {at:,} images seen")
            before = checkpoint.json_state(job.out, start.number, "progress")["world_size"]
            if before != workers.count:
                terminal.warn(
                    f"{before} workers before, {workers.count} now: batch statistics are local to a worker, so results "
                    "differ from those of an unchanged run"
                )
        with terminal.progress(spec.train.total_nimg, "img", "train", initial=at) as bar:
            fit(spec, reader, workers, _Follow(bar, at))
    done = checkpoint.latest_valid(job.out, terminal.warn)
    assert done is not None
    rate = f", {log.read_stats(job.out)[-1]['img_per_sec']:.0f} img/s" if done.cur_nimg > at else ""
    terminal.line(f"train: {done.cur_nimg:,} images seen{rate}: {job.out}")
    return cli.EXIT_DONE


def _say_precision(job: TrainJob, terminal: Terminal) -> None:
    """Of this machine's CPU; a worker elsewhere tells of its own in the events."""
    wanted = job.step.precision
    if not job.workers.use_gpu and precision.supported(wanted, torch.device("cpu")) != wanted:
        terminal.warn(f"this CPU only emulates {wanted}: training computes in fp32, and slower")


class _Follow:
    """Turns the clock, which may go back after a worker died, into steps of a progress bar."""

    def __init__(self, bar: Any, at: int) -> None:
        self._bar, self._at = bar, at

    def __call__(self, cur_nimg: int, shown: Mapping[str, Any]) -> None:
        self._bar.update(cur_nimg - self._at, **shown)
        self._at = cur_nimg


def _open(job: TrainJob, dataset_url: str) -> tuple[RunSpec, ChunkReader]:
    """What the dataset and the settings make of a run; raises for a dataset that does not fit."""
    dataset, digest = record.read(dataset_url)
    try:
        shape = shape_for(job.network, dataset.resolution, dataset.channels, len(dataset.classes))
    except ValueError as error:
        raise config.ConfigError(f"{job.dataset}: {error}") from error
    if not dataset.num_samples(job.split):
        raise record.DatasetError(f"{job.dataset}: split {job.split!r} is empty; prepare it again")
    if not job.allow_unshuffled:
        _refuse_unshuffled(job, dataset)
    index = open_split(dataset_url, dataset, job.split)
    reader = _reader(job, index, shape, dataset.label_run_ratio(job.split))
    # By content, not by place: the same run in another folder has the same snapshot.
    training_run = {"dataset": digest, **{name: to_dict(getattr(job, name)) for name in _CONTENT}}
    lineage = {
        "dataset_digest": digest,
        "training_run": config.digest(training_run),
        "code_version": importlib.metadata.version("ganymede"),
    }
    spec = RunSpec(
        run_url=job.out,
        owner=0,
        plan=reader.plan,
        dataset_digest=digest,
        shape=shape,
        classes=dataset.classes if shape.num_classes else (),
        class_counts=dataset.class_counts.get(job.split, ()) if shape.num_classes else (),
        network=job.network,
        step=job.step,
        train=job.train,
        lineage=lineage,
    )
    return spec, reader


def _reader(job: TrainJob, index: IndexReader, shape: ImageShape, label_run_ratio: float) -> ChunkReader:
    """What read tasks do for a run: all of it follows from the dataset and the settings, none from the cluster."""
    train, in_tasks = job.train, job.feed.decode == "tasks"
    file_bytes = float(np.mean(index.rows(0, min(_MEASURED_SAMPLES, index.num_samples))["size"].to_numpy()))
    sample_bytes = shape.resolution**2 * shape.channels if in_tasks else file_bytes
    steps_per_group = chunk.default_steps_per_group(index.num_samples, train.batch_size, train.num_lanes, sample_bytes)
    chunk_size = steps_per_group * train.batch_size // train.num_lanes
    plan = OrderPlan(
        num_samples=index.num_samples,
        seed=train.seed,
        batch_size=train.batch_size,
        num_lanes=train.num_lanes,
        steps_per_group=steps_per_group,
        runs_per_chunk=chunk.default_runs_per_chunk(chunk_size, label_run_ratio),
    )
    decoder = Decoder(
        resolution=shape.resolution,
        channels=shape.channels,
        seed=train.seed,
        flip=job.feed.flip,
        crop_px=job.feed.crop_px,
    )
    return ChunkReader(index=index, plan=plan, decoder=decoder, in_tasks=in_tasks)


def _refuse_unshuffled(job: TrainJob, dataset: record.DatasetRecord) -> None:
    if dataset.label_run_ratio(job.split) > _MAX_LABEL_RUN_RATIO:
        runs = dataset.label_runs[job.split]
        raise record.DatasetError(
            f"{job.dataset} is not shuffled: {runs.mean:.0f} samples of one class follow each other on average, "
            f"{runs.independent:.1f} would if they were mixed; shuffle it with "
            f"`ganymede prepare --source {job.dataset} --out URL` and train on that, or go on with --allow-unshuffled"
        )


def _refuse_dataset(out: str) -> None:
    for name in (record.NAME, record.PLAN_NAME):
        if storage.stat(storage.join(out, name)) is not None:
            raise record.DatasetError(f"{out}: holds a dataset ({name}); choose another output URL")


def _save_config(job: TrainJob, owner: int) -> None:
    storage.put_if_absent(storage.join(job.out, "config", f"{owner:06d}.yaml"), to_yaml(job).encode())


VERB = cli.Verb(
    name="train", help="dataset -> checkpoints and a snapshot", config=TrainJob, presets=recipes.TRAIN, run=run
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
