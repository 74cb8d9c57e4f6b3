"""The report's pictures show the samples that they say they show."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import snapshot
from pipeline.dataset.index import IndexReader
from pipeline.evaluate.duplicates import Copies
from pipeline.evaluate.memorisation import copy_test, shrunk, to_training, within
from pipeline.evaluate.report import pictures
from pipeline.evaluate.report.gallery import Gallery
from pipeline.evaluate.report.pictures import Shown, Subject, galleries
from pipeline.evaluate.samples import Shape, read_samples
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.images import Pixels
from tests.small import CLASSES, make_dataset

COUNT, SIDE = 60, 16
SHAPE = Shape(resolution=SIDE, channels=1)


def shown(url: Path, num_samples: int) -> Shown:
    """All of a dataset, in another order."""
    made = make_dataset(str(url), num_samples=num_samples)
    reader = IndexReader(str(url / "train"), made.splits["train"])
    numbers = np.random.default_rng(0).permutation(num_samples)
    labels = read_samples(reader, np.arange(num_samples), SHAPE).labels[numbers]
    return Shown(reader=reader, numbers=numbers, labels=labels)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """Two sets of which one is the beginning of the other: the nearest training image of each is itself."""
    gen, training = shown(tmp_path / "gen", COUNT), shown(tmp_path / "training", 2 * COUNT)
    pixels = [side.read(range(len(side.numbers)), SHAPE).pixels for side in (gen, training)]
    near, inside = to_training(shrunk(pixels[0]), shrunk(pixels[1])), within(shrunk(pixels[0]))
    found = Copies(
        test=copy_test(near.distance, near.distance),
        num_tested=COUNT,
        training_samples=2 * COUNT,
        training_images=2 * COUNT,
        to_training=near,
        inside=inside,
        repeated_in_reference=0,
        exact_in_training=COUNT,
        exact_inside=0,
    )
    return Subject(reference=training, gen=gen, training=training, copies=found, classes=CLASSES, shape=SHAPE)


@pytest.fixture
def made_by(tmp_path: Path) -> snapshot.Snapshot:
    config = NetworkConfig(z_dim=8, base_width=8, max_width=8)
    shape = ImageShape(resolution=SIDE, channels=1, num_classes=2)
    G, D = build(config, shape, seed=0)
    described = snapshot.SnapshotConfig(
        network=config, shape=shape, classes=CLASSES, cur_nimg=0, precision="fp32", lineage={}
    )
    return snapshot.load(snapshot.save(str(tmp_path), described, G, D))


def tiles(png: bytes, columns: int = 10) -> Pixels:
    """The images of a contact sheet, row by row, the places that are left white too: uint8 [n, R, R, 1]."""
    sheet = np.asarray(Image.open(io.BytesIO(png)))[..., None]
    step = SIDE + pictures._GAP_PX
    assert sheet.shape[1] == columns * step - pictures._GAP_PX
    tops = _tops(sheet)
    return np.stack(
        [sheet[top : top + SIDE, left * step : left * step + SIDE] for top in tops for left in range(columns)]
    )


def _tops(sheet: Pixels) -> list[int]:
    """Where rows of images begin: behind white lines, and at the top."""
    white = (sheet == 255).all(axis=(1, 2))
    return [row for row in range(len(sheet)) if not white[row] and (row == 0 or white[row - 1])]


def by_title(subject: Subject) -> dict[str, Gallery]:
    return {gallery.title: gallery for gallery in galleries(subject)}


def test_real_and_synthetic_side_by_side(subject: Subject) -> None:
    gallery = by_title(subject)["Real and synthetic"]
    assert [picture.caption for picture in gallery.pictures] == list(CLASSES)
    for label, picture in enumerate(gallery.pictures):
        found = tiles(picture.png)
        for side, part in ((subject.reference, found[:10]), (subject.gen, found[10:])):
            rows = np.flatnonzero(side.labels == label)[:10]
            assert np.array_equal(part, side.read(rows, SHAPE).pixels)


def test_each_stands_over_its_nearest_training_image(subject: Subject) -> None:
    first, _ = by_title(subject)["Nearest to training images"].pictures
    found = tiles(first.png)
    assert np.array_equal(found[:10], found[10:])  # since each is a training image
    assert first.caption.startswith("Distances 0.0, 0.0")


def test_what_lies_near_each_other_stands_once(subject: Subject) -> None:
    assert "Nearest to each other" not in by_title(subject)  # the limit is 0: all held-out ones are training images
    limit = with_limit(subject.copies, 1000.0)
    near = by_title(dataclasses.replace(subject, copies=limit))["Nearest to each other"].pictures[0]
    found = tiles(near.png)
    pairs = {frozenset((found[place].tobytes(), found[place + 10].tobytes())) for place in range(10)}
    assert len(pairs) == 10


def with_limit(found: Copies, limit: float) -> Copies:
    return dataclasses.replace(found, test=dataclasses.replace(found.test, limit=limit))


def test_a_snapshot_brings_scores_and_strips(subject: Subject, made_by: snapshot.Snapshot) -> None:
    assert set(by_title(subject)) == {"Real and synthetic", "Nearest to training images"}
    found = by_title(dataclasses.replace(subject, snapshot=made_by))
    best, worst = found["Best and worst by discriminator score"].pictures
    samples = subject.gen.read(range(COUNT), SHAPE)
    scores = pictures._scores_of(made_by, samples.pixels, samples.labels)
    order = np.argsort(scores)
    assert np.array_equal(tiles(best.png)[0], samples.pixels[order[-1]])
    assert np.array_equal(tiles(worst.png)[0], samples.pixels[order[0]])
    strips = found["Between two latents"].pictures
    assert [picture.caption for picture in strips] == list(CLASSES)
    strip = tiles(strips[0].png, columns=8).astype(float)
    steps = abs(np.diff(strip, axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < abs(strip[0] - strip[-1]).mean()


def test_images_are_scored_as_they_were_made(subject: Subject, made_by: snapshot.Snapshot) -> None:
    """Where they are resized for the evaluation, D still sees them at its own size."""
    larger = dataclasses.replace(subject, snapshot=made_by, shape=Shape(resolution=32, channels=3, fit="crop"))
    sheets = [gallery.pictures[0].png for gallery in galleries(larger) if "discriminator" in gallery.title]
    assert len(sheets) == 1
    assert Image.open(io.BytesIO(sheets[0])).size[0] == 10 * (32 + pictures._GAP_PX) - pictures._GAP_PX


def test_stored_scores_are_taken(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = IndexReader.rows

    def with_scores(reader: IndexReader, start: int, stop: int) -> pa.Table:
        found = rows(reader, start, stop)
        return found.append_column("score", pa.array(np.arange(start, stop), pa.float32()))

    monkeypatch.setattr(IndexReader, "rows", with_scores)
    best, worst = by_title(subject)["Best and worst by discriminator score"].pictures
    number = np.argsort(subject.gen.numbers)
    assert np.array_equal(tiles(best.png)[0], subject.gen.read(number[-1:], SHAPE).pixels[0])
    assert np.array_equal(tiles(worst.png)[0], subject.gen.read(number[:1], SHAPE).pixels[0])


def test_without_classes_there_is_one_sheet(subject: Subject) -> None:
    gallery = by_title(dataclasses.replace(subject, classes=()))["Real and synthetic"]
    assert len(gallery.pictures) == 1
    assert len(tiles(gallery.pictures[0].png)) == 40
