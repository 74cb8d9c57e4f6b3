"""`ganymede train`: a dataset → checkpoints, logs and a snapshot."""

import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

import ray

from jobs import cli, presets
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import config, snapshot, storage
from pipeline.config import to_dict, to_yaml
from pipeline.dataset import record
from pipeline.dataset.index import IndexReader
from pipeline.gan.networks.build import ImageShape, NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.feed import ChunkReader, default_steps_per_group
from pipeline.stream.order import OrderPlan
from pipeline.train import checkpoint, log
from pipeline.train.loop import RunSpec, TrainConfig
from pipeline.train.ownership import Ownership
from pipeline.train.ray_train import WorkersConfig, fit, fit_workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training run."""

    dataset: str
    """URL of a dataset that `prepare` or `generate` wrote."""
    out: str
    """URL of the run: checkpoints, snapshots, logs. The same command again goes on from its last checkpoint."""
    split: str = "train"
    """Split of the dataset to learn from."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Architecture of G and D."""
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    """Loss, optimisers, precision, averaging."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length, order, intervals."""
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)
    """Processes and their resources."""


def run(job: TrainJob, terminal: Terminal) -> int:
    """Train, or say that it is done already."""
    job = dataclasses.replace(job, dataset=storage.resolve(job.dataset), out=storage.resolve(job.out))
    spec, reader = _open(job)
    _refuse_dataset(job.out)
    start = checkpoint.latest_valid(job.out, terminal.warn)
    if start is not None:
        checkpoint.refuse_other(checkpoint.json_state(job.out, start.number, "config"), spec.identity, job.out)
    finished = start is not None and start.cur_nimg >= spec.train.total_nimg
    if start is not None and finished and snapshot.exists(job.out, start.cur_nimg):
        terminal.line(f"train: already done, {start.cur_nimg:,} images seen: {job.out}")
        return cli.EXIT_DONE
    storage.probe(job.out)
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


class _Follow:
    """Turns the clock, which may go back after a worker died, into steps of a progress bar."""

    def __init__(self, bar: Any, at: int) -> None:
        self._bar, self._at = bar, at

    def __call__(self, cur_nimg: int, shown: Mapping[str, Any]) -> None:
        self._bar.update(cur_nimg - self._at, **shown)
        self._at = cur_nimg


def _open(job: TrainJob) -> tuple[RunSpec, ChunkReader]:
    """What the dataset and the settings make of a run; raises for a dataset that does not fit."""
    dataset, digest = record.read(job.dataset)
    shape = ImageShape(resolution=dataset.resolution, channels=dataset.channels, num_classes=len(dataset.classes))
    train = job.train
    sample_bytes = shape.resolution**2 * shape.channels
    num_samples = dataset.num_samples(job.split)
    if not num_samples:
        raise record.DatasetError(f"{job.dataset}: split {job.split!r} is empty; prepare it again")
    plan = OrderPlan(
        num_samples=num_samples,
        seed=train.seed,
        batch_size=train.batch_size,
        num_lanes=train.num_lanes,
        steps_per_group=default_steps_per_group(num_samples, train.batch_size, train.num_lanes, sample_bytes),
    )
    index = IndexReader(storage.join(job.dataset, job.split), dataset.splits[job.split])
    reader = ChunkReader(index=index, plan=plan, resolution=shape.resolution, channels=shape.channels)
    # By content, not by place: the same run in another folder has the same snapshot.
    training_run = {"dataset": digest, **{name: to_dict(getattr(job, name)) for name in ("network", "step", "train")}}
    lineage = {
        "dataset_digest": digest,
        "training_run": config.digest(training_run),
        "code_version": importlib.metadata.version("ganymede"),
    }
    spec = RunSpec(
        run_url=job.out,
        owner=0,
        plan=plan,
        dataset_digest=digest,
        shape=shape,
        classes=dataset.classes,
        network=job.network,
        step=job.step,
        train=train,
        lineage=lineage,
    )
    return spec, reader


def _refuse_dataset(out: str) -> None:
    for name in (record.NAME, record.PLAN_NAME):
        if storage.stat(storage.join(out, name)) is not None:
            raise record.DatasetError(f"{out}: holds a dataset ({name}); choose another output URL")


def _save_config(job: TrainJob, owner: int) -> None:
    storage.put_if_absent(storage.join(job.out, "config", f"{owner:06d}.yaml"), to_yaml(job).encode())


VERB = cli.Verb(
    name="train", help="dataset -> checkpoints and a snapshot", config=TrainJob, presets=presets.TRAIN, run=run
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
