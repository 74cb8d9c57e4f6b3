"""Shards and index parts damaged after they were indexed, read by the feed: what must hold for each chunk.

A chunk is refused with an error of ours, or has C rows in their places, each with the pixels and the label of its own
sample or, for a stated reason, of the next good one of the chunk.
"""

import atexit
import dataclasses
import functools
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import images
from pipeline.dataset import index, part, tar
from pipeline.dataset.index import IndexReader
from pipeline.dataset.record import Part
from pipeline.errors import InputError, RetryableError
from pipeline.stream.chunk import Chunk, ChunkReader, Decoder
from pipeline.stream.order import OrderPlan
from tests.fuzz import mutation
from tests.fuzz.image_corpus import smooth
from tests.fuzz.pool import Outcome

_SAMPLES, _SHARD_SAMPLES, _SIDE = 36, 12, 24
_FORMATS: tuple[images.ImageFormat, ...] = ("png", "jpeg", "webp")
_PLAN = OrderPlan(num_samples=_SAMPLES, seed=3, batch_size=8, num_lanes=2, steps_per_group=2)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A clean dataset of three shards, in memory, and where each sample's image file lies."""

    files: Mapping[str, bytes]
    parts: tuple[Part, ...]
    places: tuple[tuple[str, int, int], ...]
    """Of each sample: shard, offset, size."""

    def image_file(self, sample: int, files: Mapping[str, bytes]) -> bytes:
        """The bytes of an image, as the stored files have them."""
        shard, offset, size = self.places[sample]
        return files[shard][offset : offset + size]


@dataclasses.dataclass(frozen=True)
class Case:
    """The stored files after damage."""

    damage: str
    files: Mapping[str, bytes]
    number: int
    """Of the chunk."""


@functools.cache
def dataset() -> Dataset:
    """The clean one."""
    shards = {
        index.shard_name(n): tar.build(_sample(i) for i in _members(n)) for n in range(_SAMPLES // _SHARD_SAMPLES)
    }
    tables = [index.rows_of_shard(name, data, 3) for name, data in shards.items()]
    parts = {index.part_name(n): part.encode_part(some) for n, some in enumerate((tables[:2], tables[2:]))}
    rows = pa.concat_tables(tables)
    places = zip(rows["shard"].to_pylist(), rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)
    described = tuple(part.describe_part(name, data) for name, data in parts.items())
    return Dataset(files=shards | parts, parts=described, places=tuple(places))


def _members(shard: int) -> range:
    return range(shard * _SHARD_SAMPLES, (shard + 1) * _SHARD_SAMPLES)


def _sample(number: int) -> tuple[str, dict[str, bytes]]:
    image_format = _FORMATS[number % len(_FORMATS)]
    data = images.encode(smooth(_SIDE, _SIDE, seed=number), image_format, 90)
    return f"{number:05d}", {images.EXTENSIONS[image_format]: data, "cls": b"%d" % (number % 2)}


def _damaged_images(rng: random.Random, share: float) -> dict[str, bytes]:
    """A share of the image files damaged in place: no longer and no shorter, since the index says where they lie."""
    files = {name: bytearray(data) for name, data in dataset().files.items()}
    for shard, offset, size in dataset().places:
        if rng.random() < share:
            kind = rng.choice(tuple(mutation.ANYWHERE))
            data = mutation.ANYWHERE[kind](rng, bytes(files[shard][offset : offset + size]))
            files[shard][offset : offset + size] = data[:size].ljust(size, b"\0")
    return {name: bytes(data) for name, data in files.items()}


def _damaged_file(rng: random.Random, ending: str) -> dict[str, bytes]:
    """One stored file damaged anywhere, cut, exchanged for another, or gone."""
    files = dict(dataset().files)
    name = rng.choice([name for name in files if name.endswith(ending)])
    kind = rng.choice((*mutation.ANYWHERE, "cut", "exchanged", "gone"))
    if kind == "gone":
        del files[name]
    elif kind == "exchanged":
        files[name] = files[rng.choice([other for other in files if other != name])]
    else:
        files[name] = mutation.ANYWHERE[kind](rng, files[name])
    return files


def make(seed: int, number: int) -> Case:
    """The case of a number."""
    rng = random.Random(f"{seed}/{number}")
    damage = rng.choice(("few images", "many images", "all images", "shard", "part"))
    shares = {"few images": 0.1, "many images": 0.6, "all images": 1.0}
    ending = {"shard": ".tar", "part": ".parquet"}
    files = _damaged_images(rng, shares[damage]) if damage in shares else _damaged_file(rng, ending[damage])
    return Case(damage, files, rng.randrange(3 * _PLAN.chunks_per_epoch))


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ganymede-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    return folder


def check(case: Case) -> Outcome:
    """What the pool calls."""
    folder = Path(tempfile.mkdtemp(dir=_scratch()))  # never the same twice: readers keep what they have read
    for name, data in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    reader = ChunkReader(
        index=IndexReader(str(folder), dataset().parts),
        plan=_PLAN,
        decoder=Decoder(resolution=_SIDE, channels=3),
        in_tasks=True,
    )
    planned = _PLAN.chunk(case.number).tolist()
    shown = [_shown(case, sample) for sample in planned]
    try:
        table = reader(pa.table({"data": [case.number]}))
    except (InputError, RetryableError):
        table = None
    shutil.rmtree(folder)
    if table is None:
        assert case.damage in ("shard", "part") or not any(shown)
        return Outcome(case.damage, "refused")
    _check_rows(case.number, planned, shown, Chunk(table), table["reason"].to_pylist())
    return Outcome(case.damage, "replaced" if any(table["reason"].to_pylist()) else "whole")


def _shown(case: Case, sample: int) -> bytes | None:
    """The pixels that a stored image file shows, None if it is refused; of PNG, none but the right ones."""
    shard = dataset().places[sample][0]
    data = dataset().image_file(sample, case.files) if shard in case.files else b""
    out = np.empty((_SIDE, _SIDE, 3), np.uint8)
    try:
        images.decode_into(data, out)
    except images.ImageError:
        return None
    if sample % len(_FORMATS) == 0 and case.damage != "shard":
        assert np.array_equal(out, smooth(_SIDE, _SIDE, seed=sample))
    return out.tobytes()


def _check_rows(number: int, planned: list[int], shown: list[bytes | None], chunk: Chunk, reasons: list[str]) -> None:
    """Compare a chunk with the plan, and with what each of its stored image files shows."""
    assert chunk.position.tolist() == list(range(number * len(planned), (number + 1) * len(planned)))
    for place, pixels in enumerate(chunk.pixels((_SIDE, _SIDE, 3))):
        around = [*range(place, len(planned)), *range(place)]
        source = next(at for at in around if shown[at] is not None)
        assert pixels.tobytes() == shown[source]
        assert chunk.sample[place] == planned[source]
        assert chunk.label[place] == planned[source] % 2
        assert bool(reasons[place]) == (source != place)
        assert source == place or f"{planned[place]:05d}: cannot decode" in reasons[place]
