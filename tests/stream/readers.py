"""Chunk readers over small datasets."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.dataset import record
from pipeline.dataset.index import IndexReader
from pipeline.stream.batches import Batch, rank_batches
from pipeline.stream.chunk import ChunkReader, Decoder
from pipeline.stream.order import OrderPlan
from tests.small import make_dataset, shape_image


def reader_of(
    url: str, num_samples: int = 100, *, in_tasks: bool = True, flip: bool = False, crop_px: int = 0, **plan: int
) -> ChunkReader:
    """A reader of a new dataset of 16² grey images at `url`; chunks of 6 unless told otherwise."""
    made = make_dataset(url, num_samples=num_samples, shard_size=30)
    settings = {"seed": 3, "batch_size": 8, "num_lanes": 4, "steps_per_group": 3} | plan
    return ChunkReader(
        index=IndexReader(storage.join(url, "train"), made.splits["train"]),
        plan=OrderPlan(num_samples=num_samples, **settings),
        decoder=Decoder(resolution=16, channels=1, seed=3, flip=flip, crop_px=crop_px),
        in_tasks=in_tasks,
    )


def block(reader: ChunkReader, n: int) -> pa.Table:
    """What the read task of chunk n returns."""
    return reader(pa.table({"data": [n]}))


def ranks(reader: ChunkReader, first_step: int, world_size: int, steps: int) -> list[list[Batch]]:
    """The batches of all ranks, dealt round-robin as the splitter does."""
    plan, out = reader.plan, []
    first_chunk = plan.first_chunk(first_step)
    for rank in range(world_size):
        blocks: Iterator[pa.Table] = (block(reader, n) for n in range(first_chunk + rank, 10**6, world_size))
        batches = rank_batches(blocks, reader, first_step, rank, world_size, threads=2)
        out.append([next(batches) for _ in range(steps)])
        batches.close()  # type: ignore[attr-defined]
    return out


def planned(samples: np.ndarray) -> np.ndarray:
    """The pixels of samples: uint8 [n, 16, 16, 1]."""
    return np.stack([shape_image(int(i), int(i) % 2, 16) for i in samples])


def damage(url: Path, *samples: int) -> None:
    """Overwrite the image bytes of samples with zeros, in place."""
    reader = IndexReader(str(url / "train"), record.read(str(url))[0].splits["train"])
    for row in (reader.rows(i, i + 1).to_pylist()[0] for i in samples):
        with (url / "train" / row["shard"]).open("r+b") as file:
            file.seek(row["offset"])
            file.write(bytes(row["size"]))
