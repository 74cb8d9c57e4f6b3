"""A reader that looks at a dataset all the while it is made: no object is ever there in part, and none goes away."""

import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import index, tar

_POLL_SEC = 0.02
_PART = re.compile(r"part-(\d+)\.parquet$")


class Watcher(threading.Thread):
    """Reads every object when it is first listed; `expected` are the final bytes by name."""

    def __init__(self, url: str, expected: Mapping[str, bytes]) -> None:
        super().__init__()
        self._url, self._expected = url, expected
        self._stopped = threading.Event()
        self.seen: set[str] = set()
        self.faults: list[str] = []

    def run(self) -> None:
        try:
            while not self._stopped.wait(_POLL_SEC):
                self.look()
        except Exception as error:
            self.faults.append(f"the reader failed: {error!r}")
            raise

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def look(self) -> None:
        """One listing, and what is new in it."""
        sizes = {
            entry.name: entry.size_bytes
            for entry in storage.list_entries(self._url)
            if not entry.name.startswith("events/")
        }
        self.faults += [f"{name} went away" for name in self.seen - sizes.keys()]
        self.faults += [
            f"{name} came before {needs}" for name in self.seen for needs in self._before(name) - sizes.keys()
        ]
        for name in sorted(sizes.keys() - self.seen):
            expected = self._expected.get(name, b"")
            if sizes[name] != len(expected):
                self.faults.append(f"{name} is listed with {sizes[name]} of {len(expected)} bytes")
            self.faults += _faults(name, storage.read(storage.join(self._url, name)), expected)
        self.seen |= sizes.keys()

    def _before(self, name: str) -> set[str]:
        """What must have been there before an object: a part's shard, and everything before dataset.json."""
        if name == "dataset.json":
            return set(self._expected)
        return {f"train/shard-{int(match[1]):06d}.tar"} if (match := _PART.search(name)) else set()


def _faults(name: str, data: bytes, expected: bytes) -> Iterator[str]:
    """What is wrong with an object, by its own format and then by its bytes."""
    try:
        if keys_of(name, data) != keys_of(name, expected):
            yield f"{name} holds {len(keys_of(name, data))} keys of {len(keys_of(name, expected))}"
    except Exception as error:  # noqa: BLE001 - what a library makes of half a file: whatever it is, it is told
        yield f"{name} cannot be read: {error!r}"
    if data != expected:
        yield f"{name} has {len(data)} bytes, of which some are not the final ones"


def keys_of(name: str, data: bytes) -> list[str]:
    """Keys of a whole shard or of a whole part; none for another object."""
    if name.endswith(".tar"):
        return [sample.key for sample in tar.group(tar.scan(data, name), name)]
    if name.endswith(".parquet"):
        rows = pq.read_table(io.BytesIO(data), schema=None)
        assert rows.column_names[: len(index.SCHEMA)] == index.SCHEMA.names
        return list(rows["key"].to_pylist())
    return []


@contextmanager
def watching(url: str, expected: Mapping[str, bytes]) -> Iterator[None]:
    """Within it the dataset is watched; what was seen amiss is raised at the end."""
    watcher = Watcher(url, expected)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()
    watcher.look()
    assert not watcher.faults, "\n".join(watcher.faults[:10])
    assert watcher.seen == expected.keys()
