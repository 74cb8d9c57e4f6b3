"""Folders and zips of images: which split and class a file belongs to, and hostile archives."""

import errno
import zipfile
from pathlib import Path

import pytest

from pipeline.dataset.label import LabelError
from pipeline.prepare import sources, tree
from pipeline.prepare.sources import ItemError, Source, SourceError
from tests.prepare import trees


def _read_all(source: Source) -> list[sources.Found]:
    return [sources.read_item(source, item) for item in source.items.to_pylist()]


def _labels(source: Source) -> dict[str, int]:
    return dict(zip(source.items["name"].to_pylist(), source.items["label"].to_pylist(), strict=True))


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
    with pytest.raises(LabelError, match="class-names"):
        sources.scan(url, class_names=("dog", "bird"))


def test_changed_file_stops(tmp_path: Path) -> None:
    source = sources.scan(trees.write_folder(tmp_path, trees.folder_files(1)))
    (tmp_path / "cat/0000.png").write_bytes(b"other")
    with pytest.raises(SourceError, match="when listed"):
        _read_all(source)


def test_zip_is_read_like_its_folder(tmp_path: Path) -> None:
    files = trees.folder_files(5, splits=("train", "test"))
    url = trees.write_zip(tmp_path / "pets.zip", files | {"notes.txt": b"x"})
    source = sources.scan(url)
    assert (source.kind, source.classes, source.ignored) == ("zip", ("cat", "dog"), 1)
    assert source.counts() == {"test": 5, "train": 5}
    assert sorted(_read_all(source)) == sorted(files.values())


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "cat/../../evil.png", "cat\\evil.png"])
def test_zip_slip_names_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(name, trees.image_bytes(0))
    with pytest.raises(SourceError, match=r"evil\.png.*leaves the archive"):
        sources.scan(str(tmp_path / "evil.zip"))


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


def test_a_zip_member_of_a_kind_that_cannot_be_unpacked_is_told(tmp_path: Path) -> None:
    """Flag bit 5, patched data: Python opens such a zip and stumbles at the member."""
    path = tmp_path / "patched.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", b"123")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 0x20
    path.write_bytes(data)
    with pytest.raises(ItemError, match="patched"):
        tree.read_member(str(path), "cat/1.png")


def test_zip_member_over_the_cap_is_one_bad_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.scan(trees.write_zip(tmp_path / "a.zip", trees.folder_files(1)))
    monkeypatch.setattr(sources, "MAX_ITEM_BYTES", 10)
    with pytest.raises(ItemError, match="more than the 10 allowed"):
        _read_all(source)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_member_is_a_bad_item_however_it_is_packed(tmp_path: Path, method: int) -> None:
    """Or whole all the same: LZMA's header has bytes that nobody reads."""
    whole, refused = bytes(range(256)) * 4, 0
    for offset in range(0, 60, 3):
        path = tmp_path / f"{method}-{offset}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("cat/1.png", whole)
            place = archive.getinfo("cat/1.png").header_offset
        data = bytearray(path.read_bytes())
        start = place + 30 + len("cat/1.png")
        data[start + offset] ^= 0xFF
        path.write_bytes(data)
        try:
            assert tree.read_member(str(path), "cat/1.png") == whole
        except ItemError:
            refused += 1
    assert refused >= 15


def test_a_failing_disk_is_not_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/1.png", b"x")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    with pytest.raises(SourceError, match="cannot be read: Input/output error"):
        tree.read_member(str(tmp_path / "a.zip"), "cat/1.png")
