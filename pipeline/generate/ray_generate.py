"""Generation fanned out over Ray: an actor pool over the shards whose part is missing."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipeline import snapshot, storage
from pipeline.dataset import index, record
from pipeline.dataset.record import DatasetRecord, Part
from pipeline.generate import card, shard_writer
from pipeline.generate.plan import GeneratePlan
from pipeline.generate.shard_writer import SPLIT

_PART = re.compile(r"part-(\d{5,})\.parquet")


class _Worker:
    """An actor: G and D loaded once, then shard after shard."""

    def __init__(self, snapshot_url: str, out_url: str, plan: GeneratePlan, use_gpu: bool) -> None:
        torch.set_num_threads(1)  # in the plan: the sum order of a kernel depends on it
        self._device = torch.device("cuda" if use_gpu else "cpu")
        source = snapshot.load(snapshot_url)
        self._G, self._D = source.G_ema.to(self._device), source.D.to(self._device)
        self._out_url, self._plan = out_url, plan

    def __call__(self, batch: Mapping[str, NDArray[np.int64]]) -> dict[str, list[Any]]:
        done = [
            shard_writer.write_shard(self._out_url, self._plan, self._G, self._D, int(shard), self._device)
            for shard in batch["shard"]
        ]
        return {
            "shard": [one.shard for one in done],
            "rows": [one.rows for one in done],
            "sha256": [one.sha256 for one in done],
        }


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
    num_workers: int,
    use_gpu: bool,
    on_progress: Callable[[int], None],
) -> DatasetRecord:
    """Finish the run of a plan whose plan.json is settled: missing shards, the card, then dataset.json. `on_progress`
    hears the number of images of each shard done.
    """
    missing = missing_shards(out_url, plan)
    if missing:
        _make(snapshot_url, out_url, plan, missing, num_workers, use_gpu, on_progress)
    parts = tuple(_part(out_url, plan, shard) for shard in range(plan.num_shards))
    result = DatasetRecord(
        channels=plan.channels,
        resolution=plan.resolution,
        image_format=plan.config.image_format,
        classes=plan.classes,
        splits={SPLIT: parts},
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
    num_workers: int,
    use_gpu: bool,
    on_progress: Callable[[int], None],
) -> None:
    pool = ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(missing)))
    work = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    done = work.map_batches(
        _Worker,
        fn_constructor_args=(snapshot_url, out_url, plan, use_gpu),
        batch_size=1,
        compute=pool,
        num_cpus=1,
        num_gpus=1 if use_gpu else None,
    )
    for row in done.iter_rows():
        on_progress(int(row["rows"]))


def _part(out_url: str, plan: GeneratePlan, shard: int) -> Part:
    one = shard_writer.receipt(shard_writer.part_url(out_url, shard), shard, plan)
    return Part(name=index.part_name(shard), rows=one.rows, sha256=one.sha256)
