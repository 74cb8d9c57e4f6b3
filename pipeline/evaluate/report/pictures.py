"""The report's pictures: contact sheets of the samples that the numbers are about."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import images, philox
from pipeline.dataset.index import IndexReader
from pipeline.evaluate.duplicates import Copies
from pipeline.evaluate.report.gallery import Gallery, Picture
from pipeline.evaluate.samples import Samples, Shape, read_samples
from pipeline.gan.pixels import to_network
from pipeline.gan.sample import sample
from pipeline.images import Pixels
from pipeline.snapshot import Snapshot

_COLUMNS = 10
_CLASSES, _STRIPS, _STRIP_STEPS = 20, 10, 8
_SCORED, _AT_ONCE = 1000, 50
_GAP_PX = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """N samples of a split, in an order that says nothing."""

    reader: IndexReader
    """Of the split."""
    numbers: NDArray[np.int64]
    """In the split, [N]."""
    labels: NDArray[np.int64]
    """[N]; 0 without classes."""

    def read(self, rows: Sequence[int] | NDArray[np.int64], shape: Shape) -> Samples:
        """Some of them, in the order asked for."""
        numbers, back = np.unique(self.numbers[np.asarray(rows, np.int64)], return_inverse=True)
        return read_samples(self.reader, numbers, shape).of(back)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What pictures are made of."""

    reference: Shown
    """Real images that nothing has seen."""
    gen: Shown
    """Synthetic ones."""
    training: Shown
    """Real ones that copies were looked for in."""
    copies: Copies
    """Of `gen` rows in `training` rows."""
    classes: tuple[str, ...]
    """Names by label, where both sides have them; else empty."""
    shape: Shape
    """Of all images."""
    snapshot: Snapshot | None = None
    """What made the synthetic ones, where it is at hand."""


def galleries(subject: Subject) -> tuple[Gallery, ...]:
    """Every gallery that there is something to show for. Raises what reading raises."""
    found = [_by_class(subject), _by_score(subject), _nearest(subject), _repeated(subject), _strips(subject)]
    return tuple(gallery for gallery in found if gallery is not None)


def _by_class(subject: Subject) -> Gallery:
    if not subject.classes:
        pictures = [_pair("All images", "images", [range(2 * _COLUMNS)] * 2, subject)]
    else:
        pictures = []
        for label, name in enumerate(subject.classes[:_CLASSES]):
            rows = [np.flatnonzero(side.labels == label)[:_COLUMNS] for side in (subject.reference, subject.gen)]
            if all(map(len, rows)):
                pictures.append(_pair(name, f"images of {name}", rows, subject))
    text = "Real images above, which G never saw, and synthetic ones below; neither are chosen."
    if len(subject.classes) > _CLASSES:
        text += f" The first {_CLASSES} of {len(subject.classes)} classes."
    return Gallery(title="Real and synthetic", text=text, pictures=tuple(pictures))


def _pair(name: str, what: str, rows: Sequence[Sequence[int] | NDArray[np.int64]], subject: Subject) -> Picture:
    """Rows of the reference above those of the generated images."""
    sides = zip((subject.reference, subject.gen), rows, strict=True)
    return Picture(
        caption=name,
        alt=f"{len(rows[0])} real {what} in the upper rows, {len(rows[1])} synthetic ones in the lower rows",
        png=_sheet([shown.read(some, subject.shape).pixels for shown, some in sides]),
    )


def _by_score(subject: Subject) -> Gallery | None:
    """What D likes best and least, by the scores that were stored with the images or by the snapshot's D."""
    scores = _scores(subject)
    if scores is None:
        return None
    order = np.argsort(scores, kind="stable")
    count = min(2 * _COLUMNS, len(order) // 2)
    chosen = {"Best": order[::-1][:count], "Worst": order[:count]}
    pictures = [
        Picture(
            caption=f"{name}: scores {scores[rows].min():.2f} to {scores[rows].max():.2f}",
            alt=f"The {count} synthetic images that the discriminator scores {name.lower()}",
            png=_sheet([subject.gen.read(rows, subject.shape).pixels]),
        )
        for name, rows in chosen.items()
    ]
    text = f"What the discriminator takes most and least for real, of {len(scores):,} synthetic images."
    return Gallery(title="Best and worst by discriminator score", text=text, pictures=tuple(pictures))


def _scores(subject: Subject) -> NDArray[np.float32] | None:
    numbers = subject.gen.numbers[:_SCORED]
    stored = [subject.gen.reader.rows(int(number), int(number) + 1) for number in numbers[:1]]
    if "score" in stored[0].column_names and stored[0]["score"].null_count == 0:
        scores = [subject.gen.reader.rows(int(number), int(number) + 1)["score"][0].as_py() for number in numbers]
        return np.asarray(scores, np.float32)
    if subject.snapshot is None:
        return None
    made = subject.snapshot.config.shape
    samples = subject.gen.read(range(len(numbers)), Shape(resolution=made.resolution, channels=made.channels))
    return _scores_of(subject.snapshot, samples.pixels, samples.labels)


@torch.no_grad()
def _scores_of(snapshot: Snapshot, pixels: Pixels, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(pixels), _AT_ONCE):
        image = to_network(torch.from_numpy(pixels[start : start + _AT_ONCE]), torch.device("cpu"))
        parts.append(snapshot.D(image, torch.from_numpy(labels[start : start + _AT_ONCE])).float())
    return torch.cat(parts).numpy()


def _nearest(subject: Subject) -> Gallery:
    near = subject.copies.to_training
    rows = np.argsort(near.distance, kind="stable")[: 2 * _COLUMNS]
    pictures = []
    for part in np.split(rows, [_COLUMNS]):
        gen, training = subject.gen.read(part, subject.shape), subject.training.read(near.place[part], subject.shape)
        distances = ", ".join(f"{distance:.1f}" for distance in near.distance[part])
        keys, theirs = (", ".join(samples.keys) for samples in (gen, training))
        pictures.append(
            Picture(
                caption=f"Distances {distances}. Keys {keys}; of the training images {theirs}.",
                alt=f"{len(part)} synthetic images above, the training image that is nearest to each below",
                png=_sheet([gen.pixels, training.pixels]),
            )
        )
    text = (
        "Synthetic images above, each over the training image that looks most like it, mirrored and shifted ones too. "
        f"Distances are of 0 to 255; of {subject.copies.num_tested:,} held-out images "
        f"{subject.copies.test.near_held_out} come as near as {subject.copies.test.limit:.1f}."
    )
    return Gallery(title="Nearest to training images", text=text, pictures=tuple(pictures))


def _repeated(subject: Subject) -> Gallery | None:
    inside = subject.copies.inside
    rows = np.argsort(inside.distance, kind="stable")
    rows = rows[inside.distance[rows] < subject.copies.test.limit]
    rows = rows[(rows < inside.place[rows]) | (inside.place[inside.place[rows]] != rows)][:_COLUMNS]  # a pair once
    if not len(rows):
        return None
    pair = [subject.gen.read(some, subject.shape).pixels for some in (rows, inside.place[rows])]
    picture = Picture(
        caption="Distances " + ", ".join(f"{distance:.1f}" for distance in inside.distance[rows]),
        alt=f"{len(rows)} synthetic images above, the other synthetic image that is nearest to each below",
        png=_sheet(pair),
    )
    text = "The synthetic images that are nearest to each other: above and below are two of the same set."
    return Gallery(title="Nearest to each other", text=text, pictures=(picture,))


def _strips(subject: Subject) -> Gallery | None:
    """From one latent to another, a row each: between two good images lie good images where G has learnt a domain."""
    if subject.snapshot is None:
        return None
    classes = subject.snapshot.config.classes
    names = list(classes[:_STRIPS]) or [f"strip {number + 1}" for number in range(_STRIPS // 2)]
    pictures = tuple(
        Picture(
            caption=name,
            alt=f"{_STRIP_STEPS} images that G makes on the way from one latent to another, {name}",
            png=_sheet([_strip(subject.snapshot, number, number if classes else 0)], _STRIP_STEPS),
        )
        for number, name in enumerate(names)
    )
    text = (
        "What G makes on the way from one latent to another. Jumps and repeats say that it has learnt images by heart."
    )
    return Gallery(title="Between two latents", text=text, pictures=pictures)


def _strip(snapshot: Snapshot, number: int, label: int) -> Pixels:
    """Along the arc, on which each point is as likely as its ends (White 2016, section 2)."""
    key = philox.stream_key(0, "evaluate/strips")
    ends = philox.normals(key, np.array([2 * number, 2 * number + 1]), snapshot.config.network.z_dim)
    angle = np.linspace(0, math.pi / 2, _STRIP_STEPS, dtype=np.float32)[:, None]
    z = torch.from_numpy(np.cos(angle) * ends[:1] + np.sin(angle) * ends[1:])
    labels = torch.full((_STRIP_STEPS,), label)
    return sample(snapshot.G_ema, z, labels, precision="fp32").numpy()


def _sheet(bands: Sequence[Pixels], columns: int = _COLUMNS) -> bytes:
    """A PNG of bands of images, uint8 [n, R, R, C], in rows of `columns`, a gap between bands."""
    rows = list(_rows(bands, columns))
    return images.encode(np.concatenate(rows, axis=0), "png", 100)


def _rows(bands: Sequence[Pixels], columns: int) -> Iterator[Pixels]:
    for number, band in enumerate(bands):
        count, side, _, channels = band.shape
        if number:
            yield np.full((_GAP_PX, columns * (side + _GAP_PX) - _GAP_PX, channels), 255, np.uint8)
        for start in range(0, count, columns):
            row = np.full((side + _GAP_PX, columns * (side + _GAP_PX), channels), 255, np.uint8)
            for place, image in enumerate(band[start : start + columns]):
                left = place * (side + _GAP_PX)
                row[:side, left : left + side] = image
            yield row[:, :-_GAP_PX]
