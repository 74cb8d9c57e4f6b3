"""The whole evaluation of a set of images: features, metrics beside their anchors, copies, utility."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import philox
from pipeline.config import ConfigError
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import defects, memorisation, metrics
from pipeline.evaluate.classifier import Classifier, Recipe, reduced, rotated, train_classifier
from pipeline.evaluate.metrics import Described
from pipeline.evaluate.ray_look import Look, look
from pipeline.evaluate.samples import EvaluateError, Samples, chosen, read_all
from pipeline.evaluate.utility import Labelled, utility

Say = Callable[[str, int, int], None]
"""Hears what is done, how many more of it are, and of how many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is looked at."""

    num_samples: int = 10_000
    """Samples of each side that metrics compare, at most: all sides have equally many."""
    training_samples: int = 60_000
    """Real images that classifiers learn from and that copies are looked for in, at most; synthetic ones as many."""
    classifier_steps: int = 2000
    """Steps, of 128 images, of the classifier whose features are compared."""
    utility_steps: int = 2000
    """Steps of each classifier that says what images are worth; 0: leave that out."""
    utility_seeds: int = 3
    """Classifiers of each kind."""
    seed: int = 0
    """Chooses samples, weights and orders."""

    def __post_init__(self) -> None:
        least = 2 * metrics.GROUPS
        for name, floor in (("num_samples", least), ("training_samples", least), ("classifier_steps", 1)):
            if getattr(self, name) < floor:
                raise ConfigError(f"{name} must be at least {floor}, not {getattr(self, name)}")
        if self.utility_steps < 0 or self.utility_seeds < 1:
            raise ConfigError("utility_steps must be at least 0, utility_seeds at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """The three sets of one evaluation, of one shape and one list of classes."""

    training: IndexReader
    """Real images that G was trained on."""
    reference: IndexReader
    """Real images that neither G nor the classifiers have seen."""
    gen: IndexReader
    """Synthetic images."""
    shape: tuple[int, int]
    """Resolution, channels."""
    classes: tuple[str, ...]
    """Names by label of the real images; fewer than two: nothing that labels could say."""
    gen_labelled: bool
    """Whether the synthetic images have the same classes."""

    @property
    def labelled(self) -> bool:
        """Whether there is a class to tell from another."""
        return len(self.classes) > 1

    @property
    def comparable(self) -> bool:
        """Whether that holds on both sides."""
        return self.labelled and self.gen_labelled


def evaluate(sides: Sides, config: EvaluateConfig, num_workers: int, say: Say) -> Mapping[str, Any]:
    """What is found, as JSON will have it. The same again for the same sets, configuration, torch and hardware. Raises
    EvaluateError for sets too small to compare, and what reading raises.
    """
    count = min(config.num_samples, *(one.num_samples for one in (sides.training, sides.reference, sides.gen)))
    if count < 2 * metrics.GROUPS:
        raise EvaluateError(f"the smallest set has {count} images, and {2 * metrics.GROUPS} are the fewest; make more")
    real = _read(sides.training, sides, config)
    network = _domain_classifier(real, sides, config, say)
    views = _Views(sides, config, count, network, num_workers, say)
    reference, gen = views.of("reference"), views.of("gen")
    found: dict[str, Any] = {
        "num_samples": count,
        "metrics": _plain(metrics.compare(reference.described, gen.described)),
        "anchors": {name: _plain(metrics.compare(reference.described, one)) for name, one in _anchors(views)},
        "memorisation": _memorisation(views, reference, gen),
    }
    if sides.comparable:
        of_classes = metrics.of_classes(reference.described, gen.described, len(sides.classes))
        found["classes"] = {sides.classes[label]: _plain(one) for label, one in of_classes.items()}
        if config.utility_steps:
            found["utility"] = _utility(real, sides, config, count, say)
    return found


class _Views:
    """Looks at sets with one network, each once; samples in an order that says nothing."""

    def __init__(
        self, sides: Sides, config: EvaluateConfig, count: int, network: Classifier, num_workers: int, say: Say
    ) -> None:
        self.sides, self._config, self.count = sides, config, count
        self._network, self._num_workers, self._say = network, num_workers, say

    def of(self, side: str, change: str = "") -> Look:
        """`count` samples of a side, as they are or changed."""
        reader: IndexReader = getattr(self.sides, side)
        return self._look(reader, chosen(reader.num_samples, self.count, self._config.seed), side, change)

    def known(self) -> memorisation.Small:
        """The training images that copies are looked for in."""
        reader = self.sides.training
        numbers = chosen(reader.num_samples, self._config.training_samples, self._config.seed)
        return self._look(reader, numbers, "training, all", "").small

    def _look(self, reader: IndexReader, numbers: NDArray[np.int64], side: str, change: str) -> Look:
        what = f"look at {side}{', ' if change else ''}{change}"
        seen = look(
            reader,
            numbers,
            self.sides.shape,
            self._network,
            num_workers=self._num_workers,
            change=change,
            on_progress=lambda done: self._say(what, done, len(numbers)),
        )
        order = philox.permutation(philox.stream_key(self._config.seed, "evaluate/shuffle"), len(numbers))
        return Look(described=seen.described.of(order), small=seen.small[order])


def _read(reader: IndexReader, sides: Sides, config: EvaluateConfig) -> Samples:
    """What classifiers learn from."""
    return read_all(reader, chosen(reader.num_samples, config.training_samples, config.seed), *sides.shape, reduced)


def _domain_classifier(real: Samples, sides: Sides, config: EvaluateConfig, say: Say) -> Classifier:
    pixels, labels = (real.pixels, real.labels) if sides.labelled else rotated(real.pixels)
    num_classes, steps = len(sides.classes) if sides.labelled else 4, config.classifier_steps
    recipe = Recipe(steps=steps, seed=config.seed)
    return train_classifier(pixels, labels, num_classes, recipe, lambda _: say("train the classifier", 1, steps))


def _anchors(views: _Views) -> list[tuple[str, Described]]:
    """Real training images, as they are and made worse: what numbers are read by."""
    real = views.of("training").described
    anchors = [("real", real)]
    anchors += [(change, views.of("training", change).described) for change in defects.CHANGES]
    if views.sides.labelled:
        largest = int(np.bincount(real.labels).argmax())
        anchors.append(("one class missing", real.of(defects.without_class(real.labels, largest))))
    return [*anchors, ("ten images repeated", real.of(defects.repeated(views.count)))]


def _memorisation(views: _Views, reference: Look, gen: Look) -> Mapping[str, Any]:
    known = views.known()
    of_gen, of_reference = (memorisation.to_training(side.small, known) for side in (gen, reference))
    test = memorisation.copy_test(of_gen.distance, of_reference.distance)
    inside, inside_reference = (memorisation.within(side.small) for side in (gen, reference))
    return {
        **dataclasses.asdict(test),
        "training_samples": len(known),
        "repeated": int((inside.distance < test.limit).sum()),
        "repeated_in_reference": int((inside_reference.distance < test.limit).sum()),
    }


def _utility(real: Samples, sides: Sides, config: EvaluateConfig, count: int, say: Say) -> Mapping[str, Any]:
    gen = _read(sides.gen, sides, config)
    test = read_all(sides.reference, chosen(sides.reference.num_samples, count, config.seed), *sides.shape, reduced)
    total = config.utility_steps * config.utility_seeds
    learnt, made, unseen = (Labelled(pixels=one.pixels, labels=one.labels) for one in (real, gen, test))
    arms = utility(
        learnt,
        made,
        unseen,
        len(sides.classes),
        steps=config.utility_steps,
        seeds=range(config.seed, config.seed + config.utility_seeds),
        on_progress=lambda arm, _: say(f"train on {arm}", 1, total),
    )
    chance = 1 / len(sides.classes)
    worth = (arms["synthetic"].balanced - chance) / max(arms["real"].balanced - chance, 1e-9)
    of_arms = {
        name: {"mean": arm.mean, "spread": arm.spread, "classes": list(arm.of_classes)} for name, arm in arms.items()
    }
    return {"worth": worth, "arms": of_arms}


def _plain(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(one) for name, one in estimates.items()}
