"""`ganymede generate`: a snapshot → a dataset of synthetic images."""

import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

import ray
import torch

from jobs import cli, presets
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import snapshot, storage
from pipeline.config import ConfigError, to_yaml
from pipeline.dataset import record
from pipeline.errors import InputError
from pipeline.generate import shard_writer
from pipeline.generate.plan import GenerateConfig, GeneratePlan
from pipeline.generate.ray_generate import generate, missing_shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A generation run."""

    snapshot: str
    """URL of a snapshot, or of a training run: then its last one."""
    out: str
    """URL of the dataset to write. The same command again finishes what is missing."""
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    """What to make."""
    only_keys: tuple[str, ...] = ()
    """Make these samples again and write nothing but them, as files at `out`: the bytes that their shard holds."""
    num_workers: int = 0
    """Processes that make shards; 0: one for each CPU, or each GPU."""
    use_gpu: bool = False
    """Run G on GPUs, one a worker."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"num_workers must be at least 0, not {self.num_workers}")


def run(job: GenerateJob, terminal: Terminal) -> int:
    """Generate what is missing, or say that nothing is."""
    out = storage.resolve(job.out)
    snapshot_url = snapshot.find(storage.resolve(job.snapshot))
    source = snapshot.load(snapshot_url)
    plan = _plan(job, source)
    storage.probe(out)
    if job.only_keys:
        return _make_again(job, plan, source, out, terminal)
    lineage = record.settle_plan(out, plan.to_dict(), _lineage(source))
    # In the event log, not beside the plan: places and worker counts vary from run to run, what is stored does not.
    storage.put_if_absent(storage.join(out, "events", "generate.yaml"), to_yaml(job).encode())
    if storage.stat(storage.join(out, record.NAME)) is not None:
        terminal.line(f"generate: already done, {plan.config.num_images:,} images: {out}")
        return cli.EXIT_DONE
    start_ray(terminal)
    todo = sum(len(plan.seeds(shard)) for shard in missing_shards(out, plan))
    made = plan.config.num_images - todo
    if made:
        terminal.line(f"generate: goes on, {made:,} of {plan.config.num_images:,} images are there")
    workers = _num_workers(job, ray.cluster_resources())
    with terminal.progress(plan.config.num_images, "img", "generate", initial=made) as bar:
        generate(snapshot_url, out, plan, lineage, num_workers=workers, use_gpu=job.use_gpu, on_progress=bar.update)
    terminal.line(f"generate: {plan.config.num_images:,} images in {plan.num_shards} shards: {out}")
    return cli.EXIT_DONE


def _make_again(job: GenerateJob, plan: GeneratePlan, source: snapshot.Snapshot, out: str, terminal: Terminal) -> int:
    torch.set_num_threads(1)  # as in a worker
    device = torch.device("cuda" if job.use_gpu else "cpu")
    for key, files in shard_writer.make_again(plan, source.G_ema.to(device), job.only_keys, device):
        for extension, data in files.items():
            url = storage.join(out, f"{key}.{extension}")
            if storage.put_if_absent(url, data) is storage.Put.OTHER:
                raise record.DatasetError(f"{url}: is there with other bytes; choose another output URL")
            terminal.line(f"generate: {url}")
    return cli.EXIT_DONE


def _num_workers(job: GenerateJob, cluster: Mapping[str, float]) -> int:
    kind = "GPU" if job.use_gpu else "CPU"
    have = int(cluster.get(kind, 0))
    if have < 1:
        remedy = "set --use-gpu false" if job.use_gpu else "add one"
        raise InputError(f"each worker needs a {kind} and the cluster has none; {remedy}")
    return min(job.num_workers or have, have)


def _plan(job: GenerateJob, source: snapshot.Snapshot) -> GeneratePlan:
    return GeneratePlan(
        config=job.generate,
        snapshot_digest=source.digest,
        resolution=source.config.shape.resolution,
        channels=source.config.shape.channels,
        z_dim=source.config.network.z_dim,
        classes=source.config.classes,
        dataset_counts=source.config.class_counts,
    )


def _lineage(source: snapshot.Snapshot) -> dict[str, Any]:
    return {
        "snapshot_digest": source.digest,
        "training": dict(source.config.lineage),
        "cur_nimg": source.config.cur_nimg,
        "code_version": importlib.metadata.version("ganymede"),
    }


VERB = cli.Verb(
    name="generate",
    help="snapshot -> shards of synthetic images",
    config=GenerateJob,
    presets=presets.GENERATE,
    run=run,
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
