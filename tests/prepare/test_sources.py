"""Which kind a source is, how its items are read, and one clear line for what is no source."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.prepare import parquet, sources
from pipeline.prepare.sources import ItemError, SourceError
from tests.prepare import trees


def _write(kind: str, root: Path) -> str:
    """A source of a kind; returns its URL."""
    if kind == "zip":
        return trees.write_zip(root.with_suffix(".zip"), trees.folder_files(6))
    writers = {
        "folder": lambda: trees.write_folder(root, trees.folder_files(6)),
        "idx": lambda: trees.write_idx(root, 6, 3),
        "cifar": lambda: trees.write_cifar10(root),
        "webdataset": lambda: trees.write_tars(root, 3, ("a.tar", "b.tar")),
        "parquet": lambda: trees.write_hub(root, {"train": 6}),
    }
    return writers[kind]()


@pytest.mark.parametrize("kind", ["folder", "zip", "idx", "cifar", "webdataset", "parquet"])
def test_a_kind_is_told_by_its_files_and_its_items_come_once_each(tmp_path: Path, kind: str) -> None:
    source = sources.scan(_write(kind, tmp_path / "in"))
    assert source.kind == kind
    chosen = source.items.take(pa.array(np.random.default_rng(0).permutation(len(source.items))))
    found = dict(sources.read_items(source.without_items(), chosen))
    assert sorted(found) == list(range(len(chosen)))
    for row, item in enumerate(chosen.to_pylist()):
        assert np.array_equal(found[row], sources.read_item(source, item))  # type: ignore[arg-type]


def test_a_picture_in_a_parquet_repository_and_a_table_in_a_folder_of_pictures(tmp_path: Path) -> None:
    hub = Path(trees.write_hub(tmp_path / "hub", {"train": 4}))
    trees.write_folder(hub, {"assets/sample.png": trees.image_bytes(1)})
    assert sources.scan(str(hub)).kind == "parquet"
    assert sources.scan(str(hub)).ignored == 2
    folder = trees.write_folder(tmp_path / "folder", trees.folder_files(4))
    trees.write_parquet(Path(folder) / "metadata.parquet", pa.table({"file_name": ["cat/0000.png"]}))
    assert sources.scan(folder).kind == "folder"


def test_missing_empty_and_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = trees.write_folder(tmp_path / "text", {"a.txt": b"x"})
    for url, message in [
        (str(tmp_path / "none"), "missing or empty"),
        (str(tmp_path / "empty"), "missing or empty"),
        (text, "holds no images"),
        (f"{text}/a.txt", "is a file, not a folder"),
    ]:
        with pytest.raises(SourceError, match=message):
            sources.scan(url)
    with pytest.raises(storage.NotFoundError, match=r"none\.zip"):
        sources.scan(str(tmp_path / "none.zip"))


def test_blocks_are_read_once_each_and_bad_items_come_as_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = trees.write_hub(tmp_path, {"train": 40}, files=3, rows_per_group=5)
    source = sources.scan(url)
    read: list[parquet.Block] = []
    original = parquet.pq.ParquetFile.read_row_group

    def counted(self: parquet.pq.ParquetFile, number: int, **options: object) -> pa.Table:
        read.append(number)
        return original(self, number, **options)

    monkeypatch.setattr(parquet.pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(sources, "MAX_ITEM_BYTES", max(len(trees.image_bytes(i)) for i in range(40)) - 1)
    chosen = source.items.take(pa.array(np.random.default_rng(1).permutation(40)))
    found = dict(sources.read_items(source, chosen))
    assert len(read) == 3 + 3 + 3  # row groups of 13, 13 and 14 rows
    errors = [row for row, data in found.items() if isinstance(data, ItemError)]
    assert errors
    assert all(len(found[row]) <= sources.MAX_ITEM_BYTES for row in set(range(40)) - set(errors))  # type: ignore[arg-type]
