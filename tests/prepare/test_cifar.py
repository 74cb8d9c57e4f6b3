"""CIFAR's python version: images, classes and splits, and folders that are not whole."""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.prepare import cifar, sources
from pipeline.prepare.sources import Source, SourceError
from tests.prepare import trees


def _archive(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-py/") -> str:
    """A .tar.gz as the official ones are."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def _files(url: str) -> dict[str, bytes]:
    return {entry.name: storage.read(f"{url}/{entry.name}") for entry in storage.list_entries(url)}


def _check_cifar10(source: Source) -> None:
    assert (source.kind, source.counts(), source.ignored) == ("cifar", {"test": 4, "train": 20}, 1)
    assert source.classes[0] == "airplane"
    assert len(source.classes) == 10
    red = []
    for item in source.items.to_pylist():
        pixels = sources.read_item(source, item)
        assert isinstance(pixels, np.ndarray)
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        assert (pixels[:, :, 0] == pixels[0, 0, 0]).all()
        assert (pixels[:, :, 1] == np.arange(32)[:, None]).all()
        assert (pixels[:, :, 2] == np.arange(32)[None, :]).all()
        assert item["label"] == pixels[0, 0, 0] % 10
        red.append((item["split"], int(pixels[0, 0, 0])))
    assert red == [("test", i) for i in range(20, 24)] + [("train", i) for i in range(20)]


def test_cifar10(tmp_path: Path) -> None:
    _check_cifar10(sources.scan(trees.write_cifar10(tmp_path)))


def test_the_official_archive_and_the_folder_above_are_the_same_source(tmp_path: Path) -> None:
    url = trees.write_cifar10(tmp_path / "a/cifar-10-batches-py")
    packed = sources.scan(_archive(tmp_path / "cifar-10-python.tar.gz", _files(url)))
    _check_cifar10(packed)
    above = sources.scan(str(tmp_path / "a"))
    assert packed.digest == above.digest == sources.scan(url).digest


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    source = sources.scan(trees.write_cifar100(tmp_path))
    assert (source.classes, source.counts()) == (("apple", "bear", "crab"), {"test": 12, "train": 12})
    assert source.items["label"].to_pylist() == [i % 3 for i in range(12)] * 2


def test_class_names_of_the_user(tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    assert sources.scan(trees.write_cifar10(tmp_path), class_names=names).classes == names


def test_one_split_is_enough(tmp_path: Path) -> None:
    url = trees.write_cifar10(tmp_path)
    (tmp_path / "test_batch").unlink()
    assert sources.scan(url).counts() == {"train": 20}


def test_identity_is_content(tmp_path: Path) -> None:
    url = trees.write_cifar10(tmp_path)
    first = sources.scan(url)
    data = bytearray((tmp_path / "data_batch_3").read_bytes())
    data[len(data) // 2] ^= 1  # of a pixel
    (tmp_path / "data_batch_3").write_bytes(data)
    cifar._load.cache_clear()
    assert sources.scan(url).digest != first.digest


def test_resaved_by_python_3(tmp_path: Path) -> None:
    url = trees.write_cifar10(tmp_path)
    for number in range(1, 6):
        batch = {key.decode(): value for key, value in trees.cifar_batch(4 * number - 4, 4, 10).items()}
        (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps(batch, 4))
    _check_cifar10(sources.scan(url))


def test_on_s3(tmp_path: Path, s3: str) -> None:
    for name, data in _files(trees.write_cifar10(tmp_path)).items():
        storage.put(f"{s3}/cifar/{name}", data)
    _check_cifar10(sources.scan(f"{s3}/cifar"))


# ------------------------------------------------------------------------------------------------- bad input


def _batch(**changes: object) -> bytes:
    batch = trees.cifar_batch(0, 4, 10)
    return trees.python2_pickle(batch | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data_batch_2", None, "has data_batch_1, .* and lacks data_batch_2"),
        ("batches.meta", None, r"has no batches\.meta"),
        ("data_batch_2", b"", "data_batch_2: not a whole pickle"),
        ("data_batch_2", _batch()[:-500], "data_batch_2: not a whole pickle"),
        ("data_batch_2", trees.python2_pickle([1]), "holds a list where CIFAR has a dict"),
        ("data_batch_2", _batch(data=np.zeros((4, 3071), np.uint8)), r"data is \(4, 3071\), .* uint8 \[n, 3072\]"),
        ("data_batch_2", _batch(data=np.zeros((0, 3072), np.uint8)), r"data is \(0, 3072\)"),
        ("data_batch_2", _batch(data=np.zeros((4, 3072), np.int8)), "an array of i1, not of bytes"),
        ("data_batch_2", _batch(data=b"x"), "data is bytes"),
        ("data_batch_2", _batch(labels=[1, 2, 3]), "4 images and 3 labels"),
        ("data_batch_2", _batch(labels=[1, 2, 3, 10]), "data_batch_2: labels 1 … 10, and there are 10 class names"),
        ("data_batch_2", _batch(labels=[1, 2, 3, -1]), "labels -1 … 3"),
        ("data_batch_2", _batch(labels=[1, 2, 3, b"4"]), "labels is no list of numbers"),
        ("data_batch_2", _batch(labels=b"0123"), "labels is no list of numbers"),
        ("batches.meta", trees.python2_pickle({b"label_names": [b"a", b"a"]}), "no list of different names"),
        ("batches.meta", trees.python2_pickle({b"label_names": [b"a", 1]}), "no list of different names"),
        ("batches.meta", trees.python2_pickle({b"names": [b"a"]}), "no list of different names"),
        ("other/test_batch", b"x", "CIFAR files in 2 folders"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    url = trees.write_cifar10(tmp_path)
    if data is None:
        (tmp_path / name).unlink()
    else:
        trees.write_folder(tmp_path, {name: data})
    with pytest.raises(SourceError, match=message) as caught:
        sources.scan(url)
    assert "\n" not in str(caught.value)


def test_no_batches_beside_meta(tmp_path: Path) -> None:
    url = trees.write_cifar10(tmp_path)
    for path in tmp_path.glob("*_batch*"):
        path.unlink()
    with pytest.raises(SourceError, match="no batches"):
        sources.scan(url)


def test_a_batch_that_calls_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    url = trees.write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}, 2))
    with pytest.raises(SourceError, match=r"test_batch: asks for posix\.system.* nothing was executed"):
        sources.scan(url)
    assert not (tmp_path / "executed").exists()


def test_a_batch_over_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = trees.write_cifar10(tmp_path)
    monkeypatch.setattr(cifar, "MAX_BATCH_BYTES", 1000)
    with pytest.raises(SourceError, match=r"data_batch_1: .* more than the 1000"):
        sources.scan(url)


def test_archives_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _archive(tmp_path / "a.tar.gz", _files(trees.write_cifar10(tmp_path / "in")))
    data = Path(whole).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.tar.gz").write_bytes(b"hello")
    (tmp_path / "no-tar.tar.gz").write_bytes(gzip.compress(b"x" * 2000))
    _archive(tmp_path / "photos.tgz", {"1.png": trees.image_bytes(1)})
    for name, message in [
        ("cut.tar.gz", "no readable"),
        ("text.tar.gz", "no readable"),
        ("no-tar.tar.gz", "no readable"),
        ("photos.tgz", "no CIFAR batches; of another archive name the unpacked folder"),
    ]:
        with pytest.raises(SourceError, match=message):
            sources.scan(str(tmp_path / name))
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(SourceError, match="unpacks to more than 1000"):
        sources.scan(whole)
