"""WebDataset shards of any make: tars of samples, an image and a label each."""

from collections.abc import Sequence

from pipeline import storage
from pipeline.dataset import tar
from pipeline.dataset.label import sample_label
from pipeline.dataset.names import IMAGE_EXTENSIONS, SPLITS, is_hidden
from pipeline.prepare.listing import Item, Source, SourceError, finish, refuse_mixture


def shards(names: Sequence[str]) -> list[str]:
    """The names that are visible tars."""
    return [name for name in names if name.endswith(".tar") and not is_hidden(name)]


def scan_shards(url: str, tars: Sequence[str], label_field: str, class_names: Sequence[str]) -> Source:
    """List the samples with an image; every tar is read once.

    Raises SourceError, LabelError, StorageError, TarError.
    """
    splits = [SPLITS.get(name.split("/")[0].lower()) if "/" in name else None for name in tars]
    refuse_mixture(url, tars, [split is not None for split in splits], "below a split folder (train, test, val)")
    items: list[Item] = []
    ignored = 0
    for name, split in zip(tars, splits, strict=True):
        found, without = _scan_shard(url, name, split or "train", label_field)
        items += found
        ignored += without
    if not items:
        raise SourceError(f"source {url} holds no images in its {len(tars)} tars")
    refuse_mixture(url, [i.name for i in items], [i.label is not None for i in items], f"with a label ({label_field})")
    if label_field != "cls" and items[0].label is None:
        raise SourceError(f"source {url} has no label at {label_field}; see --label-field")
    return finish("webdataset", url, items, class_names, ignored)


def _scan_shard(url: str, name: str, split: str, label_field: str) -> tuple[list[Item], int]:
    """The items of one tar, and how many of its samples have no image."""
    where = storage.join(url, name)
    data = storage.read(where)

    def read(member: tar.Member) -> bytes:
        return data[member.offset : member.offset + member.size_bytes]

    samples = tar.group(tar.scan(data, where), where)
    items: list[Item] = []
    for sample in samples:
        image = next((m for ext, m in sample.members.items() if ext in IMAGE_EXTENSIONS), None)
        if image is not None:
            label = sample_label(sample, read, label_field, where)
            items.append(Item(split, f"{name}#{sample.key}", label, name, image.offset, image.size_bytes))
    return items, len(samples) - len(items)
