"""A part is read piece by piece, and no damage to it goes unseen."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import index, part
from pipeline.dataset.record import DatasetError, Part

ROWS = 50
fresh = itertools.count()


def shard(number: int, rows: int = ROWS, seed: int = 0) -> pa.Table:
    """Rows as of a shard: digests that do not compress, so that parts of other rows have the same size."""
    rng = np.random.default_rng([seed, number])
    columns = {
        "key": [f"{number * rows + i:09d}" for i in range(rows)],
        "label": np.arange(rows, dtype=np.int32) % 7,
        "shard": [index.shard_name(number)] * rows,
        "offset": np.arange(rows) * 1024,
        "size": np.full(rows, 700, np.int32),
        "sha256": [rng.bytes(32) for _ in range(rows)],
    }
    return pa.table(columns, schema=index.SCHEMA)


@pytest.fixture(scope="module")
def data() -> bytes:
    return part.encode_part([shard(number) for number in range(5)])


def place(folder: Path, data: bytes, like: bytes, *, whole: bool = False) -> tuple[str, Part]:
    """Store bytes as a part that dataset.json says is `like`, under a name that no cache knows."""
    path = folder / f"part-{next(fresh)}.parquet"
    path.write_bytes(data)
    described = part.describe_part("index/part-00000.parquet", like)
    return str(path), dataclasses.replace(described, footer_sha256="") if whole else described


@pytest.mark.parametrize("whole", [False, True])
def test_every_range_of_rows(tmp_path: Path, data: bytes, whole: bool) -> None:
    url, described = place(tmp_path, data, data, whole=whole)
    table = pa.concat_tables([shard(number) for number in range(5)])
    for start, stop in itertools.combinations([0, 1, 49, 50, 51, 99, 100, 180, 249, 250], 2):
        assert part.read_rows(url, described, start, stop) == table.slice(start, stop - start)


def test_other_readers_read_it(tmp_path: Path, data: bytes) -> None:
    url, _ = place(tmp_path, data, data)
    assert pq.read_table(url) == pa.concat_tables([shard(number) for number in range(5)])
    metadata = pq.read_metadata(url)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROWS] * 5


def test_only_the_rows_own_pieces_are_read(tmp_path: Path, data: bytes) -> None:
    """All but the footer and the third row group is overwritten, and its rows are read."""
    described = part.describe_part("p", data)
    metadata = pq.read_metadata(pa.BufferReader(data))
    start, end = (part._first_page(metadata.row_group(i).column(0)) for i in (2, 3))
    zeroed = bytes(start) + data[start:end] + bytes(len(data) - end - described.footer_bytes)
    url, _ = place(tmp_path, zeroed + data[-described.footer_bytes :], data)
    assert part.read_rows(url, described, 2 * ROWS, 3 * ROWS) == shard(2)
    for other in (2 * ROWS - 1, 3 * ROWS):
        with pytest.raises(DatasetError, match="not the part"):
            part.read_rows(url, described, other, other + 1)


@given(place_=st.integers(0, 2**32), bit=st.integers(0, 7), whole=st.booleans())
def test_a_flipped_bit_never_gives_other_rows(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, place_: int, bit: int, whole: bool
) -> None:
    altered = bytearray(data)
    altered[place_ % len(data)] ^= 1 << bit
    folder = tmp_path_factory.getbasetemp()
    url, described = place(folder, bytes(altered), data, whole=whole)
    # Every byte is covered by a digest; until the piece with the damage is reached, rows are right.
    with pytest.raises(DatasetError, match=url):
        check_all(url, described)
    os.unlink(url)


def check_all(url: str, described: Part) -> None:
    """Read every row group; raises as `read_rows` does."""
    for number in range(5):
        assert part.read_rows(url, described, number * ROWS, (number + 1) * ROWS) == shard(number)


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -8, -100])
def test_a_cut_part_is_named(tmp_path: Path, data: bytes, kept: int) -> None:
    url, described = place(tmp_path, data[:kept], data)
    with pytest.raises(DatasetError, match=url):
        part.read_rows(url, described, 0, 5 * ROWS)


def test_a_missing_part_is_named(tmp_path: Path, data: bytes) -> None:
    url, described = place(tmp_path, data, data)
    os.unlink(url)
    with pytest.raises(DatasetError, match=url):
        part.read_rows(url, described, 0, 1)


@pytest.mark.parametrize("whole", [False, True])
def test_another_part_of_the_same_size_is_refused(tmp_path: Path, data: bytes, whole: bool) -> None:
    """The footers differ in nothing but the digests that they hold: without these, its rows would pass."""
    other = part.encode_part([shard(number, seed=1) for number in range(5)])
    assert len(other) == len(data)
    url, described = place(tmp_path, other, data, whole=whole)
    with pytest.raises(DatasetError, match=f"{url}: not the part"):
        part.read_rows(url, described, 0, 1)


def test_a_record_that_promises_other_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    url, described = place(tmp_path, data, data)
    with pytest.raises(DatasetError, match="does not have the 251 rows"):
        part.read_rows(url, dataclasses.replace(described, rows=251), 0, 1)


def test_parts_are_filled_and_long_shards_cut() -> None:
    tables = [shard(0, part.MAX_GROUP_ROWS + 1), *(shard(number, 1) for number in range(1, 200)), shard(200, 0)]
    filled = list(part.fill_parts(tables))
    assert [len(groups) for groups in filled] == [128, 73]
    assert [len(group) for group in filled[0][:3]] == [part.MAX_GROUP_ROWS, 1, 1]
    assert pa.concat_tables([group for groups in filled for group in groups]) == pa.concat_tables(tables)
    assert list(part.fill_parts([shard(0, 0)])) == []


def test_a_part_without_rows(tmp_path: Path) -> None:
    data = part.encode_part([shard(0, 0)], {"why": "empty"})
    assert part.describe_part("p", data).rows == 0
    assert part.note(data, "why") == "empty"
    both = part.encode_part([shard(0, 0), shard(1), shard(2, 0)])
    url, described = place(tmp_path, both, both)
    assert part.read_rows(url, described, 0, ROWS) == shard(1)


def test_what_is_not_used_leaves_the_cache() -> None:
    cache: part._Cache[str] = part._Cache(100)
    loads: list[str] = []

    def get(key: str, size: int) -> str:
        def load() -> tuple[str, int]:
            loads.append(key)
            return key.upper(), size

        return cache.get(key, load)

    assert [get("a", 40), get("b", 40), get("a", 40), get("c", 40), get("a", 40), get("b", 40)] == list("ABACAB")
    assert loads == ["a", "b", "c", "b"]
    assert get("huge", 1000) == "HUGE"
    assert get("huge", 1000) == "HUGE"
    assert loads[4:] == ["huge"]


def test_equal_rows_give_equal_bytes_in_any_folder(tmp_path: Path, data: bytes) -> None:
    assert part.encode_part([shard(number) for number in range(5)]) == data
    url, described = place(tmp_path, data, data)
    shutil.copy(url, tmp_path / "moved")
    assert part.read_rows(str(tmp_path / "moved"), described, 0, ROWS) == shard(0)
