"""Each kind of source: what is listed, what is read, and one clear line for what cannot be."""

import collections
import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import images, storage
from pipeline.dataset.tar import TarError
from pipeline.prepare import sources
from pipeline.prepare.sources import ItemError, Source, SourceError
from tests.prepare import trees


def _read_all(source: Source) -> list[bytes | np.ndarray]:
    return [sources.read_item(source.kind, source.url, item) for item in source.items.to_pylist()]


def _labels(source: Source) -> dict[str, int]:
    return dict(zip(source.items["name"].to_pylist(), source.items["label"].to_pylist(), strict=True))


@pytest.fixture
def fresh_caches() -> None:
    """Forget the open archives and IDX files of other tests."""
    sources._zip.cache_clear()
    sources._idx_images.cache_clear()


def test_folder_of_class_folders(tmp_path: Path) -> None:
    files = trees.folder_files(6)
    clutter = {"readme.txt": b"x", ".hidden/1.png": b"x", "__MACOSX/cat/1.png": b"x", "cat/.DS_Store": b"x"}
    url = trees.write_folder(tmp_path, files | clutter)
    source = sources.scan(url)
    assert (source.kind, source.classes, source.counts(), source.ignored) == ("folder", ("cat", "dog"), {"train": 6}, 1)
    assert _labels(source) == {name: int(name.startswith("dog")) for name in files}
    assert _read_all(source) == [files[name] for name in source.items["name"].to_pylist()]


def test_splits_are_kept_and_wrapping_folders_ignored(tmp_path: Path) -> None:
    files = trees.folder_files(4, splits=("pets/train", "pets/Validation", "pets/test"))
    source = sources.scan(trees.write_folder(tmp_path, files))
    assert source.counts() == {"test": 4, "train": 4, "val": 4}
    assert source.classes == ("cat", "dog")


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = sources.scan(trees.write_folder(tmp_path, trees.folder_files(3, classes=())))
    assert (source.classes, source.counts()) == ((), {"train": 3})
    assert source.items["label"].null_count == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [("stray.png", "in a class folder"), ("train/cat/1.png", "below a split folder")],
)
def test_mixed_layouts_are_refused(tmp_path: Path, extra: str, message: str) -> None:
    url = trees.write_folder(tmp_path, trees.folder_files(2) | {extra: trees.image_bytes(9)})
    with pytest.raises(SourceError, match=f"mixed: .*{message}"):
        sources.scan(url)


def test_class_names_order_the_folders_or_are_refused(tmp_path: Path) -> None:
    url = trees.write_folder(tmp_path, trees.folder_files(2))
    source = sources.scan(url, class_names=("dog", "cat"))
    assert source.classes == ("dog", "cat")
    assert _labels(source) == {"cat/0000.png": 1, "dog/0001.png": 0}
    with pytest.raises(SourceError, match="class-names"):
        sources.scan(url, class_names=("dog", "bird"))


def test_digest_follows_names_sizes_and_labels_only(tmp_path: Path) -> None:
    files = trees.folder_files(4)
    first = sources.scan(trees.write_folder(tmp_path / "a", files))
    moved = sources.scan(trees.write_folder(tmp_path / "b", files))
    longer = sources.scan(trees.write_folder(tmp_path / "c", files | {"cat/0000.png": files["cat/0000.png"] + b"x"}))
    renamed = sources.scan(trees.write_folder(tmp_path / "d", {n.replace("dog", "fox"): d for n, d in files.items()}))
    assert first.digest == moved.digest
    assert len({first.digest, longer.digest, renamed.digest}) == 3


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


def test_changed_file_stops(tmp_path: Path) -> None:
    source = sources.scan(trees.write_folder(tmp_path, trees.folder_files(1)))
    (tmp_path / "cat/0000.png").write_bytes(b"other")
    with pytest.raises(SourceError, match="when listed"):
        _read_all(source)


# ------------------------------------------------------------------------------------------------------ zip


@pytest.mark.usefixtures("fresh_caches")
def test_zip_is_read_like_its_folder(tmp_path: Path) -> None:
    files = trees.folder_files(5, splits=("train", "test"))
    url = trees.write_zip(tmp_path / "pets.zip", files | {"notes.txt": b"x"})
    source = sources.scan(url)
    assert (source.kind, source.classes, source.ignored) == ("zip", ("cat", "dog"), 1)
    assert source.counts() == {"test": 5, "train": 5}
    assert sorted(_read_all(source)) == sorted(files.values())


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "cat/../../evil.png", "cat\\evil.png"])
def test_zip_slip_names_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(name, trees.image_bytes(0))
    with pytest.raises(SourceError, match=r"evil\.png.*leaves the archive"):
        sources.scan(str(tmp_path / "evil.zip"))


@pytest.mark.usefixtures("fresh_caches")
def test_damaged_and_encrypted_zips(tmp_path: Path) -> None:
    url = trees.write_zip(tmp_path / "a.zip", trees.folder_files(4))
    data = bytearray(Path(url).read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="no readable zip"):
        sources.scan(str(tmp_path / "cut.zip"))
    body = bytearray(data)
    body[body.index(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "flip.zip").write_bytes(body)
    flipped = sources.scan(str(tmp_path / "flip.zip"))
    with pytest.raises(ItemError, match="CRC"):
        _read_all(flipped)
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(SourceError, match="encrypted"):
        sources.scan(str(tmp_path / "locked.zip"))


@pytest.mark.usefixtures("fresh_caches")
def test_zip_member_over_the_cap_is_one_bad_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.scan(trees.write_zip(tmp_path / "a.zip", trees.folder_files(1)))
    monkeypatch.setattr(sources, "MAX_ITEM_BYTES", 10)
    with pytest.raises(ItemError, match="more than the 10 allowed"):
        _read_all(source)


# ------------------------------------------------------------------------------------------------------ IDX


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path: Path, packed: bool) -> None:
    source = sources.scan(trees.write_idx(tmp_path, train=25, test=12, packed=packed), class_names=tuple("abcdefghij"))
    assert (source.kind, source.counts(), source.classes) == ("idx", {"test": 12, "train": 25}, tuple("abcdefghij"))
    for item, pixels in zip(source.items.to_pylist(), _read_all(source), strict=True):
        number = int(item["name"].rpartition("#")[2])
        assert isinstance(pixels, np.ndarray)
        assert pixels.shape == (28, 28, 1)
        assert pixels.max() == number + 1
        assert item["label"] == number % 10


def test_idx_identity_is_its_content_not_its_packing(tmp_path: Path) -> None:
    digests = [sources.scan(trees.write_idx(tmp_path / str(p), 9, 3, packed=p)).digest for p in (True, False)]
    assert digests[0] == digests[1]
    changed = Path(trees.write_idx(tmp_path / "c", 9, 3, packed=False)) / "train-images-idx3-ubyte"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x07")
    assert sources.scan(str(tmp_path / "c")).digest != digests[0]


@pytest.mark.usefixtures("fresh_caches")
def test_broken_idx_files(tmp_path: Path) -> None:
    images_name, labels_name = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"

    def broken(case: str, name: str, data: bytes | None) -> str:
        root = Path(trees.write_idx(tmp_path / case, 9, 3))
        (root / name).unlink() if data is None else (root / name).write_bytes(data)
        return str(root)

    whole = (Path(trees.write_idx(tmp_path / "whole", 9, 3)) / images_name).read_bytes()
    raw = gzip.decompress(whole)
    huge = struct.pack(">IIII", 0x803, 2**31, 2**15, 28)
    for case, name, data, message in [
        ("magic", images_name, gzip.compress(b"\0\0\x0d\3" + raw[4:]), "not an IDX file"),
        ("labels", labels_name, gzip.compress(struct.pack(">II", 0x801, 8) + bytes(8)), "9 images and 8 labels"),
        ("pair", labels_name, None, "no labels file"),
        ("cut", images_name, gzip.compress(raw[:-5]), "truncated"),
        ("padded", images_name, gzip.compress(raw + b"x"), "padded"),
        ("cut-gzip", images_name, whole[: len(whole) // 2], "cannot decompress"),
        ("no-gzip", images_name, b"hello", "cannot decompress"),
        ("huge", images_name, gzip.compress(huge), "more than are allowed"),
    ]:
        with pytest.raises(SourceError, match=message):
            sources.scan(broken(case, name, data))


# ----------------------------------------------------------------------------------------------- WebDataset


@pytest.mark.parametrize(("label", "field"), [("cls", "cls"), ("json", "json:kind"), ("folder", "folder")])
def test_webdataset_labels(tmp_path: Path, label: str, field: str) -> None:
    url = trees.write_tars(tmp_path, 6, ("a.tar", "b.tar"), label)
    source = sources.scan(url, label_field=field)
    assert (source.kind, source.counts()) == ("webdataset", {"train": 12})
    assert source.classes == (("0", "1") if label == "cls" else ("cat", "dog"))
    assert collections.Counter(source.items["label"].to_pylist()) == {0: 6, 1: 6}
    assert [images.decode(data, channels=3).pixels.shape for data in _read_all(source)] == [(20, 24, 3)] * 12


def test_webdataset_splits_and_missing_labels(tmp_path: Path) -> None:
    url = trees.write_tars(tmp_path / "s", 3, ("train/a.tar", "test/a.tar"))
    assert sources.scan(url).counts() == {"test": 3, "train": 3}
    plain = trees.write_tars(tmp_path / "p", 3, ("a.tar",), label="none")
    assert sources.scan(plain).classes == ()
    with pytest.raises(SourceError, match="no label at folder"):
        sources.scan(plain, label_field="folder")
    with pytest.raises(SourceError, match="mixed"):
        sources.scan(trees.write_tars(tmp_path / "m", 3, ("train/a.tar", "b.tar")))


def test_cut_tar_is_refused(tmp_path: Path) -> None:
    url = trees.write_tars(tmp_path, 3, ("a.tar",))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:-900])
    with pytest.raises(TarError, match="truncated"):
        sources.scan(url)


def test_more_labels_than_class_names(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="labels 0 … 1, and 1 class names"):
        sources.scan(trees.write_tars(tmp_path, 2, ("a.tar",)), class_names=("only",))
