"""The card of a generated dataset: what other tools make of it, and that equal runs write equal bytes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import images, snapshot, storage
from pipeline.dataset import record
from pipeline.dataset.record import DatasetRecord, Part
from pipeline.generate import card
from pipeline.generate.plan import GeneratePlan
from tests.generate.test_generate import make_snapshot, plan_of, write_all

LINEAGE = {"cur_nimg": 64, "code_version": "0", "training": {"dataset_digest": "abc", "training_run": "def"}}

_READ = """
import json, sys, warnings
import mlcroissant
dataset = mlcroissant.Dataset(jsonld=sys.argv[1])
assert not dataset.metadata.ctx.issues.errors, dataset.metadata.ctx.issues.report()
rows = [{name: value.decode() if isinstance(value, bytes) else int(value) for name, value in row.items()}
        for row in dataset.records("train")]
print(json.dumps(rows))
"""


def make(folder: Path, classes: tuple[str, ...]) -> tuple[GeneratePlan, DatasetRecord, str]:
    source = snapshot.load(make_snapshot(str(folder / "run"), classes))
    plan, out = plan_of(source), str(folder / "out")
    write_all(out, plan, source)
    names = [f"index/part-{number:05d}.parquet" for number in range(3)]
    parts = tuple(
        Part(name=name, rows=rows, sha256=storage.digest(f"{out}/train/{name}"))
        for name, rows in zip(names, (10, 10, 5), strict=True)
    )
    dataset = DatasetRecord(
        channels=1, resolution=16, image_format="png", classes=classes, splits={"train": parts}, lineage=LINEAGE
    )
    card.write(out, plan, dataset)
    return plan, dataset, out


@pytest.mark.parametrize("classes", [(), ("circle", "square", "star")])
def test_the_croissant_validator_accepts_it_and_reads_the_index(tmp_path: Path, classes: tuple[str, ...]) -> None:
    _, _, out = make(tmp_path, classes)
    command = [sys.executable, "-c", _READ, f"{out}/croissant.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["train/key"] for row in rows] == [f"{i:09d}" for i in range(25)]
    if classes:
        assert [row["train/label"] for row in rows] == [i % 3 for i in range(25)]
    shard = storage.read(f"{out}/train/{rows[7]['train/shard']}")
    image = shard[rows[7]["train/offset"] :][: rows[7]["train/size"]]
    assert images.decode(image, channels=1).pixels.shape == (16, 16, 1)


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    plan, _, out = make(tmp_path, ("circle", "square", "star"))
    text = storage.read(f"{out}/README.md").decode()
    for wanted in (
        "25 synthetic images: 16² grey, png",
        plan.snapshot_digest,
        "| 2 | star | 8 |",
        "in turn",
        "abc",
        "000000..000002",
    ):
        assert wanted in text
    grid = images.decode(storage.read(f"{out}/samples.png"), channels=1).pixels
    assert grid.shape == (3 * 16, 10 * 16, 1)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"class_counts": (15, 10, 0)}, "| classes | 15, 10, 0 of each |"),
        ({"labels": "as-dataset"}, "| classes | in the proportions of the dataset trained on |"),
    ],
)
def test_the_card_says_how_classes_were_chosen(tmp_path: Path, settings: dict[str, Any], how: str) -> None:
    plan, dataset, _ = make(tmp_path, ("circle", "square", "star"))
    config = dataclasses.replace(plan.config, **settings)
    text = card.readme(dataclasses.replace(plan, config=config, dataset_counts=(6, 4, 0)), dataset, "one")
    for wanted in (how, "| 0 | circle | 15 |", "| 1 | square | 10 |", "| 2 | star | 0 |"):
        assert wanted in text


def test_equal_runs_write_equal_cards_and_one_that_is_there_stays(tmp_path: Path) -> None:
    found = [make(tmp_path / name, ("circle", "square", "star")) for name in ("a", "b")]
    for name in record.DESCRIPTIONS:
        first, second = (storage.read(f"{out}/{name}") for _, _, out in found)
        assert first == second
    plan, dataset, out = found[0]
    storage.put(f"{out}/README.md", b"an earlier version's")
    card.write(out, plan, dataset)
    assert storage.read(f"{out}/README.md") == b"an earlier version's"
