"""`ganymede prepare`: a source of images -> a dataset of shards."""

import dataclasses
import os
import sys
from pathlib import Path

from jobs import cli, fashion_mnist, presets
from jobs.terminal import Terminal
from pipeline import storage
from pipeline.config import to_yaml
from pipeline.dataset import record
from pipeline.prepare import plan as plans
from pipeline.prepare import sources
from pipeline.prepare.plan import PrepareConfig
from pipeline.prepare.sources import Source

FASHION_MNIST = "fashion-mnist"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """What `ganymede prepare` is told."""

    source: str
    """Images: a folder, a .zip, IDX, CIFAR, WebDataset or Parquet files (path or s3://), or fashion-mnist: fetched."""
    out: str
    """Where the dataset goes (path or s3://): empty, or what the same command began."""
    cache: str = ""
    """Local folder for what fashion-mnist downloads; empty: ganymede in the user's cache folder."""
    prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)
    """How images become shards."""


def run(job: PrepareJob, terminal: Terminal) -> int:
    """Make the dataset, or finish or recognise the one that is there."""
    return run_scanned(job, scan(job), terminal)


def scan(job: PrepareJob) -> Source:
    """What the source holds."""
    return sources.scan(
        storage.resolve(_source(job)),
        label_field=job.prepare.label_field,
        class_names=job.prepare.class_names,
        image_column=job.prepare.image_column,
    )


def run_scanned(job: PrepareJob, source: Source, terminal: Terminal) -> int:
    """`run` of a source that was scanned."""
    out_url = storage.resolve(job.out)
    if plans.is_done(out_url, plans.make(source, job.prepare)):
        terminal.line(f"prepare: already done, {_holds(out_url)} in {out_url}")
        return cli.EXIT_DONE
    storage.probe(out_url)
    _make(source, job, out_url, terminal)
    storage.put_if_absent(storage.join(out_url, "events", "prepare.yaml"), to_yaml(job).encode())
    return cli.EXIT_DONE


def _source(job: PrepareJob) -> str:
    """The source's URL; fashion-mnist is fetched unless a folder has that name."""
    if job.source != FASHION_MNIST or Path(job.source).is_dir():
        return job.source
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return fashion_mnist.find(None, job.cache or Path(home) / "ganymede")


def _make(source: Source, job: PrepareJob, out_url: str, terminal: Terminal) -> None:
    # Only now: Ray takes seconds to import, and a finished dataset needs none.
    from jobs.ray_session import start_ray
    from pipeline.prepare import ray_prepare

    start_ray(terminal)
    with terminal.progress(len(source.items), "img", "prepare") as bar:
        summary = ray_prepare.prepare(source, job.source, out_url, job.prepare, bar.update)
    if summary.quarantined:
        terminal.warn(f"{summary.quarantined} corrupt images were left out; see {storage.join(out_url, 'events')}")
    converted = ", ".join(f"{kind} {count}" for kind, count in summary.converted.items())
    notes = [f"converted: {converted}"] if converted else []
    notes += [f"{summary.ignored} files that are no images ignored"] if summary.ignored else []
    terminal.line("; ".join([f"prepare: {_holds(out_url)} in {out_url}", *notes]))


def _holds(out_url: str) -> str:
    """What a finished dataset holds, in words."""
    dataset, _ = record.read(out_url)
    splits = ", ".join(f"{split} {dataset.num_samples(split)}" for split in sorted(dataset.splits))
    classes = f", {len(dataset.classes)} classes" if dataset.classes else ", no labels"
    return f"{splits} images of {dataset.resolution}² × {dataset.channels}{classes}"


VERB = cli.Verb(name="prepare", help="images -> shards", config=PrepareJob, presets=presets.PREPARE, run=run)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
