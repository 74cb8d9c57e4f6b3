"""The index of foreign shards, built on a real Ray: the same bytes however it is built, and nothing bad passes."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import images, storage
from pipeline.dataset import foreign, index, mixing, ray_index, record
from pipeline.dataset.foreign import ForeignConfig
from pipeline.dataset.index import open_split
from pipeline.dataset.label import LabelError
from pipeline.dataset.ray_index import Summary
from pipeline.dataset.record import DatasetError
from pipeline.dataset.tar import TarError
from tests.dataset import strangers
from tests.dataset.strangers import jpeg, tar_of

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # Ray 2.60 sets its own deprecated options when a DataContext is made.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]


def build(url: str, out: str, progress: list[int] | None = None, **config: object) -> Summary:
    shards = foreign.list_shards(url)
    counts: list[int] = [] if progress is None else progress
    return ray_index.build(url, shards, out, ForeignConfig(**config), counts.append)  # type: ignore[arg-type]


def digests(url: str) -> dict[str, str]:
    names = [entry.name for entry in storage.list_entries(url)]
    return {name: hashlib.sha256(storage.read(storage.join(url, name))).hexdigest() for name in names}


@pytest.mark.parametrize("store", ["local", "s3"])
def test_an_index_leads_to_every_sample(request: pytest.FixtureRequest, tmp_path: Path, store: str) -> None:
    base = str(tmp_path) if store == "local" else str(request.getfixturevalue("s3"))
    url, out, progress = strangers.write_shards(f"{base}/pets"), f"{base}/index", list[int]()
    before = digests(url)
    assert build(url, out, progress, resolution=16) == Summary(samples=60, ignored=0)
    assert progress == [1] * 6
    dataset, _ = record.read(out)
    assert (dataset.resolution, dataset.channels, dataset.classes) == (16, 3, ("0", "1", "2"))
    assert dataset.class_counts == {"train": (20, 20, 20)}
    assert dataset.lineage["source"] == dataset.shards_url == url
    assert dataset.label_run_ratio("train") == pytest.approx(2 / 3)
    reader = open_split(out, dataset, "train")
    table = reader.rows(0, 60)
    assert table.schema == index.SCHEMA
    for number, row in enumerate(table.to_pylist()):
        data = storage.read_range(reader.shard_url(row["shard"]), row["offset"], row["size"])
        pixels = images.decode(data, channels=3).pixels
        assert np.abs(pixels.astype(int) - strangers.grey(number)).max() <= 2
        assert (row["key"], row["label"]) == (f"{number:06d}", number % 3)
    assert digests(url) == before  # nothing is written beside the shards


@pytest.mark.parametrize("label_field", ["json:kind", "folder"])
def test_names_are_numbered_over_all_shards(tmp_path: Path, label_field: str) -> None:
    """Each shard holds one class, so no shard knows the number of its own."""
    url, out = strangers.write_shards(str(tmp_path / "pets"), sort=True, folder=True), str(tmp_path / "index")
    build(url, out, label_field=label_field)
    dataset, _ = record.read(out)
    assert dataset.classes == strangers.CLASSES
    assert dataset.class_counts == {"train": (20, 20, 20)}
    rows = open_split(out, dataset, "train").rows(0, 60)
    assert rows["label"].to_pylist() == [0] * 20 + [1] * 20 + [2] * 20
    assert dataset.label_run_ratio("train") == pytest.approx(20 / 1.5)
    assert dataset.label_runs["train"] == mixing.label_runs([rows["label"]])


def test_splits_and_leftovers(tmp_path: Path) -> None:
    url, out = str(tmp_path / "pets"), str(tmp_path / "index")
    odd = tar_of([("a.txt", b""), ("b.jpg", jpeg(1)), ("b.cls", b"5")])
    strangers.write(url, {"train/a.tar": odd, "val/b.tar": odd, "val/c.tar": tar_of([])})
    assert build(url, out) == Summary(samples=2, ignored=2)
    dataset, _ = record.read(out)
    assert {split: dataset.num_samples(split) for split in dataset.splits} == {"train": 1, "val": 1}
    assert dataset.classes == ("0", "1", "2", "3", "4", "5")
    assert dataset.class_counts == {"train": (0, 0, 0, 0, 0, 1), "val": (0, 0, 0, 0, 0, 1)}
    assert open_split(out, dataset, "val").rows(0, 1)["label"].to_pylist() == [5]


def test_shards_without_labels(tmp_path: Path) -> None:
    url = strangers.write(str(tmp_path / "pets"), {"a.tar": tar_of([("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])})
    build(url, str(tmp_path / "index"))
    dataset, _ = record.read(str(tmp_path / "index"))
    assert dataset.classes == ()
    assert dataset.class_counts == {}
    assert dataset.label_run_ratio("train") == 1.0
    assert open_split(str(tmp_path / "index"), dataset, "train").rows(0, 2)["label"].to_pylist() == [None, None]
    with pytest.raises(LabelError, match="has no label at json:kind"):
        build(url, str(tmp_path / "other"), label_field="json:kind")


def test_what_was_made_is_adopted_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    """What a kill leaves: a plan and some parts, in any order."""
    url, out = strangers.write_shards(str(tmp_path / "pets")), str(tmp_path / "index")
    build(url, out)
    undisturbed = digests(out)
    for lost in (
        ["dataset.json"],
        ["dataset.json", "train/index/part-00001.parquet", "train/index/part-00004.parquet"],
    ):
        for name in lost:
            storage.delete(f"{out}/{name}")
        kept = {path: path.stat().st_mtime_ns for path in Path(out).glob("train/index/*")}
        assert not ray_index.is_done(url, out, ForeignConfig())
        build(url, out)
        assert digests(out) == undisturbed
        assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items())
    assert ray_index.is_done(url, out, ForeignConfig())


def test_a_part_that_is_there_costs_no_second_look_at_its_shards(tmp_path: Path) -> None:
    url, out = strangers.write_shards(str(tmp_path / "pets")), str(tmp_path / "index")
    shards = foreign.list_shards(url)
    build(url, out)
    undisturbed = digests(out)
    storage.delete(f"{out}/dataset.json")
    for shard in shards:
        storage.delete(f"{url}/{shard.name}")
    ray_index.build(url, shards, out, ForeignConfig(), lambda _: None)
    assert digests(out) == undisturbed


def test_another_index_is_refused(tmp_path: Path) -> None:
    url, out = strangers.write_shards(str(tmp_path / "pets"), num_shards=1), str(tmp_path / "index")
    build(url, out)
    with pytest.raises(DatasetError, match="differs in config"):
        ray_index.is_done(url, out, ForeignConfig(channels=1))
    with pytest.raises(DatasetError, match="differs in shards_url"):
        ray_index.is_done(f"{url}-other", out, ForeignConfig())
    Path(out, "dataset.json").unlink()
    strangers.write(url, {"one-more.tar": strangers.shard(60, 1)})
    with pytest.raises(DatasetError, match="differs in listing"):  # it was begun with other shards
        build(url, out)


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_shards_that_changed_since_are_told(tmp_path: Path, change: str) -> None:
    url, out = strangers.write_shards(str(tmp_path / "pets")), str(tmp_path / "index")
    build(url, out)
    path = tmp_path / "pets" / "pets-0003.tar"
    path.write_bytes(strangers.shard(30, 11)) if change == "longer" else path.unlink()
    assert ray_index.is_done(url, out, ForeignConfig())
    reader = open_split(out, record.read(out)[0], "train")
    assert len(reader.rows(0, 30)) == 30
    with pytest.raises(DatasetError, match=r"pets-0003\.tar (has \d+ bytes|is gone), \d+ when it was indexed"):
        reader.rows(25, 35)


@pytest.mark.parametrize(
    ("data", "kind", "why"),
    [
        (strangers.shard(0, 3)[:-10240], TarError, "truncated"),
        (tar_of([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1")]), TarError, "not together"),
        (tar_of([("a.jpg", b""), ("a.cls", b"-7 \xff")]), LabelError, "cannot be read"),
        (tar_of([("a.jpg", b"")]), LabelError, "has no label at cls"),
    ],
)
def test_a_bad_shard_stops_it_and_is_named(tmp_path: Path, data: bytes, kind: type[Exception], why: str) -> None:
    url, out = strangers.write_shards(str(tmp_path / "pets")), str(tmp_path / "index")
    strangers.write(url, {"pets-0003.tar": data})
    with pytest.raises(kind, match=why) as caught:
        build(url, out)
    assert type(caught.value) is kind
    assert "pets-0003.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(out, "dataset.json").exists()


def test_no_images_at_all(tmp_path: Path) -> None:
    url = strangers.write(str(tmp_path / "pets"), {"a.tar": tar_of([("a.txt", b"")])})
    with pytest.raises(DatasetError, match="no images in its 1 shards"):
        build(url, str(tmp_path / "index"))


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    url, out = strangers.write_shards(str(tmp_path / "pets"), num_shards=1), tmp_path / "index"
    build(url, str(out))
    table = pq.read_table(out / "train" / "index" / "part-00000.parquet")
    assert table.schema == index.FOREIGN_SCHEMA
    assert table["sha256"].null_count == 10
    assert set(table["shard_size"].to_pylist()) == {Path(url, "pets-0000.tar").stat().st_size}
    assert isinstance(table, pa.Table)
