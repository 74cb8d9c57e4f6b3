"""A Ray Train run fed by the pipeline against the same run fed from memory: `python -m tests.benchmarks.train.fed`.

The preset that sees most images a second asks most of the feed. Both runs are whole ones, with their ticks, grids and
checkpoints; the rate is the median of the ticks after the first two. Sides take turns.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import jobs.train
from jobs import recipes
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import config
from pipeline.stream.batches import Batch, rank_batches
from pipeline.stream.chunk import ChunkReader
from pipeline.train import log, loop
from pipeline.train.loop import Outlets
from pipeline.train.ranks import World
from pipeline.train.ray_train import fit
from pipeline.train.spec import RunSpec
from pipeline.train.workers import Workers, fit_workers
from tests.benchmarks.ingest import data
from tests.benchmarks.ingest.cases import Case

PRESET = "dcgan-small"
_BATCHES_IN_MEMORY = 64


def main(arguments: list[str]) -> None:
    """Print the rates, and JSON as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rounds, kimg, samples = (1, 2.0, 2_000) if options.quick else (3, 60.0, 50_000)
    tick_kimg = kimg / 10
    case = Case(
        name="png32",
        resolution=32,
        image_format="png",
        num_samples=samples,
        shard_size=1000,
        batch_size=64,
        highest_rate=0,  # of the other benchmark
    )
    dataset = data.make(case, options.cache)
    start_ray(Terminal("bench"))
    rates: dict[str, list[float]] = {"pipeline": [], "memory": []}
    for number, side in itertools.product(range(1, rounds + 1), rates):
        with tempfile.TemporaryDirectory() as out:
            spec, reader, workers = _open(str(dataset), out, kimg, tick_kimg)
            (fit if side == "pipeline" else _fit_from_memory)(spec, reader, workers, lambda *_: None)
            ticks = [stats["img_per_sec"] for stats in log.read_stats(out)][2:]
        rates[side].append(statistics.median(ticks))
        print(f"round {number}/{rounds}: {PRESET} fed from {side}: {rates[side][-1]:,.0f} img/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["pipeline"], rates["memory"], strict=True))
    print(f"fed by the pipeline / fed from memory: {ratio:.3f}")
    print(json.dumps({"bench": "fed", "ratios": {"pipeline_vs_memory": round(ratio, 3)}}), flush=True)


def _open(dataset: str, out: str, kimg: float, tick_kimg: float) -> tuple[RunSpec, ChunkReader, Workers]:
    length = {"train.total_kimg": kimg, "train.tick_kimg": tick_kimg}
    settings = {"dataset": dataset, "out": out} | recipes.TRAIN[PRESET] | length
    job = config.from_dict(jobs.train.TrainJob, config.nest(jobs.train.TrainJob, settings))
    spec, reader = jobs.train._open(job, dataset)
    workers = fit_workers(job.workers, spec.train.num_lanes, ray.cluster_resources())
    return dataclasses.replace(spec, owner=1), reader, workers


def _fit_from_memory(spec: RunSpec, reader: ChunkReader, workers: Workers, _: Any) -> None:
    """The same run without the feed: its rank is given the first batches of the plan again and again."""
    with tempfile.TemporaryDirectory() as scratch:
        TorchTrainer(
            _rank_main,
            train_loop_config={"spec": spec, "reader": reader, "workers": workers},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": workers.cpus}),
            run_config=RunConfig(storage_path=scratch),
        ).fit()


def _rank_main(settings: Mapping[str, Any]) -> None:
    workers: Workers = settings["workers"]
    torch.set_num_threads(min(workers.threads(1), len(os.sched_getaffinity(0))))
    world = World(rank=0, size=1, device=ray.train.torch.get_device(), wrap=lambda network: network)
    outlets = Outlets(progress=lambda *_: None, report=lambda stats: ray.train.report(dict(stats)))
    loop.run(settings["spec"], world, None, _from_memory(settings["reader"]), outlets)


def _from_memory(reader: ChunkReader) -> Iterator[Batch]:
    blocks = (reader(pa.table({"data": [n]})) for n in itertools.count())
    batches = rank_batches(blocks, reader, 0, 0, 1, 1)
    held = list(itertools.islice(batches, _BATCHES_IN_MEMORY))
    batches.close()
    for step in itertools.count():
        yield dataclasses.replace(held[step % len(held)], step=step)


if __name__ == "__main__":
    main(sys.argv[1:])
