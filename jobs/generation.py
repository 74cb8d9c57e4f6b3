"""What `ganymede generate` does. Apart from its command line, which is to be there before torch is."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import torch

from jobs import cli
from jobs.generate import GenerateJob
from jobs.ray_session import start_ray
from jobs.terminal import Terminal, duration
from pipeline import snapshot, storage
from pipeline.config import to_yaml
from pipeline.dataset import record
from pipeline.errors import InputError, RetryableError
from pipeline.gan import precision
from pipeline.generate import estimate, shard_writer
from pipeline.generate.factory import open_factory, reject_below
from pipeline.generate.plan import GeneratePlan, with_micro_batch
from pipeline.generate.ray_generate import Workers, generate, missing_shards

_MAX_ENCODERS = 16
_PROBE_SEC = 3.0


def run(job: GenerateJob, terminal: Terminal) -> int:
    """Generate what is missing, or say that nothing is."""
    out = storage.resolve(job.out)
    snapshot_url = snapshot.find(storage.resolve(job.snapshot))
    source = snapshot.load(snapshot_url)
    plan = make_plan(job, source)
    storage.probe(out)
    if job.generate.reject_share:
        plan = _with_rejection(job, plan, source, out, terminal)
    if job.only_keys:
        return _make_again(job, plan, source, out, terminal)
    lineage = record.settle_plan(out, plan.to_dict(), _lineage(source))
    # In the event log, not beside the plan: places and worker counts vary from run to run, what is stored does not.
    storage.put_if_absent(storage.join(out, "events", "generate.yaml"), to_yaml(job).encode())
    if storage.stat(storage.join(out, record.NAME)) is not None:
        terminal.line(f"generate: already done, {plan.config.num_images:,} images: {out}")
        return cli.EXIT_DONE
    _warn_of_emulation(job, terminal)
    start_ray(terminal)  # it was started beside the imports, unless a dataset.json was there and has gone
    todo = sum(len(plan.seeds(shard)) for shard in missing_shards(out, plan))
    made = plan.config.num_images - todo
    if made:
        terminal.line(f"generate: goes on, {made:,} of {plan.config.num_images:,} images are there")
    workers = fit_workers(job, ray.cluster_resources())
    with terminal.progress(plan.config.num_images, "img", "generate", initial=made) as bar:
        generate(snapshot_url, out, plan, lineage, workers=workers, on_progress=bar.update)
    terminal.line(f"generate: {plan.config.num_images:,} images in {plan.num_shards} shards: {out}")
    return cli.EXIT_DONE


def preview(job: GenerateJob) -> Iterator[str]:
    """What the run will make and take, from a few seconds of work here; nothing is stored and no Ray is started."""
    try:
        source = snapshot.load(snapshot.find(storage.resolve(job.snapshot)))
        plan, device = make_plan(job, source), _device(job)
    except (InputError, RetryableError) as error:
        yield f"no estimate: {error}"
        return
    found = estimate.probe(open_factory(plan, source.G_ema, source.D, device, 1), _PROBE_SEC)
    count, kind = plan.config.num_images, "GPU" if job.use_gpu else "core"
    workers = job.num_workers or (torch.cuda.device_count() if job.use_gpu else os.cpu_count()) or 1
    yield f"{count:,} images in {plan.num_shards:,} shards, about {count * found.bytes_per_image / 1e9:,.3g} GB"
    yield f"{found.img_per_sec:,.0f} img/s on one {kind} of this machine"
    yield f"about {duration(found.hours(count, workers))} with {workers} workers, each with such a {kind}"


def _with_rejection(
    job: GenerateJob, plan: GeneratePlan, source: snapshot.Snapshot, out: str, terminal: Terminal
) -> GeneratePlan:
    """The plan with the score that images must reach: as the first driver of it found, else by making the pilot."""
    if storage.stat(storage.join(out, record.PLAN_NAME)) is not None:
        found = record.stored_plan(out).get("reject_below")
    else:
        terminal.line(f"generate: makes a pilot of {plan.config.pilot_images:,} images, to see what D thinks of them")
        device = torch.device("cuda" if job.use_gpu and torch.cuda.is_available() else "cpu")
        with terminal.progress(plan.config.pilot_images, "img", "pilot") as bar:
            found = reject_below(open_factory(plan, source.G_ema, source.D, device, 1), bar.update)
    return dataclasses.replace(plan, reject_below=found)


def _warn_of_emulation(job: GenerateJob, terminal: Terminal) -> None:
    """Of this machine's CPU. Unlike training it computes in what was asked for: precision is part of the plan."""
    wanted = job.generate.precision
    if not job.use_gpu and precision.supported(wanted, torch.device("cpu")) != wanted:
        terminal.warn(f"this CPU only emulates {wanted}, many times slower than --generate.precision fp32")


def _device(job: GenerateJob) -> torch.device:
    """Where this process, and no worker, runs G. Raises InputError for a GPU that it has not got."""
    if job.use_gpu and not torch.cuda.is_available():
        raise InputError("use_gpu is set and this machine has no GPU; ask on one that has, or set --use-gpu false")
    return torch.device("cuda" if job.use_gpu else "cpu")


def _make_again(job: GenerateJob, plan: GeneratePlan, source: snapshot.Snapshot, out: str, terminal: Terminal) -> int:
    factory = open_factory(plan, source.G_ema, source.D, _device(job), 1)
    for key, files in shard_writer.make_again(factory, job.only_keys):
        for extension, data in files.items():
            url = storage.join(out, f"{key}.{extension}")
            if storage.put_if_absent(url, data) is storage.Put.OTHER:
                raise record.DatasetError(f"{url}: is there with other bytes; choose another output URL")
            terminal.line(f"generate: {url}")
    return cli.EXIT_DONE


def fit_workers(job: GenerateJob, cluster: Mapping[str, float]) -> Workers:
    """The workers that a cluster has room for. Raises InputError where it has none."""
    cpus, gpus = (int(cluster.get(kind, 0)) for kind in ("CPU", "GPU"))
    room = cpus // max(1, job.num_encoders)
    have = min(gpus, room) if job.use_gpu else room
    if have < 1:
        needs = f"{'a GPU and ' if job.use_gpu else ''}{max(1, job.num_encoders)} CPUs"
        remedy = "set --use-gpu false or fewer --num-encoders" if job.use_gpu else "set --num-encoders 1"
        raise InputError(f"each worker needs {needs}, and the cluster has {gpus} GPUs and {cpus} CPUs; {remedy}")
    count = min(job.num_workers or have, have)
    share = min(_MAX_ENCODERS, max(1, cpus // count)) if job.use_gpu else 1
    return Workers(count=count, use_gpu=job.use_gpu, num_encoders=job.num_encoders or share)


def make_plan(job: GenerateJob, source: snapshot.Snapshot) -> GeneratePlan:
    """What a job makes of a snapshot; with rejection, before the score that images must reach is known."""
    return GeneratePlan(
        config=with_micro_batch(job.generate, source.config.shape.resolution, job.use_gpu),
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
