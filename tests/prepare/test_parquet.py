"""Parquet with images: which columns, which splits, what a listing reads, and files that are damaged."""

import collections
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.dataset.label import LabelError
from pipeline.prepare import parquet, sources
from pipeline.prepare.sources import ItemError, Source, SourceError
from tests.prepare import trees


def _read_all(source: Source) -> list[sources.Found | ItemError]:
    return [found for _, found in sorted(sources.read_items(source, source.items), key=lambda pair: pair[0])]


def _binary(values: list[bytes | None]) -> pa.Array:
    return pa.array(values, pa.binary())


def _struct(values: list[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": value} for value in values], pa.struct([("bytes", pa.binary())]))


def _one_file(root: Path, columns: dict[str, object], features: dict[str, object] | None = None) -> str:
    table = pa.table(columns)
    trees.write_parquet(root / "a.parquet", table.replace_schema_metadata(trees.hub_metadata(features or {})))
    return str(root)


def test_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    source = sources.scan(trees.write_hub(tmp_path, {"train": 11, "test": 5, "validation": 4}))
    assert (source.kind, source.classes, source.ignored) == ("parquet", ("cat", "dog"), 1)
    assert source.counts() == {"test": 5, "train": 11, "val": 4}
    for at, split in enumerate(["train", "test", "val"]):
        same = [n for n, item in enumerate(source.items.to_pylist()) if item["split"] == split]
        found = _read_all(source)
        assert [found[n] for n in same] == [trees.image_bytes(1000 * at + i) for i in range(len(same))]
        assert [source.items["label"][n].as_py() for n in same] == [i % 2 for i in range(len(same))]


def test_a_listing_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = trees.write_hub(tmp_path, {"train": 8}, files=1)
    read: collections.Counter[str] = collections.Counter()
    original = pq.ParquetFile.read

    def counted(self: pq.ParquetFile, columns: list[str]) -> pa.Table:
        read.update(columns)
        return original(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", counted)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: pytest.fail("read"))
    sources.scan(url)
    assert read == {"label": 1}


def test_identity_is_labels_and_footers_not_place(tmp_path: Path) -> None:
    first = sources.scan(trees.write_hub(tmp_path / "a", {"train": 8}))
    assert sources.scan(trees.write_hub(tmp_path / "b", {"train": 8})).digest == first.digest
    assert sources.scan(trees.write_hub(tmp_path / "c", {"train": 8}, rows_per_group=3)).digest != first.digest
    assert sources.scan(trees.write_hub(tmp_path / "d", {"train": 9})).digest != first.digest


# ------------------------------------------------------------------------------------------------- columns


_PICTURES = [trees.image_bytes(i) for i in range(4)]
_IMAGE, _CLASSES = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["x", "y"]}


@pytest.mark.parametrize(
    ("columns", "features", "wanted"),
    [
        ({"a": _struct([b"no"] * 4), "b": _struct(_PICTURES)}, {"a": {"_type": "Audio"}, "b": _IMAGE}, "b.bytes"),
        ({"image": _binary([b"no"] * 4), "b": _struct(_PICTURES)}, {}, "b.bytes"),
        ({"x": _binary([b"no"] * 4), "jpg": _binary(_PICTURES)}, {}, "jpg"),
        ({"x": _binary([b"no"] * 4), "image": _binary(_PICTURES).cast(pa.large_binary())}, {}, "image"),
        ({"a": pa.array(["path"] * 4), "img": _binary(_PICTURES)}, {"a": _IMAGE}, "img"),
    ],
)
def test_the_column_of_images_is_found(
    tmp_path: Path, columns: dict[str, object], features: dict[str, object], wanted: str
) -> None:
    source = sources.scan(_one_file(tmp_path, columns, features))
    assert source.image_column == wanted
    assert _read_all(source) == _PICTURES


def test_the_column_of_images_is_chosen(tmp_path: Path) -> None:
    url = _one_file(tmp_path, {"image": _struct([b"no"] * 4), "mask": _struct(_PICTURES)})
    assert _read_all(sources.scan(url, image_column="mask")) == _PICTURES
    with pytest.raises(SourceError, match=r"no column nose of images; it has image .*mask.*--image-column"):
        sources.scan(url, image_column="nose")


@pytest.mark.parametrize(
    ("label", "features", "classes", "numbers"),
    [
        ({"fine_label": [1, 0, 1, 0], "label": [0, 0, 1, 1]}, {"fine_label": _CLASSES}, ("x", "y"), [1, 0, 1, 0]),
        ({"coarse": [1, 1, 0, 0], "fine_label": [1, 0, 1, 0]}, dict.fromkeys(("coarse", "fine_label"), _CLASSES),
         ("x", "y"), [1, 0, 1, 0]),
        ({"labels": [2, 0, 2, 0]}, {}, ("0", "1", "2"), [2, 0, 2, 0]),
        ({"class": ["b", "a", "b", "a"]}, {}, ("a", "b"), [1, 0, 1, 0]),
        ({"label": pa.array(["b", "a", "b", "a"]).dictionary_encode()}, {}, ("a", "b"), [1, 0, 1, 0]),
        ({"label": ["1", "0", "1", "0"]}, {}, ("0", "1"), [1, 0, 1, 0]),
        ({"label": [0.5] * 4}, {}, (), [None] * 4),
        ({"label": pa.array([None] * 4, pa.int64())}, {}, (), [None] * 4),
        ({"label": [-1] * 4}, {"label": _CLASSES}, (), [None] * 4),
        ({"caption": ["a"] * 4}, {}, (), [None] * 4),
    ],
)  # fmt: skip
def test_labels_are_found(
    tmp_path: Path,
    label: dict[str, object],
    features: dict[str, object],
    classes: tuple[str, ...],
    numbers: list[int | None],
) -> None:
    source = sources.scan(_one_file(tmp_path, {"image": _struct(_PICTURES)} | label, features))
    assert (source.classes, source.items["label"].to_pylist()) == (classes, numbers)


def test_the_label_column_is_chosen(tmp_path: Path) -> None:
    columns = {"image": _struct(_PICTURES), "label": [0, 1, 0, 1], "kind": ["b", "a", "a", "a"], "size": [0.1] * 4}
    url = _one_file(tmp_path, columns)
    source = sources.scan(url, label_field="column:kind", class_names=("b", "a"))
    assert (source.classes, source.items["label"].to_pylist()) == (("b", "a"), [0, 1, 1, 1])
    for field, message in [
        ("column:nose", "no column nose of numbers or names; it has image"),
        ("column:size", "no column size of numbers or names"),
        ("folder", "labels are in a column: --label-field column:NAME"),
        ("json:x", "labels are in a column"),
    ]:
        with pytest.raises(SourceError, match=message):
            sources.scan(url, label_field=field)


def test_a_test_split_without_labels_and_labels_that_are_partly_there(tmp_path: Path) -> None:
    train, test = trees.hub_table(_PICTURES, [0, 1, 0, 1]), trees.hub_table(_PICTURES, [-1] * 4)
    trees.write_parquet(tmp_path / "data/train-00000-of-00001.parquet", train)
    trees.write_parquet(tmp_path / "data/test-00000-of-00001.parquet", test)
    source = sources.scan(str(tmp_path))
    assert source.items["label"].to_pylist() == [None] * 4 + [0, 1, 0, 1]
    trees.write_parquet(tmp_path / "data/test-00000-of-00001.parquet", trees.hub_table(_PICTURES, [-1, 0, 0, 0]))
    parquet._footer.cache_clear()
    with pytest.raises(SourceError, match=r"mixed: .* with a label"):
        sources.scan(str(tmp_path))


def test_labels_out_of_range(tmp_path: Path) -> None:
    trees.write_parquet(tmp_path / "a.parquet", trees.hub_table(_PICTURES, [0, 1, 2, 0]))
    with pytest.raises(LabelError, match="labels 0 … 2, and 2 class names"):
        sources.scan(str(tmp_path))
    trees.write_parquet(tmp_path / "a.parquet", trees.hub_table(_PICTURES, [0, -2, 0, 0]))
    parquet._footer.cache_clear()
    with pytest.raises(LabelError, match="labels -2 … 0"):
        sources.scan(str(tmp_path))


@given(st.text(max_size=30) | st.sampled_from(['{"info": 3}', '{"info": {"features": [1]}}', "[" * 10**5]))
def test_metadata_that_says_nothing(said: str) -> None:
    schema = pa.schema([("image", pa.binary())], metadata={"huggingface": said})
    assert parquet._features(schema) == {}
    assert parquet._find_image(schema) == "image"


# -------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/train-00000-of-00003-0a1b2c3d4e5f.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("default/partial-test/0000.parquet", "test"),
        ("cats/validation/0000.parquet", "val"),
        ("Val.parquet", "val"),
        ("train_1.parquet", "train"),
        ("train/extra/part-7.parquet", "train"),
        ("test/train-00000-of-00001.parquet", "train"),
        ("default/extra/0000.parquet", "? extra"),
        ("extra-00000-of-00001.parquet", "? extra"),
        ("a.parquet", "?"),
        ("0000.parquet", "?"),
    ],
)
def test_splits_by_name(name: str, split: str) -> None:
    assert parquet._split(name) == split


@given(st.text(min_size=1).filter(lambda name: "/" not in name))
def test_any_name_has_a_split(name: str) -> None:
    assert parquet._splits("u", [f"{name}.parquet"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00001", "extra-00000-of-00001"], r"others, as extra-00000"),
        (["default/train/0000", "default/unsupervised/0000"], r"others, as default/unsupervised"),
        (["train", "b"], r"others, as b\.parquet"),
        (["small/train/0000", "large/train/0000"], "same split in large and in small"),
    ],
)
def test_two_kinds_of_files_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        trees.write_parquet(tmp_path / f"{name}.parquet", trees.hub_table(_PICTURES, [0, 1, 0, 1]))
    with pytest.raises(SourceError, match=message):
        sources.scan(str(tmp_path))


def test_one_unknown_name_and_loose_files_are_train(tmp_path: Path) -> None:
    for names in (["part-00000-of-00002", "part-00001-of-00002"], ["a", "b"], ["train/000/x", "train/001/x"]):
        root = tmp_path / names[0].replace("/", "_")
        for name in names:
            trees.write_parquet(root / f"{name}.parquet", trees.hub_table(_PICTURES, [0, 1, 0, 1]))
        assert sources.scan(str(root)).counts() == {"train": 8}


# ------------------------------------------------------------------------------------------------- bad input


def test_null_images_are_bad_items(tmp_path: Path) -> None:
    table = trees.hub_table([_PICTURES[0], None, _PICTURES[2]], [0, 1, 0])
    structs = [*table["image"].to_pylist(), {"bytes": None, "path": "3.png"}]
    column = pa.array(structs, table.schema.field("image").type)
    url = _one_file(tmp_path, {"image": column, "label": [0, 1, 0, 1]})
    found = _read_all(sources.scan(url))
    assert [found[0], found[2]] == [_PICTURES[0], _PICTURES[2]]
    assert [str(found[n]) for n in (1, 3)] == ["null: the file holds no bytes for this image"] * 2


def test_damaged_footers(tmp_path: Path) -> None:
    path = trees.write_parquet(tmp_path / "a.parquet", trees.hub_table(_PICTURES, [0, 1, 0, 1]))
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], b"x" * 500, whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(data)
        parquet._footer.cache_clear()
        with pytest.raises(SourceError, match=r"a\.parquet: not a whole Parquet file") as caught:
            sources.scan(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_damaged_row_group_makes_bad_items_of_its_rows(tmp_path: Path) -> None:
    pictures = [trees.image_bytes(i) for i in range(8)]
    sink = io.BytesIO()
    table = trees.hub_table(pictures, [i % 2 for i in range(8)])
    pq.write_table(table, sink, row_group_size=4, compression="zstd", write_page_checksum=True)
    data = bytearray(sink.getvalue())
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    middle = start + chunk.total_compressed_size // 2
    data[middle : middle + 20] = bytes(20)
    (tmp_path / "a.parquet").write_bytes(data)
    found = _read_all(sources.scan(str(tmp_path)))
    assert found[:4] == pictures[:4]
    assert all("cannot read row group 1" in str(error) for error in found[4:])


_FLIPS = st.tuples(st.booleans(), st.integers(0, 10**9), st.integers(0, 255))


@given(st.lists(_FLIPS, min_size=1, max_size=5))
def test_flipped_bytes_are_one_line_or_pictures(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[bool, int, int]]
) -> None:
    root = tmp_path_factory.mktemp("flip")
    path = trees.write_parquet(root / "a.parquet", trees.hub_table(_PICTURES, [0, 1, 0, 1]), rows_per_group=2)
    data = bytearray(path.read_bytes())
    footer = 8 + int.from_bytes(data[-8:-4], "little")
    for in_footer, at, byte in flips:
        data[-1 - at % footer if in_footer else at % len(data)] = byte
    path.write_bytes(data)
    parquet._footer.cache_clear()
    said = ""
    try:
        found = _read_all(sources.scan(str(root)))
        assert all(isinstance(one, bytes | ItemError) for one in found)
    except (SourceError, LabelError) as error:
        said = str(error)
    assert "\n" not in said


def test_no_column_of_images_no_rows_and_other_columns(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(SourceError, match=r"no column of images; it has text \(string\); see --image-column"):
        sources.scan(_one_file(tmp_path / "text", {"text": ["a"]}))
    with pytest.raises(SourceError, match="have no rows"):
        sources.scan(_one_file(tmp_path / "empty", {"image": _binary([])}))
    url = _one_file(tmp_path / "two", {"image": _binary(_PICTURES)})
    trees.write_parquet(tmp_path / "two/b.parquet", pa.table({"img": _binary(_PICTURES)}))
    with pytest.raises(SourceError, match=r"a\.parquet and b\.parquet differ in their columns"):
        sources.scan(url)


def test_row_groups_over_the_cap_and_footers_that_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = _one_file(tmp_path, {"image": _binary(_PICTURES)})
    monkeypatch.setattr(parquet, "MAX_BLOCK_BYTES", 100)
    with pytest.raises(SourceError, match=r"a row group holds \d+ bytes, and 100 are allowed.*row_group_size=100"):
        sources.scan(url)
    many = pa.table({"image": pa.nulls(10**5, pa.binary())})
    trees.write_parquet(tmp_path / "a.parquet", many, rows_per_group=10**5)
    parquet._footer.cache_clear()
    with pytest.raises(SourceError, match=r"promises 100000 images in \d+ bytes"):
        sources.scan(url)


def test_a_source_that_changed(tmp_path: Path) -> None:
    url = trees.write_hub(tmp_path, {"train": 16}, files=1)
    source = sources.scan(url)
    (path,) = tmp_path.glob("data/*.parquet")
    for count, message in [(6, "row group 1 has lost rows"), (4, "has lost row group 1")]:
        trees.write_parquet(path, trees.hub_table(_PICTURES[:1] * count, [0] * count))
        parquet._footer.cache_clear()
        with pytest.raises(SourceError, match=message):
            _read_all(source)


def test_names_repeated_a_million_times_are_held_once(tmp_path: Path) -> None:
    """A dictionary page holds a long name once, and its rows a number each."""
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4, np.int32)), pa.array(["n" * 10**6]))
    source = sources.scan(_one_file(tmp_path, {"image": _struct(_PICTURES), "label": names}))
    assert source.classes == ("n" * 10**6,)
    labels = parquet._labels(f"{tmp_path}/a.parquet", parquet._columns(f"{tmp_path}/a.parquet", "", ""))
    assert len({id(label) for label in labels}) == 1


def test_on_s3(tmp_path: Path, s3: str) -> None:
    url = trees.write_hub(tmp_path, {"train": 6})
    for entry in storage.list_entries(url):
        storage.put(f"{s3}/in/{entry.name}", storage.read(f"{url}/{entry.name}"))
    source = sources.scan(f"{s3}/in")
    assert source.digest == sources.scan(url).digest
    assert _read_all(source) == [trees.image_bytes(i) for i in range(6)]


def test_a_listing_on_s3_fetches_labels_and_footers_alone(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    table = trees.hub_table([noise.bytes(50_000) for _ in range(60)], [i % 2 for i in range(60)])
    data = trees.write_parquet(tmp_path / "a.parquet", table, rows_per_group=10).read_bytes()
    storage.put(f"{s3}/in/a.parquet", data)
    fetched: list[int] = []
    original = storage.read_range

    def counted(url: str, offset: int, size: int) -> bytes:
        fetched.append(size)
        return original(url, offset, size)

    monkeypatch.setattr(storage, "read_range", counted)
    source = sources.scan(f"{s3}/in")
    assert len(source.items) == 60
    assert sum(fetched) < 0.1 * len(data)
    fetched.clear()
    assert len(_read_all(source)) == 60
    assert len(fetched) == 6  # one request a row group
