"""Ganymede: the feed through a real local Ray, to an actor that stands for the training worker and drops the batches.

`python -m tests.benchmarks.ingest.ours MODE SPEC`; a contender's name is ganymede+DECODE, DECODE as in FeedConfig.
"""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import ray

import jobs.train
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from jobs.train import TrainJob
from pipeline.stream.batches import rank_batches
from pipeline.stream.chunk import ChunkReader, FeedConfig
from pipeline.stream.feed import plan_dataset, rank_blocks
from pipeline.train.ray_train import Shares
from pipeline.train.spec import TrainConfig
from pipeline.train.workers import WorkersConfig, fit_workers
from tests.benchmarks.ingest.measure import Batch, Spec, print_result, steady_rate

_LONG_PLAN_CHUNKS = 488_000  # r3gan-cifar10's whole run
_SETTLE_SEC = 3.0
_MB = 1e6


def main(mode: str, spec: Spec) -> None:
    """Print what a mode measures."""
    modes = {"steady": _steady, "first_batch": _first_batch, "first_batch_long_plan": _long_plan, "growth": _growth}
    print_result(modes[mode](spec))


def _steady(spec: Spec) -> dict[str, Any]:
    """Images a second."""
    reader = _open(spec)
    _start_ray()
    worker = _start_worker(reader)
    return {
        **ray.get(worker.steady.remote(spec)),
        "is_default": _decode(spec) == FeedConfig().decode,
    }


def _first_batch(spec: Spec) -> dict[str, Any]:
    """Seconds from `ray.init` to the first batch of a run."""
    return _time_first_batch(spec, 0)


def _long_plan(spec: Spec) -> dict[str, Any]:
    """The same of a run resumed after 488,000 chunks; a plan has no length to wait for."""
    return _time_first_batch(spec, _LONG_PLAN_CHUNKS)


def _time_first_batch(spec: Spec, done_chunks: int) -> dict[str, Any]:
    asked = time.perf_counter()
    _start_ray()
    started = time.perf_counter()
    reader = _open(spec)
    worker = _start_worker(reader, done_chunks // reader.plan.num_lanes * reader.plan.steps_per_group)
    ray.get(worker.take.remote(1))
    return {"first_batch_sec": time.perf_counter() - started, "ray_init_sec": started - asked}


def _growth(spec: Spec) -> dict[str, Any]:
    """Growth in MB of the processes that plan and of the object store, from the second pass to the last.

    A pass is over the first `num_samples` samples, and `num_images` says how many passes there are. The executor of
    Ray Data runs in the splitter's actor.
    """
    _start_ray()
    reader = _open(spec)
    steps_per_pass = -(-spec.num_samples // spec.batch_size)
    passes = spec.num_images // spec.num_samples
    worker = _start_worker(reader)
    ray.get(worker.take.remote(2 * steps_per_pass))
    before = _memory_mb()
    ray.get(worker.take.remote((passes - 2) * steps_per_pass))
    after = _memory_mb()
    grown = {name: after[name] - before[name] for name in before}
    counted = ("driver", "splitter", "object_store")
    return {"growth_mb": sum(grown[name] for name in counted), "passes": passes, "before": before, "after": after}


def _start_ray() -> None:
    start_ray(Terminal("bench-ingest"))


def _open(spec: Spec) -> ChunkReader:
    """The reader that a training run of this dataset with this batch size has, of its first samples if so told."""
    job = TrainJob(
        dataset=spec.url,
        out="",
        train=TrainConfig(batch_size=spec.batch_size),
        feed=FeedConfig(decode=_decode(spec)),
    )
    _, reader = jobs.train._open(job, spec.url)
    return dataclasses.replace(reader, plan=dataclasses.replace(reader.plan, num_samples=spec.num_samples))


def _decode(spec: Spec) -> Literal["trainer", "tasks"]:
    return cast(Literal["trainer", "tasks"], spec.contender.partition("+")[2])


def _start_worker(reader: ChunkReader, first_step: int = 0) -> Any:
    """The actor, with its share of the cluster and of the data, as Ray Train deals them to one worker."""
    workers = fit_workers(WorkersConfig(), reader.plan.num_lanes, ray.cluster_resources())
    dataset = plan_dataset(reader, reader.plan.first_chunk(first_step), _LONG_PLAN_CHUNKS)
    (shares,) = Shares().configure({"train": dataset}, 1, None, None)
    actor = ray.remote(num_cpus=workers.cpus)(_Worker)
    return actor.remote(shares["train"], reader, first_step, workers.decode_threads(1))


class _Worker:
    """Takes batches and drops them."""

    def __init__(self, share: Any, reader: ChunkReader, first_step: int, decode_threads: int) -> None:
        self._batches = rank_batches(rank_blocks(share), reader, first_step, 0, 1, decode_threads)

    def take(self, count: int) -> None:
        """Wait for so many batches."""
        for _ in itertools.islice(self._batches, count):
            pass

    def steady(self, spec: Spec) -> dict[str, Any]:
        """Images a second."""
        return steady_rate(self._pairs(), spec)

    def _pairs(self) -> Iterator[Batch]:
        for batch in self._batches:
            yield batch.image, batch.label


def _memory_mb() -> dict[str, float]:
    """MB held by the driver, by the splitter, and in the object store, when all has come to rest."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    time.sleep(_SETTLE_SEC)
    # By address: another Ray on this machine would make it ask which one is meant.
    address = ray.get_runtime_context().gcs_address
    store = get_memory_info_reply(get_state_from_address(address)).store_stats
    (splitter,) = _below(os.getpid(), b"ray::SplitCoordinator")
    return {
        "driver": _private_mb(os.getpid()),
        "splitter": _private_mb(splitter),
        "object_store": store.object_store_bytes_used / _MB,
    }


def _private_mb(pid: int) -> float:
    """Memory of a process that is not the object store's, which it maps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kilobytes) * 1024 / _MB


def _below(ancestor: int, name: bytes) -> list[int]:
    """Processes started by `ancestor` or its descendants whose command line begins with a name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(name) and ancestor in _ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


if __name__ == "__main__":
    main(sys.argv[1], Spec.parse(sys.argv[2]))
