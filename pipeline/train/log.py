"""Logs that grow: `stats` and `events` as immutable segments, sample grids, and TensorBoard files derived from them."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tensorboardX import SummaryWriter

from pipeline import images, storage
from pipeline.dataset import sheet


def put_stats(run_url: str, attempt: int, tick: int, stats: Mapping[str, float]) -> None:
    """One segment a tick. A tick that is run again after a resume finds its segment there, and leaves it."""
    line = json.dumps(stats, sort_keys=True) + "\n"
    storage.put_if_absent(storage.join(run_url, "stats", f"{attempt:04d}-{tick:06d}.jsonl"), line.encode())
    name = f"events.out.tfevents.{tick:010d}.{attempt:04d}"
    storage.put_if_absent(storage.join(run_url, "tensorboard", name), _tensorboard(stats, int(stats["cur_nimg"])))


def put_fid(run_url: str, attempt: int, cur_nimg: int, fid: float) -> None:
    """FID of the snapshot of a tick, as another segment of that tick: it comes when others are over.

    TensorBoard gets it as a run of its own, since it looks for new files of a run behind those it has read.
    """
    line = json.dumps({"cur_nimg": cur_nimg, "fid": fid}, sort_keys=True) + "\n"
    name = f"{attempt:04d}-fid-{cur_nimg:012d}.jsonl"
    storage.put_if_absent(storage.join(run_url, "stats", name), line.encode())
    name = f"events.out.tfevents.{attempt:04d}.{cur_nimg:012d}"
    storage.put_if_absent(storage.join(run_url, "tensorboard", "fid", name), _tensorboard({"fid": fid}, cur_nimg))


def read_stats(run_url: str) -> list[dict[str, float]]:
    """All ticks of a run by `cur_nimg`, without those that a rollback undid. Those of snapshots have `fid` too, when it
    is known."""
    stretches = _stretches(run_url)
    merged: dict[float, dict[str, float]] = {}
    for entry in storage.list_entries(storage.join(run_url, "stats")):
        attempt = int(entry.name.partition("-")[0])
        for line in storage.read(storage.join(run_url, "stats", entry.name)).splitlines():
            stats = json.loads(line)
            within = [of for began_nimg, of in stretches if began_nimg < stats["cur_nimg"]]
            if within[-1] == attempt:
                merged.setdefault(stats["cur_nimg"], {}).update(stats)
    return [merged[cur_nimg] for cur_nimg in sorted(merged)]


def _stretches(run_url: str) -> list[tuple[int, int]]:
    """(cur_nimg from which on, attempt) of the way the run took to where it is, in order of the clock.

    An attempt begins where the first process of it did, on the way of the attempt before; if its checkpoints are lost
    the run is back on that.
    """
    ways, current = {1: [(0, 1)]}, 1
    for event in read_events(run_url):
        if event["event"] == "resumed":
            attempt, began_nimg = event["attempt"], event["cur_nimg"]
            if attempt not in ways:
                before = [stretch for stretch in ways[current] if stretch[0] < began_nimg]
                ways[attempt] = [*before, (began_nimg, attempt)]
            current = attempt
    return ways[current]


def put_event(run_url: str, owner: int, kind: str, **fields: Any) -> None:
    """One event, as the next free segment of its owner."""
    line = json.dumps({"event": kind, "owner": owner, "time_sec": round(time.time(), 3), **fields}, sort_keys=True)
    sequence = sum(1 for _ in storage.list_entries(storage.join(run_url, "events")))
    while True:
        url = storage.join(run_url, "events", f"{owner:06d}-{sequence:06d}.jsonl")
        if storage.put_if_absent(url, (line + "\n").encode()) is not storage.Put.OTHER:
            return
        sequence += 1


def read_events(run_url: str) -> Iterator[dict[str, Any]]:
    """All events of a run, owner by owner."""
    for entry in storage.list_entries(storage.join(run_url, "events")):
        for line in storage.read(storage.join(run_url, "events", entry.name)).splitlines():
            yield json.loads(line)


def put_grid(run_url: str, attempt: int, cur_nimg: int, pixels: NDArray[np.uint8], columns: int) -> None:
    """`samples/<attempt>-<cur_nimg>.png` of uint8 [n, R, R, C], row by row, n a multiple of `columns`."""
    url = storage.join(run_url, "samples", f"{attempt:04d}-{cur_nimg:012d}.png")
    storage.put_if_absent(url, images.encode(sheet.grid(pixels, columns), "png", 100))


def put_positions(run_url: str, started_nimg: int, cur_nimg: int, world: tuple[int, int], taken: pa.Table) -> None:
    """What a rank of `world` (rank, size), which began at `started_nimg`, took since the last tick.

    `taken` has int64 columns: `position` in the global sequence, `sample` number in the index.
    """
    rank, size = world
    sink = pa.BufferOutputStream()
    pq.write_table(taken, sink)
    name = f"{cur_nimg:012d}-{started_nimg:012d}-{size:05d}-{rank:05d}.parquet"
    storage.put_if_absent(storage.join(run_url, "positions", name), sink.getvalue().to_pybytes())


def read_positions(run_url: str) -> pa.Table:
    """What the run took, by position: where it was taken again, what the latest start took, which may lie within a tick
    of the one before it. A tick that not all ranks have told of does not count.
    """
    ticks: dict[tuple[str, str, str], list[str]] = {}
    for entry in storage.list_entries(storage.join(run_url, "positions")):
        cur_nimg, started_nimg, size, _ = entry.name.split("-")
        ticks.setdefault((started_nimg, cur_nimg, size), []).append(entry.name)
    names = [name for (_, _, size), files in sorted(ticks.items()) if len(files) == int(size) for name in files]
    files = [storage.read(storage.join(run_url, "positions", name)) for name in names]
    taken = pa.concat_tables([pq.read_table(pa.BufferReader(data)) for data in files])
    # In the order of starts: the first of a position from behind is the latest.
    _, first = np.unique(taken["position"].to_numpy()[::-1], return_index=True)
    return taken.take(pa.array(len(taken) - 1 - first))


def _tensorboard(stats: Mapping[str, float], cur_nimg: int) -> bytes:
    """An event file with one scalar a statistic, written to a folder of its own and read back."""
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for name, value in stats.items():
                writer.add_scalar(name, value, cur_nimg)
        return next(Path(folder).iterdir()).read_bytes()
