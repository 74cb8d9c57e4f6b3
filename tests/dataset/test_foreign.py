"""Foreign shards: what a URL holds, and what each shard does, by its headers alone."""

import tarfile
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.dataset import foreign
from pipeline.dataset.foreign import ForeignConfig, Shard
from pipeline.dataset.label import LabelError
from pipeline.dataset.record import DatasetError
from pipeline.dataset.tar import TarError
from tests.dataset import strangers
from tests.dataset.strangers import jpeg, tar_of


def named(splits_and_names: list[tuple[str, str]]) -> list[Shard]:
    return [Shard(split=split, name=name, size_bytes=1) for split, name in splits_and_names]


def rows(url: str, data: bytes, label_field: str = "cls") -> tuple[list[dict[str, object]], int]:
    strangers.write(url, {"a.tar": data})
    one = Shard(split="train", name="a.tar", size_bytes=len(data))
    table, ignored = foreign.rows_of_shard(url, one, label_field)
    return table.to_pylist(), ignored


def test_splits_are_the_top_folders(tmp_path: Path) -> None:
    names = ["validation/b.tar", "train/b.tar", "train/a.tar", "test/x/a.tar", "readme.md", ".hidden/c.tar"]
    strangers.write(str(tmp_path), dict.fromkeys(names, b""))
    found = [(shard.split, shard.name) for shard in foreign.list_shards(str(tmp_path))]
    assert found == [
        ("test", "test/x/a.tar"),
        ("train", "train/a.tar"),
        ("train", "train/b.tar"),
        ("val", "validation/b.tar"),
    ]


def test_split_folders_in_any_case(tmp_path: Path) -> None:
    strangers.write(str(tmp_path), dict.fromkeys(["Train/a.tar", "test/b.tar"], b""))
    assert [(shard.split, shard.name) for shard in foreign.list_shards(str(tmp_path))] == [
        ("test", "test/b.tar"),
        ("train", "Train/a.tar"),
    ]


def test_other_folders_are_no_splits(tmp_path: Path) -> None:
    strangers.write(str(tmp_path), {"2023/b.tar": b"", "2024/a.tar": b"12345", "c.tar": b""})
    found = [(shard.split, shard.name, shard.size_bytes) for shard in foreign.list_shards(str(tmp_path))]
    assert found == [("train", "2023/b.tar", 0), ("train", "2024/a.tar", 5), ("train", "c.tar", 0)]


@pytest.mark.parametrize(
    ("names", "why"),
    [(["train/a.tar", "b.tar"], r"b\.tar lies outside"), (["a.tar", "b.tar.gz"], r"compressed tars \(e\.g\. b\.tar")],
)
def test_what_cannot_be_split_or_read_is_refused(tmp_path: Path, names: list[str], why: str) -> None:
    strangers.write(str(tmp_path), dict.fromkeys(names, b""))
    with pytest.raises(DatasetError, match=why):
        foreign.list_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, {1}), (256, {1}), (1000, {3, 1}), (100_000, {128, 32}), (1_000_000, {128, 64})]
)
def test_units_follow_from_the_number_of_shards(count: int, sizes: set[int]) -> None:
    shards = named([("train", f"{i}.tar") for i in range(count)])
    made = foreign.units(shards)
    assert [shard for unit in made for shard in unit.shards] == shards
    assert {len(unit.shards) for unit in made} == sizes
    assert [unit.number for unit in made] == list(range(len(made)))


def test_units_keep_splits_apart() -> None:
    made = foreign.units(named([("test", "test/a.tar"), ("train", "train/a.tar"), ("train", "train/b.tar")]))
    assert [(unit.split, unit.number, len(unit.shards)) for unit in made] == [
        ("test", 0, 1),
        ("train", 0, 1),
        ("train", 1, 1),
    ]


@pytest.mark.parametrize("store", ["local", "s3"])
@pytest.mark.parametrize(
    ("label_field", "wanted"),
    [("cls", "012"), ("json:id", "012"), ("json:kind", strangers.CLASSES), ("folder", strangers.CLASSES)],
)
def test_rows_lead_to_the_images(
    request: pytest.FixtureRequest, tmp_path: Path, store: str, label_field: str, wanted: str
) -> None:
    url = str(tmp_path) if store == "local" else str(request.getfixturevalue("s3"))
    found, ignored = rows(url, strangers.shard(0, 7, folder=True), label_field)
    assert ignored == 0
    for number, row in enumerate(found):
        data = storage.read_range(f"{url}/a.tar", row["offset"], row["size"])  # type: ignore[arg-type]
        assert data == strangers.sample(number, 0)["jpg"]
        assert row["key"] == f"{strangers.CLASSES[number % 3]}/{number:06d}"
        assert row["label"] == wanted[number % 3]
        assert row["sha256"] is None
    assert len(found) == 7


def test_labels_may_come_before_or_after_the_image_and_far_away(tmp_path: Path) -> None:
    big = jpeg(1) + bytes(3 * 2**20)
    files = [("a.cls", b"1"), ("a.jpg", big), ("b.JPG", big), ("b.cls", b"2"), ("c.jpg", jpeg(2)), ("c.cls", b"3")]
    found, _ = rows(str(tmp_path), tar_of(files))
    assert [(row["key"], row["label"], row["size"]) for row in found] == [
        ("a", "1", len(big)),
        ("b", "2", len(big)),
        ("c", "3", len(jpeg(2))),
    ]


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    files = [("a.txt", b"x"), ("b.jpg", jpeg(1)), ("c.cls", b"1"), ("d.seg.png", b"mask"), ("README", b"")]
    found, ignored = rows(str(tmp_path), tar_of(files))
    assert [row["key"] for row in found] == ["b"]
    assert ignored == 3


GOOD = strangers.shard(0, 3)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (GOOD[:-10240], "truncated"),
        (GOOD[:700], "truncated"),
        (b"", "truncated"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
        (tar_of([("a.jpg", b"1"), ("a.jpg", b"2")]), "twice"),
        (tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"1")]), "not together"),
        (tar_of([("a.jpg", b"1"), ("a.cls", b"-")], fmt=tarfile.GNU_FORMAT)[:-512] + b"x" * 512, "goes on after"),
        (GOOD + GOOD, "goes on after"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(TarError, match=why) as caught:
        rows(str(tmp_path), data)
    assert str(caught.value).startswith(f"{tmp_path}/a.tar: ")


@pytest.mark.parametrize(
    ("files", "label_field", "why"),
    [
        ([("a.jpg", b""), ("a.json", b"{")], "json:kind", "cannot be read"),
        ([("a.jpg", b""), ("a.json", b'{"kind": [1]}')], "json:kind", "neither a number nor a name"),
        ([("a.jpg", b""), ("a.json", b'{"id": -1}')], "json:id", "label of a is -1"),
        ([("a.jpg", b""), ("a.cls", b"100000")], "cls", "label of a is 100000"),
        ([("a.jpg", b""), ("a.cls", bytes(2**21))], "cls", "more than a label may have"),
        ([("a.jpg", b""), ("a.cls", b"\xff")], "cls", "cannot be read"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, files: list[tuple[str, bytes]], label_field: str, why: str) -> None:
    with pytest.raises(LabelError, match=why) as caught:
        rows(str(tmp_path), tar_of(files), label_field)
    assert f"{tmp_path}/a.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"resolution": 100}, "16, 32"), ({"channels": 4}, "grey"), ({"label_field": "json:"}, "json:KEY")],
)
def test_settings_that_mean_nothing(settings: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ForeignConfig(**settings)  # type: ignore[arg-type]
