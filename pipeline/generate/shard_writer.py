"""One unit of work: one shard made, committed, and its part derived from the stored bytes.

Every step may be repeated and may meet a rival: what is stored first is the truth, and is adopted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import images, storage
from pipeline.dataset import index, tar
from pipeline.dataset.record import DatasetError
from pipeline.gan.pixels import to_network
from pipeline.gan.sample import sample
from pipeline.generate.plan import GeneratePlan

SPLIT = "train"
_KEY_DIGITS = 9
SCHEMA = index.SCHEMA.append(pa.field("seed", pa.int64())).append(pa.field("score", pa.float32()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """A committed part."""

    shard: int
    rows: int
    sha256: str


def part_url(out_url: str, shard: int) -> str:
    """The URL of a shard's part, which is its receipt."""
    return storage.join(out_url, SPLIT, index.part_name(shard))


def write_shard(
    out_url: str, plan: GeneratePlan, G: nn.Module, D: nn.Module, shard: int, device: torch.device
) -> Receipt:
    """Make shard number `shard` unless it is there, then its part unless it is there. Raises DatasetError for a shard
    in storage that is not one of this plan. G and D, in eval mode, lie on `device`.
    """
    name = index.shard_name(shard)
    url = storage.join(out_url, SPLIT, name)
    stored = None if storage.stat(url) is None else storage.read(url)
    if stored is None:
        stored = build_shard(plan, G, shard, device)
        if storage.put_if_absent(url, stored) is storage.Put.OTHER:
            stored = storage.read(url)
    part = encode_part(plan, shard, stored, url, D, device)
    if storage.put_if_absent(part_url(out_url, shard), part) is storage.Put.OTHER:
        raise DatasetError(f"{part_url(out_url, shard)}: does not describe {name}; delete the part and run again")
    return receipt(part_url(out_url, shard), shard, plan)


def build_shard(plan: GeneratePlan, G: nn.Module, shard: int, device: torch.device) -> bytes:
    """The tar of a shard: key (seed, 9 digits), image, and .cls with classes; a pure function of the plan on one
    hardware class.
    """
    return tar.build(one for seeds in _micro_batches(plan, shard) for one in _samples(plan, G, seeds, device))


def make_again(
    plan: GeneratePlan, G: nn.Module, keys: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Key and files of chosen samples, with the bytes that their shards have on one hardware class: each is made in the
    micro-batch that it was made in, since kernels round differently in another. Raises DatasetError for a key that
    the plan does not have.
    """
    numbers = {_number(plan, key) for key in keys}
    for shard in sorted({number // plan.config.shard_size for number in numbers}):
        for seeds in _micro_batches(plan, shard):
            if numbers & set(seeds.tolist()):
                yield from (one for one in _samples(plan, G, seeds, device) if one[0] in set(keys))


def _number(plan: GeneratePlan, key: str) -> int:
    number = int(key) if key.isascii() and key.isdigit() else plan.config.num_images
    if number >= plan.config.num_images or key != f"{number:0{_KEY_DIGITS}d}":
        last = f"{plan.config.num_images - 1:0{_KEY_DIGITS}d}"
        raise DatasetError(f"key {key!r} is not of this plan, whose keys are {0:0{_KEY_DIGITS}d} to {last}")
    return number


def _micro_batches(plan: GeneratePlan, shard: int) -> list[NDArray[np.int64]]:
    seeds, size = plan.seeds(shard), plan.config.micro_batch
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _samples(
    plan: GeneratePlan, G: nn.Module, seeds: NDArray[np.int64], device: torch.device
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Key and files of the samples of one micro-batch."""
    labels = plan.labels(seeds)
    z, label = (torch.from_numpy(array).to(device) for array in (plan.noise(seeds), labels))
    pixels = sample(G, z, label, precision=plan.config.precision).cpu().numpy()
    for seed, image, one in zip(seeds.tolist(), pixels, labels.tolist(), strict=True):
        yield f"{seed:0{_KEY_DIGITS}d}", _files(plan, image, one)


def _files(plan: GeneratePlan, image: "images.Pixels", label: int) -> Mapping[str, bytes]:
    config = plan.config
    encoded = images.encode(image, config.image_format, config.quality)
    files = {images.EXTENSIONS[config.image_format]: encoded}
    return files | {"cls": str(label).encode()} if plan.classes else files


def encode_part(plan: GeneratePlan, shard: int, stored: bytes, where: str, D: nn.Module, device: torch.device) -> bytes:
    """The part of a stored shard, from its bytes; raises DatasetError if they are not of this plan."""
    rows = index.rows_of_shard(index.shard_name(shard), stored, plan.channels)
    seeds = plan.seeds(shard)
    wanted = [f"{seed:0{_KEY_DIGITS}d}" for seed in seeds]
    if rows["key"].to_pylist() != wanted:
        raise DatasetError(
            f"{where}: does not hold the images {wanted[0]} to {wanted[-1]} of this plan; choose another URL"
        )
    rows = rows.append_column(SCHEMA.field("seed"), pa.array(seeds))
    scores = _scores(plan, rows, stored, D, device) if plan.config.score else pa.nulls(len(seeds), pa.float32())
    rows = rows.append_column(SCHEMA.field("score"), scores)
    return index.encode_part([rows])


@torch.no_grad()
def _scores(plan: GeneratePlan, rows: pa.Table, stored: bytes, D: nn.Module, device: torch.device) -> pa.Array:
    """D's logit of each image of a shard, decoded from its stored bytes, in micro-batches of the plan."""
    assert not D.training
    places = zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)
    files = [stored[offset : offset + size] for offset, size in places]
    labels = torch.from_numpy(rows["label"].fill_null(0).to_numpy().astype("int64"))
    logits = []
    for start in range(0, len(files), plan.config.micro_batch):
        part = slice(start, start + plan.config.micro_batch)
        pixels = np.stack([images.decode(file, channels=plan.channels).pixels for file in files[part]])
        logits.append(D(to_network(torch.from_numpy(pixels), device), labels[part].to(device)).cpu())
    return pa.array(torch.cat(logits).numpy(), pa.float32())


def receipt(url: str, shard: int, plan: GeneratePlan) -> Receipt:
    """The receipt that a stored part is."""
    return Receipt(shard=shard, rows=len(plan.seeds(shard)), sha256=storage.digest(url))
