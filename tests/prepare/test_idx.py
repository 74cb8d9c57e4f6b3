"""IDX files: pixels and labels as they are, and files that are damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.prepare import sources
from pipeline.prepare.sources import Source, SourceError
from tests.prepare import trees


def _read_all(source: Source) -> list[sources.Found]:
    return [sources.read_item(source, item) for item in source.items.to_pylist()]


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
