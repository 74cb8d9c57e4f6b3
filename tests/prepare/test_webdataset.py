"""Foreign WebDataset shards: labels, splits, and tars that are cut."""

import collections
from pathlib import Path

import pytest

from pipeline import images
from pipeline.dataset.label import LabelError
from pipeline.dataset.tar import TarError
from pipeline.prepare import sources
from pipeline.prepare.sources import Source, SourceError
from tests.prepare import trees


def _read_all(source: Source) -> list[sources.Found]:
    return [sources.read_item(source, item) for item in source.items.to_pylist()]


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
    with pytest.raises(LabelError, match="labels 0 … 1, and 1 class names"):
        sources.scan(trees.write_tars(tmp_path, 2, ("a.tar",)), class_names=("only",))
