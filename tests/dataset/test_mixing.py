"""How many samples a class has and how well they are mixed are counted exactly, in pieces of any size."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import mixing, record
from pipeline.dataset.mixing import LabelTally, tally
from pipeline.dataset.record import DatasetRecord, LabelRuns
from tests.small import make_dataset

labels = st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=40)


def column(values: list[int | None]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.int32())])


@given(st.lists(labels, max_size=5))
def test_pieces_count_as_the_whole(pieces: list[list[int | None]]) -> None:
    whole = [label for piece in pieces for label in piece]
    found = sum((tally(column(piece)) for piece in pieces), LabelTally({}))
    assert found.runs == len(list(itertools.groupby(whole)))
    assert found.counts == Counter(whole)
    assert found.class_counts(range(4)) == tuple(whole.count(label) for label in range(4))
    names = [None if label is None else str(label) for label in whole]
    assert tally(pa.chunked_array([pa.array(names, pa.string())])).label_runs() == found.label_runs()


@pytest.mark.parametrize(
    ("order", "mean", "independent"),
    [([0, 1] * 50, 1.0, 2.0), ([0] * 50 + [1] * 50, 50.0, 2.0), ([0, 0, 0, 1] * 25, 2.0, 8 / 3)],
)
def test_runs_of_known_orders(order: list[int | None], mean: float, independent: float) -> None:
    assert mixing.label_runs([column(order)]) == LabelRuns(mean=mean, independent=independent)


@pytest.mark.parametrize("order", [[], [3, 3, 3], [None, None]])
def test_without_two_classes_nothing_is_said(order: list[int | None]) -> None:
    assert mixing.label_runs([column(order)]) is None


def test_the_record_keeps_it(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path))
    assert made.label_run_ratio("train") == 0.5  # classes in turn
    stored = json.loads((tmp_path / "dataset.json").read_bytes())
    assert stored["splits"]["train"]["label_runs"] == {"independent": 2.0, "mean": 1.0}
    assert stored["splits"]["train"]["class_counts"] == [50, 50]
    assert record.read(str(tmp_path))[0] == made


@pytest.mark.parametrize("counts", [[100], [101, -1], [50.0, 50.0], ["50", "50"], [True, True], {"0": 50}, None, 100])
def test_counts_that_are_no_counts_are_refused(tmp_path: Path, counts: object) -> None:
    make_dataset(str(tmp_path))
    path = tmp_path / "dataset.json"
    stored = json.loads(path.read_bytes())
    stored["splits"]["train"]["class_counts"] = counts
    path.write_text(json.dumps(stored))
    with pytest.raises(record.DatasetError, match=r"dataset\.json: not a dataset record of ganymede"):
        record.read(str(tmp_path))


def test_a_record_that_says_nothing_of_it_is_read(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    path = tmp_path / "dataset.json"
    stored = json.loads(path.read_bytes())
    del stored["shards_url"], stored["splits"]["train"]["label_runs"], stored["splits"]["train"]["class_counts"]
    for part in stored["splits"]["train"]["parts"]:
        for name in ("size_bytes", "footer_bytes", "footer_sha256"):
            del part[name]
    path.write_text(json.dumps(stored))
    old = record.read(str(tmp_path))[0]
    assert isinstance(old, DatasetRecord)
    assert old.label_run_ratio("train") == 1.0
    assert old.class_counts == {}
    from pipeline.dataset.index import open_split

    assert open_split(str(tmp_path), old, "train").rows(25, 75)["key"].to_pylist() == [
        f"{i:09d}" for i in range(25, 75)
    ]
