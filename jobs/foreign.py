"""What a verb that reads a dataset does first: foreign shards, which have no dataset.json of ours, are indexed."""

from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import storage
from pipeline.dataset import foreign, ray_index, record
from pipeline.dataset.foreign import ForeignConfig, Shard


def find_dataset(named: str, index: str, config: ForeignConfig, terminal: Terminal) -> str:
    """The URL of the dataset.json that a dataset is read by: its own, or that of the index of its foreign shards.

    The index is made at the URL `index` unless it is there, and nothing is ever written beside the shards, which may
    be anyone's. Raises DatasetError where there are neither.
    """
    if any(storage.stat(storage.join(named, name)) is not None for name in (record.NAME, record.PLAN_NAME)):
        return named
    if ray_index.is_done(named, index, config):
        terminal.line(f"{terminal.verb}: already indexed, {_counts(index)}: {index}")
        return index
    shards = foreign.list_shards(named)
    if not shards:
        return named  # where reading says what is wrong
    _index(named, shards, index, config, terminal)
    return index


def _index(url: str, shards: list[Shard], index: str, config: ForeignConfig, terminal: Terminal) -> None:
    storage.probe(index)
    start_ray(terminal)
    with terminal.progress(len(shards), "shards", "index") as bar:
        summary = ray_index.build(url, shards, index, config, bar.update)
    if summary.ignored:
        terminal.warn(f"{summary.ignored} samples without an image are left out")
    terminal.line(f"{terminal.verb}: indexed {len(shards)} shards, {_counts(index)}: {index}")


def _counts(url: str) -> str:
    dataset, _ = record.read(url)
    return ", ".join(f"{split} {dataset.num_samples(split)}" for split in sorted(dataset.splits)) + " images"
