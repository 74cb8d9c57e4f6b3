"""The `generate` verb's work on a Ray of its own, timed by its receipts: `python -m tests.benchmarks.generate.ours`."""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from jobs.generate import GenerateJob
from jobs.generation import make_plan
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import snapshot
from pipeline.dataset import record
from pipeline.generate.plan import GenerateConfig
from pipeline.generate.ray_generate import Workers, generate


def main(arguments: list[str]) -> None:
    """Print {"img_per_sec": …, "tenths": [img/s of the first tenth, …], "growth_mb": …} as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--snapshot", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--num-images", type=int, required=True)
    parser.add_argument("--shard-size", type=int, required=True)
    parser.add_argument("--image-format", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--pin", action="store_true", help="each worker, with all its threads, to a core of its own")
    options = parser.parse_args(arguments)
    config = GenerateConfig(
        num_images=options.num_images,
        shard_size=options.shard_size,
        image_format=options.image_format,
        precision=options.precision,
        micro_batch=options.micro_batch,
    )
    start_ray(Terminal("bench"))
    with tempfile.TemporaryDirectory() as out:
        job = GenerateJob(snapshot=options.snapshot, out=out, generate=config)
        plan = make_plan(job, snapshot.load(options.snapshot))
        record.settle_plan(out, plan.to_dict(), {})
        done: list[tuple[float, int]] = []
        grown: list[float] = []

        def on_progress(count: int) -> None:
            if options.pin and len(done) < 2 * options.workers:
                _pin_workers()
            done.append((time.perf_counter(), count))
            grown.append(_resident_mb())

        generate(options.snapshot, out, plan, {}, workers=Workers(count=options.workers), on_progress=on_progress)
    steady = done[min(2 * options.workers, len(done) // 2) - 1 :]  # once each worker has ended its first shards
    cuts = [(len(steady) - 1) * tenth // 10 for tenth in range(11)]
    tenths = [_rate(steady[start : stop + 1]) for start, stop in itertools.pairwise(cuts) if stop > start]
    growth_mb = grown[-1] - grown[len(grown) // 10]
    print(json.dumps({"img_per_sec": _rate(steady), "tenths": tenths, "growth_mb": growth_mb}))


def _pin_workers() -> None:
    """Threads that start later have the core of the thread that started them."""
    titles = sorted(Path("/proc").glob("[0-9]*/cmdline"))
    workers = [title.parent for title in titles if title.read_bytes().startswith(b"ray::MapWorker(MapBatches(")]
    for core, worker in enumerate(workers):
        for thread in (worker / "task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {core})


def _rate(done: list[tuple[float, int]]) -> float:
    """Images a second from the first of these receipts to the last."""
    return sum(count for _, count in done[1:]) / (done[-1][0] - done[0][0])


def _resident_mb() -> float:
    """Of this process, the driver."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    main(sys.argv[1:])
