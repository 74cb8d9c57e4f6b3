"""`ganymede train`: a dataset → checkpoints, logs and a snapshot."""

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch

from jobs import cli, recipes
from jobs.foreign import find_dataset
from jobs.ray_session import start_ray
from jobs.terminal import Terminal, duration, one_line
from pipeline import config, snapshot, storage
from pipeline.config import to_dict, to_yaml
from pipeline.dataset import ray_index, record
from pipeline.dataset.foreign import ForeignConfig
from pipeline.dataset.index import IndexReader, open_split
from pipeline.errors import InputError, RetryableError
from pipeline.gan import precision
from pipeline.gan.networks.build import ImageShape, NetworkConfig, assemble, shape_for
from pipeline.gan.step import StepConfig
from pipeline.stream import chunk
from pipeline.stream.chunk import ChunkReader, Decoder, FeedConfig
from pipeline.stream.order import OrderPlan
from pipeline.train import checkpoint, estimate, finetune, log
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.estimate import Estimate
from pipeline.train.ownership import Ownership
from pipeline.train.ranks import has_batch_statistics
from pipeline.train.ray_train import fit, wasted_steps
from pipeline.train.spec import RunSpec, TrainConfig
from pipeline.train.workers import Workers, WorkersConfig, fit_workers

_MEASURED_SAMPLES = 1000
_MAX_LABEL_RUN_RATIO = 8.0
_CONTENT = ("network", "step", "train", "feed")
"""Settings that what is learnt depends on."""
_VAST = {"CPU": 1e9, "GPU": 1e9}
"""A cluster with room for anything that makes sense."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the dataset, the settings and what is stored of a run make of it."""

    spec: RunSpec
    reader: ChunkReader
    start: Checkpoint | None
    """Where it goes on; None: it has yet to begin."""
    new_classes: tuple[str, ...] = ()
    """What a snapshot to begin with does not know."""

    @property
    def at(self) -> int:
        """`cur_nimg` at the start."""
        return self.start.cur_nimg if self.start is not None else 0


def run(job: TrainJob, terminal: Terminal) -> int:
    """Train, or say that it is done already."""
    job = _resolved(job)
    _refuse_dataset(job.out)
    fit_workers(job.workers, job.train.num_lanes, _VAST)  # what no cluster has room for, before one is started
    found = _open_run(job, find_dataset(job.dataset, _index_url(job), job.foreign, terminal), terminal.warn)
    if found.at >= found.spec.train.total_nimg and snapshot.exists(job.out, found.at):
        terminal.line(f"train: already done, {found.at:,} images seen: {job.out}")
        _say_best(job.out, terminal)
        return cli.EXIT_DONE
    storage.probe(job.out)
    _say_precision(job, terminal)
    start_ray(terminal)
    workers = fit_workers(job.workers, found.spec.train.num_lanes, ray.cluster_resources())
    with Ownership(job.out) as owner:
        _save_config(job, owner.number)
        _say_start(job, found, workers, terminal)
        spec = dataclasses.replace(found.spec, owner=owner.number)
        with terminal.progress(spec.train.total_nimg, "img", "train", initial=found.at) as bar:
            fit(spec, found.reader, workers, _Follow(bar, found.at), terminal.warn)
    done = checkpoint.latest_valid(job.out, terminal.warn)
    assert done is not None
    rate = f", {log.read_stats(job.out)[-1]['img_per_sec']:.0f} img/s" if done.cur_nimg > found.at else ""
    wasted = wasted_steps(job.out)
    lost = f", {wasted:,} steps done again" if wasted else ""
    terminal.line(f"train: {done.cur_nimg:,} images seen{rate}{lost}: {job.out}")
    _say_best(job.out, terminal)
    return cli.EXIT_DONE


def _say_best(out: str, terminal: Terminal) -> None:
    best = snapshot.best(out)
    if best is not None:
        url, fid = best
        kimg = snapshot.clock(url) / 1000
        terminal.line(f"train: best snapshot by FID: {url} (FID {fid:.2f} at {kimg:,.0f} kimg)")


def preview(job: TrainJob) -> Iterator[str]:
    """What each worker gets of the cluster, and what the run will take, from a few iterations here; stores nothing."""
    try:
        yield from _estimates(_resolved(job))
    except (InputError, RetryableError) as error:
        yield f"no estimate: {one_line(str(error))}"


def _estimates(job: TrainJob) -> Iterator[str]:
    where, cluster = _cluster()
    workers = fit_workers(job.workers, job.train.num_lanes, cluster)
    ranks = _most_ranks(workers, cluster)
    yield _resources(workers, ranks, cluster, where)
    if job.workers.use_gpu and not torch.cuda.is_available():
        raise InputError("use_gpu is set and this machine has no GPU to try it on; ask on one that has")
    skipped: list[str] = []
    found = _open_run(job, _dataset_url(job), skipped.append)
    yield from skipped
    left = max(0, found.spec.train.total_nimg - found.at)
    if not left:
        yield f"nothing is left to do: {found.at:,} images seen"
        return
    device = torch.device("cuda" if job.workers.use_gpu else "cpu")
    yield from _costs(found, workers, ranks, left, estimate.probe(found.spec, found.reader, workers, device, ranks))


def _costs(found: _Run, workers: Workers, ranks: int, left: int, probed: Estimate) -> Iterator[str]:
    """For `left` images to be seen by so many ranks, each like the one that was probed."""
    step, size, gpu = found.spec.step, found.spec.plan.batch_size, workers.config.use_gpu
    alone = f" of worker 1 of {ranks}, which added up no gradients with others," if ranks > 1 else ""
    rate, took = size / probed.sec_per_step, f"{probed.sec_per_step:.3g} s each on this machine"
    yield f"{rate:,.{int(rate < 10)}f} img/s: {probed.steps} steps{alone} took {took}"
    hours = probed.hours(left, size)
    spent = hours * ranks * (1 if gpu else workers.threads(ranks))
    resumed = f" from checkpoint {found.start.number} on" if found.start is not None else ""
    yield f"about {duration(hours)} for {left:,} images{resumed}, {spent:,.2f} {'GPU' if gpu else 'core'}-hours"
    memory = f"{probed.peak_bytes / 1e9:,.2f} GB {'of its GPU' if gpu else 'of memory'}"
    yield f"{memory} a worker, {left * step.real_batches * probed.read_bytes_per_sample / 1e9:,.2f} GB to be read"


def _cluster() -> tuple[str, Mapping[str, float]]:
    """The resources of the cluster that RAY_ADDRESS names, else of this machine, for which no Ray is started."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "this machine", {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    terminal = Terminal("train")
    with terminal.capture_logs():
        start_ray(terminal)
        return f"the cluster at {address}", ray.cluster_resources()


def _most_ranks(workers: Workers, cluster: Mapping[str, float]) -> int:
    """How many an elastic run has where the whole cluster is free."""
    room = min((cluster.get(kind, 0) - (kind == "CPU")) / need for kind, need in workers.resources.items())
    return max(workers.fewest, min(workers.count, int(room)))


def _resources(workers: Workers, ranks: int, cluster: Mapping[str, float], where: str) -> str:
    """What each worker gets, and what is left for the tasks that read."""
    count = f"{workers.fewest} to {workers.count}, here {ranks}" if workers.elastic else f"{ranks}"
    each = (
        f"{'1 GPU, ' if workers.config.use_gpu else ''}{workers.cpus:g} CPU, {workers.threads(ranks)} threads of torch"
    )
    cpus = cluster.get("CPU", 0)
    left = f"{cpus - ranks * workers.cpus:g} of {cpus:g} CPU of {where}"
    return f"workers: {count}; each: {each}, {workers.decode_threads(ranks)} that decode; left to read: {left}"


def _resolved(job: TrainJob) -> TrainJob:
    """The same job from whatever folder: ranks have another one than the driver."""
    begins = storage.resolve(job.train.init_from) if job.train.init_from else ""
    train = dataclasses.replace(job.train, init_from=begins)
    return dataclasses.replace(job, dataset=storage.resolve(job.dataset), out=storage.resolve(job.out), train=train)


def _index_url(job: TrainJob) -> str:
    return storage.resolve(job.index) if job.index else storage.join(job.out, "index")


def _dataset_url(job: TrainJob) -> str:
    """Where dataset.json is, without indexing anything. Raises DatasetError for foreign shards without an index."""
    if any(storage.stat(storage.join(job.dataset, name)) is not None for name in (record.NAME, record.PLAN_NAME)):
        return job.dataset
    if ray_index.is_done(job.dataset, _index_url(job), job.foreign):
        return _index_url(job)
    raise record.DatasetError(f"{job.dataset}: no dataset here yet, nor an index of foreign shards, which train makes")


def _say_start(job: TrainJob, found: _Run, workers: Workers, terminal: Terminal) -> None:
    """What the run begins or goes on with, and what a change of size may change."""
    if found.start is None:
        if found.spec.init_from:
            new = f"; classes it does not know: {', '.join(found.new_classes)}" if found.new_classes else ""
            terminal.line(f"train: begins with the weights of {found.spec.init_from}{new}")
        return
    terminal.line(f"train: goes on from checkpoint {found.start.number}, {found.at:,} images seen")
    before = checkpoint.json_state(job.out, found.start.number, "progress")["world_size"]
    with torch.device("meta"):  # where networks cost nothing
        networks = assemble(found.spec.network, found.spec.shape)
    if before != workers.count and has_batch_statistics(*networks):
        terminal.warn(
            f"{before} workers before, {workers.count} now: batch statistics are local to a worker, so results "
            "differ from those of an unchanged run"
        )


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


def _open_run(job: TrainJob, dataset_url: str, warn: Callable[[str], None]) -> _Run:
    """Of a run that has begun, compares what must stay. Raises InputError where something does not fit."""
    spec, reader = _open(job, dataset_url)
    start = checkpoint.latest_valid(job.out, warn)
    stored = checkpoint.json_state(job.out, start.number, "config") if start is not None else None
    spec, new_classes = _with_beginning(job, spec, stored)
    if stored is not None:
        checkpoint.refuse_other(stored, spec.identity, job.out)
    return _Run(spec=spec, reader=reader, start=start, new_classes=new_classes)


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
        lineage=_lineage(job, digest, ""),
    )
    return spec, reader


def _with_beginning(job: TrainJob, spec: RunSpec, stored: Mapping[str, Any] | None) -> tuple[RunSpec, tuple[str, ...]]:
    """The spec of a run that begins with a snapshot, and the classes new to that; a run that has begun keeps its digest
    in its checkpoints, since the snapshot may be gone.
    """
    url = job.train.init_from
    new_classes: tuple[str, ...] = ()
    if stored is not None and ("init_from" in stored) != bool(url):
        raise InputError(
            f"{job.out}: has begun {'without' if url else 'with'} --train.init-from, and goes on as it began; "
            f"{'leave it out' if url else 'give it again'}, or choose another out URL"
        )
    if not url:
        return spec, new_classes
    if stored is not None:
        digest = stored["init_from"]
    else:
        url = snapshot.find(url)
        source = snapshot.load(url)
        finetune.refuse_other(url, source.config, spec)
        digest, new_classes = source.digest, finetune.new_classes(source.config, spec)
    lineage = _lineage(job, spec.dataset_digest, digest)
    return dataclasses.replace(spec, init_from=url, lineage=lineage), new_classes


def _lineage(job: TrainJob, dataset_digest: str, init_from: str) -> dict[str, Any]:
    """By content, not by place: the same run in another folder has the same snapshot."""
    settings = {name: to_dict(getattr(job, name)) for name in _CONTENT}
    settings["train"]["init_from"] = init_from
    return {
        "dataset_digest": dataset_digest,
        "training_run": config.digest({"dataset": dataset_digest, **settings}),
        "code_version": importlib.metadata.version("ganymede"),
    } | ({"init_from": init_from} if init_from else {})


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
    timeout_sec = train.storage_timeout_sec
    return ChunkReader(index=index, plan=plan, decoder=decoder, in_tasks=in_tasks, storage_timeout_sec=timeout_sec)


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
    name="train",
    help="dataset -> checkpoints and a snapshot",
    config=TrainJob,
    presets=recipes.TRAIN,
    run=run,
    preview=preview,
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
