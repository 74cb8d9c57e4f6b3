"""Generation fanned out over Ray: an actor pool over the shards whose part is missing."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipeline import snapshot, storage
from pipeline.dataset import index, record
from pipeline.dataset.record import DatasetRecord, Part
from pipeline.generate import card, shard_writer
from pipeline.generate.factory import keep_freed_memory, open_factory
from pipeline.generate.plan import GeneratePlan
from pipeline.generate.ray_shards import numbers_dataset
from pipeline.generate.shard_writer import SPLIT, Receipt
from pipeline.ray_metrics import RunMetrics

_REQUESTS = 32
"""To the store at once."""
_PART = re.compile(r"part-(\d{5,})\.parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that make shards."""

    count: int
    """How many at most."""
    use_gpu: bool = False
    """Each has a GPU."""
    num_encoders: int = 1
    """Threads of each that encode, and the CPUs it takes: a CPU's forward passes leave little to them."""


class _Worker:
    """An actor: G and D loaded once, then shard after shard, two at a time: while one is stored the next is made."""

    def __init__(self, snapshot_url: str, out_url: str, plan: GeneratePlan, workers: Workers) -> None:
        keep_freed_memory()
        source = snapshot.load(snapshot_url)
        device = torch.device("cuda" if workers.use_gpu else "cpu")
        self._factory = open_factory(plan, source.G_ema, source.D, device, workers.num_encoders)
        self._out_url, self._metrics = out_url, RunMetrics(out_url)

    def __call__(self, batch: Mapping[str, NDArray[np.int64]]) -> dict[str, list[int]]:
        return {"rows": [self._write(shard).rows for shard in batch["shard"].tolist()]}

    def _write(self, shard: int) -> Receipt:
        done = shard_writer.write_shard(self._out_url, self._factory, shard)
        self._metrics.add("ganymede_shards", 1, outcome=done.outcome)
        self._metrics.add("ganymede_generated_nimg", done.rows)
        self._metrics.put_retries()
        return done


def missing_shards(out_url: str, plan: GeneratePlan) -> list[int]:
    """The shards without a part: what is left to do."""
    entries = storage.list_entries(storage.join(out_url, SPLIT, "index"))
    done = {int(match[1]) for entry in entries if (match := _PART.fullmatch(entry.name))}
    return [shard for shard in range(plan.num_shards) if shard not in done]


def generate(
    snapshot_url: str,
    out_url: str,
    plan: GeneratePlan,
    lineage: Mapping[str, Any],
    *,
    workers: Workers,
    on_progress: Callable[[int], None],
) -> DatasetRecord:
    """Finish the run of a plan whose plan.json is settled: missing shards, the card, then dataset.json. `on_progress`
    hears the number of images of each shard done.
    """
    missing = missing_shards(out_url, plan)
    if missing:
        _make(snapshot_url, out_url, plan, missing, workers, on_progress)
    result = DatasetRecord(
        channels=plan.channels,
        resolution=plan.resolution,
        image_format=plan.config.image_format,
        classes=plan.classes,
        splits={SPLIT: stored_parts(out_url, plan)},
        class_counts={SPLIT: plan.class_counts} if plan.classes else {},
        lineage=lineage,
    )
    card.write(out_url, plan, result)
    record.commit(out_url, result)
    return result


def _make(
    snapshot_url: str,
    out_url: str,
    plan: GeneratePlan,
    missing: list[int],
    workers: Workers,
    on_progress: Callable[[int], None],
) -> None:
    count = min(workers.count, len(missing))
    pool = ActorPoolStrategy(
        min_size=1,
        initial_size=count,  # the pool itself would add the second one after 5 s
        max_size=count,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )
    done = numbers_dataset(missing).map_batches(
        _Worker,
        fn_constructor_args=(snapshot_url, out_url, plan, workers),
        batch_size=1,
        compute=pool,
        num_cpus=workers.num_encoders,
        num_gpus=1 if workers.use_gpu else None,
    )
    metrics = RunMetrics(out_url)
    metrics.set("ganymede_shards_left", len(missing))
    for left, num_images in zip(reversed(range(len(missing))), _results(done), strict=True):
        metrics.set("ganymede_shards_left", left)
        on_progress(num_images)


def _results(done: ray.data.Dataset) -> Iterator[int]:
    """Images of each shard as it is done. Not by `iter_rows`, whose threads and timings take more of the driver's time
    than all scheduling.
    """
    for bundle in done.iter_internal_ref_bundles():
        for block in ray.get([entry.ref for entry in bundle.blocks]):
            yield from block["rows"].to_pylist()


def stored_parts(out_url: str, plan: GeneratePlan) -> tuple[Part, ...]:
    """The parts of all shards, as dataset.json names them; all must be there."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return tuple(pool.map(functools.partial(_part, out_url, plan), range(plan.num_shards)))


def _part(out_url: str, plan: GeneratePlan, shard: int) -> Part:
    one = shard_writer.receipt(shard_writer.part_url(out_url, shard), shard, plan)
    return Part(name=index.part_name(shard), rows=one.rows, sha256=one.sha256)
