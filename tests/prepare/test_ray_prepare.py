"""`prepare` on a real Ray: what is stored, what is left out, and that nothing but the plan decides the bytes."""

import collections
import gc
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
import webdataset

from pipeline import images, storage
from pipeline.dataset import index, record
from pipeline.prepare import plan as plans
from pipeline.prepare import ray_prepare, sources
from pipeline.prepare.plan import PrepareConfig
from pipeline.prepare.sources import SourceError
from tests.prepare import trees

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # Ray 2.60 sets its own deprecated options when a DataContext is made.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]


def _prepare(source_url: str, out: str, config: PrepareConfig, calls: list[int] | None = None) -> ray_prepare.Summary:
    source = sources.scan(
        source_url,
        label_field=config.label_field,
        class_names=config.class_names,
        image_column=config.image_column,
    )
    progress: list[int] = [] if calls is None else calls
    return ray_prepare.prepare(source, source_url, out, config, progress.append)


def _digests(url: str) -> dict[str, str]:
    names = [entry.name for entry in storage.list_entries(url)]
    return {name: hashlib.sha256(storage.read(storage.join(url, name))).hexdigest() for name in names}


def _samples(url: str, split: str) -> list[tuple[str, int | None, np.ndarray]]:
    """(key, label, pixels) of all rows of a split, as a reader of ours finds them."""
    dataset, _ = record.read(url)
    reader = index.IndexReader(storage.join(url, split), dataset.splits[split])
    found = []
    for row in reader.rows(0, reader.num_samples).to_pylist():
        data = storage.read_range(reader.shard_url(row["shard"]), row["offset"], row["size"])
        pixels = images.decode(data, channels=dataset.channels).pixels
        assert hashlib.sha256(pixels.tobytes()).digest() == row["sha256"]
        found.append((row["key"], row["label"], pixels))
    return found


def test_folder_with_splits(tmp_path: Path) -> None:
    files = trees.folder_files(30, splits=("train", "test"))
    calls: list[int] = []
    config = PrepareConfig(resolution=16, shard_size=8)
    summary = _prepare(trees.write_folder(tmp_path / "in", files), str(tmp_path / "out"), config, calls)
    assert summary.samples == {"test": 30, "train": 30}
    assert (summary.classes, summary.quarantined, sum(calls)) == (("cat", "dog"), 0, 60)
    for split in ("train", "test"):
        stored = _samples(str(tmp_path / "out"), split)
        assert [key for key, _, _ in stored] == [f"{i:09d}" for i in range(30)]
        wanted = collections.Counter()
        for name, data in files.items():
            if name.startswith(split):
                pixels = images.resize(images.decode(data, channels=3).pixels, 16, "crop")
                wanted[pixels.tobytes(), int("/dog/" in name)] += 1
        assert collections.Counter((pixels.tobytes(), label) for _, label, pixels in stored) == wanted
    labels = [label for _, label, _ in _samples(str(tmp_path / "out"), "train")]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    assert runs > 6  # shuffled: sorted by class there would be two
    assert record.read(str(tmp_path / "out"))[0].class_counts == {"test": (15, 15), "train": (15, 15)}


def test_the_dataset_lists_one_row_group_a_shard(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    _prepare(trees.write_idx(tmp_path / "in", 50, 20), out, PrepareConfig(resolution=32, channels=1, shard_size=16))
    dataset, _ = record.read(out)
    assert (dataset.channels, dataset.resolution, dataset.image_format) == (1, 32, "png")
    (part,) = dataset.splits["train"]
    assert hashlib.sha256(storage.read(f"{out}/train/{part.name}")).hexdigest() == part.sha256
    file = pq.ParquetFile(f"{out}/train/{part.name}")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [16, 16, 16, 2]
    assert dataset.lineage["source"] == str(tmp_path / "in")
    assert dataset.label_run_ratio("train") == pytest.approx(1, abs=0.3)


def test_without_classes_none_are_counted(tmp_path: Path) -> None:
    files = {name.replace("/", "-"): data for name, data in trees.folder_files(10).items()}
    _prepare(trees.write_folder(tmp_path / "in", files), str(tmp_path / "out"), PrepareConfig(resolution=16))
    dataset, _ = record.read(str(tmp_path / "out"))
    assert (dataset.num_samples("train"), dataset.classes, dataset.class_counts) == (10, (), {})


@pytest.mark.parametrize("channels", [1, 3])
def test_idx_padded_is_pixel_exact(tmp_path: Path, channels: int) -> None:
    config = PrepareConfig(resolution=32, channels=channels, fit="pad", shard_size=20)
    _prepare(trees.write_idx(tmp_path / "in", 40, 10), str(tmp_path / "out"), config)
    for _, label, pixels in _samples(str(tmp_path / "out"), "train"):
        assert pixels.shape == (32, 32, channels)
        value = int(pixels.max())
        assert label == (value - 1) % 10
        assert (pixels[6:26, 6:26] == value).all()
        assert pixels.sum() == value * 400 * channels


@pytest.mark.parametrize("channels", [1, 3])
def test_cifar_is_pixel_exact(tmp_path: Path, channels: int) -> None:
    config = PrepareConfig(resolution=32, channels=channels, shard_size=9)
    url = trees.write_cifar10(tmp_path / "in", per_batch=6)
    summary = _prepare(url, str(tmp_path / "out"), config)
    assert (summary.samples, summary.quarantined) == ({"test": 6, "train": 30}, 0)
    assert summary.classes[9] == "truck"
    wanted: collections.Counter[bytes] = collections.Counter()
    for number in range(30):
        rows, columns = np.mgrid[0:32, 0:32].astype(np.uint8)
        pixels = np.stack([np.full((32, 32), number, np.uint8), rows, columns], axis=2)
        grey = images.decode(images.encode(pixels, "png", 100), channels=1).pixels
        wanted[(pixels if channels == 3 else grey).tobytes()] += 1
    stored = _samples(str(tmp_path / "out"), "train")
    assert collections.Counter(pixels.tobytes() for _, _, pixels in stored) == wanted
    if channels == 3:
        assert all(label == pixels[0, 0, 0] % 10 for _, label, pixels in stored)


def test_parquet_gives_the_images_of_its_rows_whatever_the_order_of_reading(tmp_path: Path) -> None:
    url = trees.write_hub(tmp_path / "in", {"train": 60, "test": 10}, files=3, rows_per_group=7)
    out = str(tmp_path / "out")
    config = PrepareConfig(resolution=32, fit="pad", shard_size=16)
    assert _prepare(url, out, config).samples == {"test": 10, "train": 60}
    source = sources.scan(url)
    blocks = np.array([7, 7, 6] * 3)
    order = plans.order_of_blocks(config.seed, "train", blocks, config.shard_size)
    for (key, label, pixels), number in zip(_samples(out, "train"), order.tolist(), strict=True):
        data = trees.image_bytes(number)
        assert np.array_equal(pixels, images.resize(images.decode(data, channels=3).pixels, 32, "pad")), key
        assert label == number % 2
    assert source.counts() == {"test": 10, "train": 60}
    before = _digests(out)
    _prepare(url, str(tmp_path / "again"), config)
    assert _digests(str(tmp_path / "again")).items() >= {n: d for n, d in before.items() if n.endswith(".tar")}.items()


def test_null_images_of_parquet_are_quarantined(tmp_path: Path) -> None:
    pictures = [trees.image_bytes(i) if i % 10 else None for i in range(40)]
    trees.write_parquet(tmp_path / "in/train.parquet", trees.hub_table(pictures, [i % 2 for i in range(40)]))
    out = str(tmp_path / "out")
    config = PrepareConfig(resolution=16, shard_size=16, max_corrupt_fraction=0.1)
    summary = _prepare(str(tmp_path / "in"), out, config)
    assert (summary.samples, summary.quarantined) == ({"train": 36}, 4)
    events = [
        json.loads(line)
        for entry in storage.list_entries(f"{out}/events")
        for line in storage.read(f"{out}/events/{entry.name}").splitlines()
    ]
    assert {event["name"] for event in events} == {f"train.parquet#{i:09d}" for i in (0, 10, 20, 30)}
    assert {event["reason"] for event in events} == {"null: the file holds no bytes for this image"}
    keys = [event["key"] for event in events]
    assert keys == sorted(keys)  # the log does not tell in which order items were read
    with pytest.raises(SourceError, match="of the 40 images of split train are corrupt"):
        _prepare(str(tmp_path / "in"), str(tmp_path / "strict"), PrepareConfig(resolution=16, shard_size=16))


@pytest.mark.parametrize(("image_format", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_webdataset_reads_what_is_written(tmp_path: Path, image_format: images.ImageFormat, extension: str) -> None:
    out = tmp_path / "out"
    url = trees.write_tars(tmp_path / "in", 12, ("a.tar", "b.tar"))
    _prepare(url, str(out), PrepareConfig(resolution=32, shard_size=10, image_format=image_format))
    shards = sorted(map(str, (out / "train").glob("*.tar")))
    with warnings.catch_warnings(
        action="ignore", category=ResourceWarning
    ):  # the library leaves files to the collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(24)]
    assert all(sample[extension].shape == (32, 32, 3) for sample in samples)
    assert collections.Counter(sample["cls"] for sample in samples) == {0: 12, 1: 12}
    assert [s["cls"] for s in samples] == [label for _, label, _ in _samples(str(out), "train")]


@pytest.fixture
def data_context() -> Iterator[ray.data.DataContext]:
    """Ray Data's options, put back after the test."""
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    yield context
    context.execution_options.resource_limits = limits


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path, data_context: ray.data.DataContext) -> None:
    url = trees.write_folder(tmp_path / "in", trees.folder_files(60, splits=("train", "test")))
    for workers in (1, 4):
        data_context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=workers)
        _prepare(url, str(tmp_path / str(workers)), PrepareConfig(resolution=16, shard_size=7))
    one, four = _digests(str(tmp_path / "1")), _digests(str(tmp_path / "4"))
    assert one == four
    assert len(one) == 2 * 9 + 2 + 2


def test_zip_gives_the_same_shards_as_its_folder(tmp_path: Path) -> None:
    files = trees.folder_files(20)
    config = PrepareConfig(resolution=16, shard_size=8)
    _prepare(trees.write_folder(tmp_path / "in", files), str(tmp_path / "a"), config)
    _prepare(trees.write_folder(tmp_path / "in", files), str(tmp_path / "b"), config)
    assert _digests(str(tmp_path / "a")) == _digests(str(tmp_path / "b"))
    zipped = sources.scan(trees.write_zip(tmp_path / "in.zip", files))
    _prepare(zipped.url, str(tmp_path / "c"), config)
    stored = [collections.Counter(p.tobytes() for _, _, p in _samples(str(tmp_path / x), "train")) for x in "ac"]
    assert stored[0] == stored[1]


def test_corrupt_images_are_quarantined_and_conversions_counted(tmp_path: Path) -> None:
    files = trees.folder_files(120)
    files["cat/0000.png"] = files["cat/0000.png"][:100]
    files["dog/p.gif"] = trees.image_bytes(7000, "GIF")
    files["dog/c.jpg"] = trees.image_bytes(
        7001, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    )
    url, out = trees.write_folder(tmp_path / "in", files), str(tmp_path / "out")
    config = PrepareConfig(resolution=16, shard_size=50)
    summary = _prepare(url, out, config)
    assert (summary.samples, summary.quarantined) == ({"train": 121}, 1)
    assert summary.converted == {"exif": 1, "palette": 1}
    assert record.read(out)[0].class_counts == {"train": (59, 62)}  # of what is stored
    events = [
        json.loads(line)
        for entry in storage.list_entries(f"{out}/events")
        for line in storage.read(f"{out}/events/{entry.name}").splitlines()
    ]
    (corrupt,) = [event for event in events if "reason" in event]
    assert corrupt["name"] == "cat/0000.png"
    assert corrupt["reason"].startswith("cannot decode")
    keys = [key for key, _, _ in _samples(out, "train")]
    assert set(map(plans.key, range(122))) - set(keys) == {corrupt["key"]}
    before = _digests(out)
    assert _prepare(url, out, config) == summary
    assert _digests(out) == before


def test_too_many_corrupt_images_stop_the_run(tmp_path: Path) -> None:
    files = trees.folder_files(60)
    for name in list(files)[:3]:
        files[name] = b"\x89PNG\r\n\x1a\n broken"
    url, out = trees.write_folder(tmp_path / "in", files), str(tmp_path / "out")
    config = PrepareConfig(resolution=16, shard_size=20, max_corrupt_fraction=0.02)
    with pytest.raises(SourceError) as caught:
        _prepare(url, out, config)
    text = str(caught.value)
    assert "of the 60 images of split train are corrupt" in text
    assert ".png (cannot decode" in text
    assert "--max-corrupt-fraction" in text
    assert storage.stat(f"{out}/dataset.json") is None
    allowed = PrepareConfig(resolution=16, shard_size=20, max_corrupt_fraction=0.1)
    assert _prepare(url, out, allowed).samples == {"train": 57}


def test_errors_of_a_task_surface_as_they_are(tmp_path: Path) -> None:
    source = sources.scan(trees.write_folder(tmp_path / "in", trees.folder_files(4)))
    (tmp_path / "in/cat/0000.png").write_bytes(b"changed")
    with pytest.raises(SourceError, match=r"7 bytes, .* when listed") as caught:
        ray_prepare.prepare(source, "in", str(tmp_path / "out"), PrepareConfig(), lambda _: None)
    assert type(caught.value) is SourceError
    assert "\n" not in str(caught.value)


def test_another_dataset_is_not_touched(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    _prepare(trees.write_folder(tmp_path / "a", trees.folder_files(4)), out, PrepareConfig(resolution=16))
    before = _digests(out)
    with pytest.raises(record.DatasetError, match=r"another dataset, its plan differs in .*source"):
        _prepare(trees.write_folder(tmp_path / "b", trees.folder_files(4, classes=("x", "y"))), out, PrepareConfig())
    with pytest.raises(record.DatasetError, match="differs in config"):
        _prepare(str(tmp_path / "a"), out, PrepareConfig(resolution=32))
    assert _digests(out) == before


def test_what_is_missing_is_made_again_and_what_is_stored_is_kept(tmp_path: Path) -> None:
    url, config = (
        trees.write_folder(tmp_path / "in", trees.folder_files(40)),
        PrepareConfig(resolution=16, shard_size=8),
    )
    out = tmp_path / "out"
    _prepare(url, str(out), config)
    before = _digests(str(out))
    inode = (out / "train/shard-000000.tar").stat().st_ino
    in_shard_3 = set(plans.order(config.seed, "train", 40)[24:32].tolist())
    kept = next(name for i, name in enumerate(sorted(trees.folder_files(40))) if i not in in_shard_3)
    # Same name and size, so the same source: only a shard that is made again could notice.
    (tmp_path / "in" / kept).write_bytes(bytes((tmp_path / "in" / kept).stat().st_size))
    for lost in ("dataset.json", "train/index/part-00000.parquet", "train/shard-000003.tar"):
        (out / lost).unlink()
    _prepare(url, str(out), config)
    assert _digests(str(out)) == before
    assert (out / "train/shard-000000.tar").stat().st_ino == inode


def test_the_first_writer_of_a_shard_wins(tmp_path: Path) -> None:
    """A shard that another driver stored is the truth, whatever we would have written: the index follows it."""
    url, config = (
        trees.write_folder(tmp_path / "in", trees.folder_files(16)),
        PrepareConfig(resolution=16, shard_size=8),
    )
    _prepare(url, str(tmp_path / "a"), config)
    source = sources.scan(url)
    record.settle_plan(str(tmp_path / "b"), plans.make(source, config), {"source": url, "code_version": "another"})
    theirs = trees.tar.build([("000000000", {"png": images.encode(np.zeros((16, 16, 3), np.uint8), "png", 1)})])
    storage.put_if_absent(str(tmp_path / "b/train/shard-000000.tar"), theirs)
    lenient = PrepareConfig(resolution=16, shard_size=8, max_corrupt_fraction=0.9)
    summary = _prepare(url, str(tmp_path / "b"), lenient)
    assert summary.samples == {"train": 9}
    assert storage.read(str(tmp_path / "b/train/shard-000000.tar")) == theirs
    assert record.read(str(tmp_path / "b"))[0].lineage["code_version"] == "another"


def test_a_shard_stored_while_ours_was_made_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, out = trees.write_folder(tmp_path / "in", trees.folder_files(4)), str(tmp_path / "out")
    theirs = trees.tar.build([("000000002", {"png": images.encode(np.zeros((16, 16, 3), np.uint8), "png", 1)})])
    storage.put_if_absent(f"{out}/train/shard-000000.tar", theirs)
    monkeypatch.setattr(storage, "stat", lambda _: None)  # it was not there yet when we looked
    source = sources.scan(url)
    maker = ray_prepare._ShardMaker(source.without_items(), out, PrepareConfig(resolution=16))
    made = maker.make(plans.Unit("train", 0, 0, 4), source.items)
    assert made.rows["key"].to_pylist() == ["000000002"]
    assert made.corrupt == 3


def test_on_s3(tmp_path: Path, s3: str) -> None:
    files = trees.folder_files(24)
    config = PrepareConfig(resolution=16, shard_size=10)
    for name, data in files.items():
        storage.put(f"{s3}/in/{name}", data)
    _prepare(f"{s3}/in", f"{s3}/out", config)
    _prepare(trees.write_folder(tmp_path / "in", files), str(tmp_path / "out"), config)
    local, remote = _digests(str(tmp_path / "out")), _digests(f"{s3}/out")
    assert {n: d for n, d in local.items() if n.endswith((".tar", ".parquet"))} == {
        n: d for n, d in remote.items() if n.endswith((".tar", ".parquet"))
    }
    assert len(_samples(f"{s3}/out", "train")) == 24
