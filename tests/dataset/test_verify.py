"""A stored dataset against its index: every way of damaging it is told, with the place."""

import dataclasses
import os
from pathlib import Path

import pytest

from pipeline import snapshot, storage
from pipeline.dataset import part, record, verify
from pipeline.dataset.record import DatasetRecord, Part
from tests.generate.test_generate import make_snapshot, plan_of, write_all
from tests.small import make_dataset, shard_bytes


@pytest.fixture
def url(tmp_path: Path) -> str:
    make_dataset(str(tmp_path / "data"))
    record.settle_plan(str(tmp_path / "plan"), {}, {})
    os.link(tmp_path / "plan" / record.PLAN_NAME, tmp_path / "data" / record.PLAN_NAME)
    return str(tmp_path / "data")


def problems(url: str, dataset: DatasetRecord | None = None) -> list[str]:
    dataset = dataset or record.read(url)[0]
    found = [verify.check_part(url, dataset, "train", listed) for listed in dataset.splits["train"]]
    return verify.check_whole(url, found)


def shard(url: str, number: int = 0) -> Path:
    return Path(url) / "train" / f"shard-{number:06d}.tar"


def test_nothing_is_wrong_with_what_was_written(url: str) -> None:
    assert problems(url) == []


def test_a_changed_pixel_is_told(url: str) -> None:
    """Another image of the same size and place, whole in itself."""
    other = shard_bytes(0, 30, 16, label_run=1)
    first = shard_bytes(1000, 30, 16)
    assert other != first
    shard(url).write_bytes(first)
    (problem, *_) = problems(url)
    assert "shard-000000.tar" in problem


@pytest.mark.parametrize("kind", [".parquet", ".tar"])
def test_a_store_that_is_away_says_nothing_of_what_it_holds(
    url: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between two reads, which no real store can be told to do."""
    read = storage.read

    def read_or_not(url: str) -> bytes:
        if url.endswith(kind):
            raise storage.StorageUnavailableError(f"no answer for {url}")
        return read(url)

    dataset = record.read(url)[0]
    monkeypatch.setattr(storage, "read", read_or_not)
    with pytest.raises(storage.StorageUnavailableError):
        problems(url, dataset)


@pytest.mark.parametrize("cut", [0, 511, 512, 700, -1])
def test_a_cut_is_told(url: str, cut: int) -> None:
    data = shard(url, 1).read_bytes()
    shard(url, 1).write_bytes(data[:cut])
    (problem,) = problems(url)
    assert "shard-000001.tar" in problem


def test_every_changed_byte_of_an_image_is_told(url: str) -> None:
    """PNG's own checksum or the digest of the pixels."""
    row = record.read(url)[0].splits["train"][0]
    table = verify._rows(f"{url}/train/{row.name}", row)
    data = bytearray(shard(url).read_bytes())
    place, size = table["offset"][0].as_py(), table["size"][0].as_py()
    for offset in range(place, place + size, 7):
        changed = bytearray(data)
        changed[offset] ^= 0x10
        shard(url).write_bytes(changed)
        assert len(problems(url)) == 1


def test_a_missing_shard_and_a_missing_part(url: str) -> None:
    shard(url, 2).unlink()
    (problem,) = problems(url)
    assert "shard-000002.tar" in problem
    (Path(url) / "train" / "index" / "part-00000.parquet").unlink()
    assert any("part-00000.parquet" in one for one in problems(url))


def test_a_changed_part_is_told(url: str) -> None:
    path = Path(url) / "train" / "index" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    (problem,) = problems(url)
    assert "part-00000.parquet" in problem


def test_swapped_shards_are_told(url: str) -> None:
    one, other = shard(url, 0).read_bytes(), shard(url, 1).read_bytes()
    shard(url, 0).write_bytes(other)
    shard(url, 1).write_bytes(one)
    assert {problem.split("train/")[1][:16] for problem in problems(url)} == {"shard-000000.tar", "shard-000001.tar"}


def test_a_sample_that_the_index_does_not_know_is_told(url: str) -> None:
    shard(url).write_bytes(shard_bytes(0, 31, 16))  # the first 30 lie where they lay
    assert problems(url) == ["train/shard-000000.tar: 31 samples, 30 in the index"]


def test_a_sample_that_only_the_index_knows_is_told(url: str) -> None:
    shard(url).write_bytes(shard_bytes(0, 29, 16))
    (first, _) = problems(url)
    assert "1 samples of the index are not in it, e.g. 000000029" in first


def test_rows_listed_twice_are_told(url: str) -> None:
    dataset = record.read(url)[0]
    first, second = dataset.splits["train"]
    rows = verify._rows(f"{url}/train/{first.name}", first)
    path = Path(url) / "train" / first.name
    path.write_bytes(part.encode_part([rows, rows]))
    twice = part.describe_part(first.name, path.read_bytes())
    changed = dataclasses.replace(dataset, splits={"train": (twice, second)})
    assert any("keys are not in order, or one is there twice" in one for one in problems(url, changed))


def test_parts_listed_twice_or_in_another_order_are_told(url: str) -> None:
    dataset = record.read(url)[0]
    first, second = dataset.splits["train"]
    for parts in ((first, first, second), (second, first)):
        changed: tuple[Part, ...] = parts
        assert any(
            "before the last one's end" in one
            for one in problems(url, dataclasses.replace(dataset, splits={"train": changed}))
        )


def test_generated_images_are_as_many_as_were_meant(tmp_path: Path) -> None:
    source = snapshot.load(make_snapshot(str(tmp_path / "run")))
    plan, out = plan_of(source), str(tmp_path / "out")
    record.settle_plan(out, plan.to_dict(), {})
    write_all(out, plan, source)
    parts = tuple(
        Part(name=f"index/part-{number:05d}.parquet", rows=rows, sha256=record.storage.digest(f"{out}/train/{name}"))
        for number, rows in enumerate((10, 10, 5))
        for name in [f"index/part-{number:05d}.parquet"]
    )
    dataset = DatasetRecord(
        channels=1, resolution=16, image_format="png", classes=source.config.classes, splits={"train": parts}
    )
    assert problems(out, dataset) == []
    fewer = dataclasses.replace(dataset, splits={"train": parts[:2]})
    assert problems(out, fewer) == [f"{out}: 20 images, and 25 were meant"]
    unclassed = dataclasses.replace(dataset, classes=())
    assert any("label 2, and there are 0 classes" in one for one in problems(out, unclassed))
