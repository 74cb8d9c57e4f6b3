"""The index says where each sample lies, across row groups and parts."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline import images, storage
from pipeline.dataset import index, record
from pipeline.dataset.record import DatasetError
from tests.small import make_dataset, shape_image, shard_bytes


@pytest.fixture
def reader(tmp_path: Path) -> index.IndexReader:
    made = make_dataset(str(tmp_path), num_samples=100, shard_size=30)
    return index.IndexReader(str(tmp_path / "train"), made.splits["train"])


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 1), (29, 31), (59, 61), (25, 95), (99, 100), (40, 40)])
def test_rows_of_a_range(reader: index.IndexReader, start: int, stop: int) -> None:
    rows = reader.rows(start, stop)
    assert rows["key"].to_pylist() == [f"{i:09d}" for i in range(start, stop)]
    assert rows["label"].to_pylist() == [i % 2 for i in range(start, stop)]
    assert rows["shard"].to_pylist() == [index.shard_name(i // 30) for i in range(start, stop)]


def test_a_row_leads_to_its_pixels(reader: index.IndexReader) -> None:
    for i, row in enumerate(reader.rows(0, 100).to_pylist()):
        data = storage.read_range(reader.shard_url(row["shard"]), row["offset"], row["size"])
        pixels = images.decode(data, channels=1).pixels
        assert np.array_equal(pixels, shape_image(i, i % 2, 16))
        assert hashlib.sha256(pixels.tobytes()).digest() == row["sha256"]


def test_equal_rows_give_equal_bytes() -> None:
    tables = [index.rows_of_shard("s", shard_bytes(start, 5, 16), 1) for start in (0, 5)]
    assert index.encode_part(tables) == index.encode_part(tables)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    made = make_dataset(str(tmp_path), num_samples=10)
    part = tmp_path / "train" / "index" / "part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data if damage == "altered" else data[:-20])
    with pytest.raises(DatasetError, match="part-00000"):
        index.IndexReader(str(tmp_path / "train"), made.splits["train"]).rows(0, 1)


def test_the_record_round_trips(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path))
    read, digest = record.read(str(tmp_path))
    assert read == made
    assert digest == hashlib.sha256((tmp_path / "dataset.json").read_bytes()).hexdigest()
    assert read.num_samples("train") == 100
    with pytest.raises(DatasetError, match="no split 'test'"):
        read.num_samples("test")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no dataset here"),
        (b"{", "not a dataset record"),
        (b'{"format": 99}', "upgrade"),
        (b"[1]", "not a dataset record"),
        (
            b'{"format": 1, "splits": {"train": {"parts": [{"name": "p", "rows": "5", "sha256": ""}]}}}',
            "rows of a part",
        ),
        (b'{"format": 1, "splits": {"train": {"parts": [{"name": "p", "lines": 5}]}}}', "not a dataset record"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DatasetError, match=why):
        record.read(str(tmp_path))


def test_an_unfinished_dataset_is_called_so(tmp_path: Path) -> None:
    record.settle_plan(str(tmp_path), {"a": 1}, {})
    with pytest.raises(DatasetError, match="unfinished"):
        record.read(str(tmp_path))


def test_a_rival_may_settle_the_plan_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, url = storage.stat, str(tmp_path)

    def look_before_a_rival(where: str) -> storage.Stat | None:
        found = look(where)
        monkeypatch.undo()
        record.settle_plan(url, {"a": 1}, {"by": "rival"})
        storage.put_if_absent(storage.join(url, "events", "a"), b"")
        return found

    monkeypatch.setattr(storage, "stat", look_before_a_rival)
    assert record.settle_plan(url, {"a": 1}, {"by": "us"}) == {"by": "rival"}


def test_a_plan_is_settled_once(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert record.settle_plan(url, {"a": (1, 2)}, {"by": "first"}) == {"by": "first"}
    assert record.settle_plan(url, {"a": (1, 2)}, {"by": "second"}) == {"by": "first"}
    wanted = (
        r'another dataset.*differs in a \(\[1, 2\] there, 3 here\), b\.c \("absent" there, 1 here\) \(plan \w{12} there'
    )
    with pytest.raises(DatasetError, match=wanted):
        record.settle_plan(url, {"a": 3, "b": {"c": 1}}, {})


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DatasetError, match=r"thesis\.tex"):
        record.settle_plan(str(tmp_path), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
