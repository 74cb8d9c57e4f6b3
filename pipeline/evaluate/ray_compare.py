"""The comparisons of an evaluation as Ray tasks: metrics of each set and class, nearest images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipeline.evaluate import duplicates, memorisation, metrics
from pipeline.evaluate.duplicates import Copies
from pipeline.evaluate.jackknife import Estimate
from pipeline.evaluate.memorisation import Neighbours
from pipeline.evaluate.metrics import Described
from pipeline.evaluate.ray_spread import spread
from pipeline.images import Pixels

_ROWS = 2500
"""Images of a task that looks for the nearest training images."""
Estimates = Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is compared."""

    reference: Described
    """Real images that nothing has seen."""
    others: Mapping[str, Described]
    """Sets to compare with it, by name; "synthetic" is one, and "real" another."""
    num_classes: int
    """Of both the reference and the synthetic set; 0: nothing to compare by class."""
    gen: Pixels
    """The synthetic images, `reduced`, [N, S, S, C]."""
    held_out: Pixels
    """Those of the reference, [N, S, S, C]."""
    training: Pixels
    """Images that copies are looked for in, [M, S, S, C]."""
    training_images: int
    """Of so many that there are."""
    alike: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Rows of the reference and of the synthetic set that the test for copies compares, equally many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfClass:
    """What was found of one class."""

    num_samples: int
    """Of each set."""
    metrics: Estimates
    """Of the synthetic images."""
    real_fid: Estimate
    """Of as many real ones of "real": FID depends on how many there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What was found."""

    others: Mapping[str, Estimates]
    """By name of the set."""
    classes: Mapping[int, OfClass]
    """By label."""
    copies: Copies


def compared(subject: Subject, on_progress: Callable[[int, int], None] = lambda *_: None) -> Compared:
    """All of it; needs a running Ray. `on_progress` hears how many more comparisons are done, and of how many."""
    reference, known = ray.put(subject.reference), ray.put(memorisation.shrunk(subject.training))
    small = {"gen": memorisation.shrunk(subject.gen), "held_out": memorisation.shrunk(subject.held_out)}
    work: dict[Any, tuple[Any, ...]] = {}
    for side, images in small.items():
        for number, part in enumerate(np.split(images, range(_ROWS, len(images), _ROWS))):
            work["to_training", side, number] = (memorisation.to_training, part, known)
        work["within", side] = (memorisation.within, images)
    for name, other in subject.others.items():
        work["other", name] = (metrics.compare, reference, other)
    sides = [subject.reference, subject.others["synthetic"], subject.others["real"]]
    classes = metrics.of_classes(sides, subject.num_classes)
    for label, (of_reference, gen, real) in classes.items():
        work["class", label] = (metrics.compare, of_reference, gen)
        work["real class", label] = (metrics.fid_of, of_reference, real)
    found = spread(work, lambda _: on_progress(1, len(work)))
    near = {side: _joined([found[key] for key in work if key[:2] == ("to_training", side)]) for side in small}
    return Compared(
        others={name: found["other", name] for name in subject.others},
        classes={
            label: OfClass(
                num_samples=len(of_class[0].labels),
                metrics=found["class", label],
                real_fid=found["real class", label],
            )
            for label, of_class in classes.items()
        },
        copies=_copies(subject, near, {side: found["within", side] for side in small}),
    )


def _joined(parts: Sequence[Neighbours]) -> Neighbours:
    return Neighbours(
        distance=np.concatenate([part.distance for part in parts]), place=np.concatenate([part.place for part in parts])
    )


def _copies(subject: Subject, near: Mapping[str, Neighbours], inside: Mapping[str, Neighbours]) -> Copies:
    held_out, gen = subject.alike
    test = memorisation.copy_test(near["gen"].distance[gen], near["held_out"].distance[held_out])
    exact_in_training, exact_inside = duplicates.exact(subject.gen, subject.training)
    return Copies(
        test=test,
        num_tested=len(gen),
        training_samples=len(subject.training),
        training_images=subject.training_images,
        to_training=near["gen"],
        inside=inside["gen"],
        repeated_in_reference=int((inside["held_out"].distance < test.limit).sum()),
        exact_in_training=exact_in_training,
        exact_inside=exact_inside,
    )
