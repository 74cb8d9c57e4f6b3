"""The whole evaluation of a set of images: features, metrics beside their anchors, copies, utility."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import philox
from pipeline.config import ConfigError
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import cache, defects, metrics, utility
from pipeline.evaluate.classifier import Classifier, Recipe, reduced, rotated, train_classifier
from pipeline.evaluate.duplicates import Copies
from pipeline.evaluate.features import FeaturesConfig
from pipeline.evaluate.metrics import Described
from pipeline.evaluate.ray_compare import Compared, Subject, compared
from pipeline.evaluate.ray_look import AS_THEY_ARE, Look, View, look
from pipeline.evaluate.ray_utility import utility as utility_of
from pipeline.evaluate.samples import EvaluateError, Samples, Shape, chosen, read_all
from pipeline.evaluate.utility import Labelled
from pipeline.gan.precision import supported

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
    training_digest: str
    """Of their dataset and split."""
    reference: IndexReader
    """Real images that neither G nor the classifiers have seen."""
    gen: IndexReader
    """Synthetic images."""
    shape: Shape
    """What all are compared at."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """N samples of a side, in an order that says nothing."""

    numbers: NDArray[np.int64]
    """In their split, [N]."""
    look: Look
    """What was taken from them."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N]; 0 without classes."""
        return self.look.described.labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is found, and of which samples."""

    found: Mapping[str, Any]
    """As JSON will have it."""
    reference: Seen
    gen: Seen
    copies: Copies
    training_numbers: NDArray[np.int64]
    """Of the training images that `copies` names by their place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """What an evaluation works with."""

    features: FeaturesConfig
    """What is compared."""
    cache_url: str
    """Where classifiers are kept."""
    num_workers: int
    """Processes that look at images."""
    say: Say
    """Hears of progress."""


def evaluate(sides: Sides, config: EvaluateConfig, tools: Tools) -> Evaluation:
    """The same again for the same sets, configuration, torch and hardware; needs a running Ray. Raises EvaluateError
    for sets too small to compare, and what reading raises.
    """
    sizes = [one.num_samples for one in (sides.training, sides.reference, sides.gen)]
    count = min(config.num_samples, config.training_samples, *sizes)
    if count < 2 * metrics.GROUPS:
        raise EvaluateError(f"the smallest set has {count} images, and {2 * metrics.GROUPS} are the fewest; make more")
    training = chosen(sides.training.num_samples, config.training_samples, config.seed)
    real = _read(sides.training, training, sides, "read training images", tools.say)
    apart = _kept_apart(len(training), count, config.seed)
    network = _domain_classifier(real, apart, sides, config, tools)
    views = {
        "training": View(
            reader=sides.training, numbers=training[apart.anchors], changes=(AS_THEY_ARE, *defects.CHANGES)
        ),
        "reference": View(reader=sides.reference, numbers=chosen(sides.reference.num_samples, count, config.seed)),
        "synthetic": View(reader=sides.gen, numbers=chosen(sides.gen.num_samples, count, config.seed)),
    }
    seen = _looked_at(views, sides.shape, network, config.seed, tools)
    reference, gen = (seen[side][AS_THEY_ARE] for side in ("reference", "synthetic"))
    subject = Subject(
        reference=reference.look.described,
        others={"synthetic": gen.look.described, **_anchors(seen["training"], sides)},
        num_classes=len(sides.classes) if sides.comparable else 0,
        gen=gen.look.pixels,
        held_out=reference.look.pixels,
        training=real.pixels,
        training_images=sides.training.num_samples,
        alike=_alike(reference.labels, gen.labels, sides),
    )
    result = compared(subject, lambda done, total: tools.say("compare", done, total))
    found = {
        "num_samples": count,
        "class_names": list(sides.classes) if sides.labelled else [],
        "features": {"network": tools.features.network, "width": int(reference.look.described.features.shape[1])},
        **_numbers(result, sides),
    }
    if sides.comparable and config.utility_steps:
        found["utility"] = _utility(real, reference, sides, config, tools)
    found["notices"] = list(_notices(found, reference, gen, sides, apart))
    return Evaluation(found=found, reference=reference, gen=gen, copies=result.copies, training_numbers=training)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Apart:
    """Rows of the training images: those that anchors are made of, and those that the classifier learns from."""

    anchors: NDArray[np.int64]
    learnt: NDArray[np.int64]


def _kept_apart(num_training: int, count: int, seed: int) -> _Apart:
    """None in both, where there are enough: what a network learnt from lies otherwise than what it did not."""
    order = philox.permutation(philox.stream_key(seed, "evaluate/apart"), num_training)
    anchors = np.sort(order[:count])
    learnt = np.sort(order[count:]) if num_training >= 2 * count else np.arange(num_training, dtype=np.int64)
    return _Apart(anchors=anchors, learnt=learnt)


def _read(reader: IndexReader, numbers: NDArray[np.int64], sides: Sides, what: str, say: Say) -> Samples:
    """What classifiers learn from."""

    def done(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        say(what, len(pixels), len(numbers))
        return reduced(pixels)

    return read_all(reader, numbers, sides.shape, done)


def _domain_classifier(real: Samples, apart: _Apart, sides: Sides, config: EvaluateConfig, tools: Tools) -> Classifier:
    num_classes = len(sides.classes) if sides.labelled else 4
    recipe = Recipe(steps=config.classifier_steps, seed=config.seed)

    def heard(_: int) -> None:
        tools.say("train the classifier", 1, recipe.steps)

    def train() -> Classifier:
        learnt = real.of(apart.learnt)
        pixels, labels = (learnt.pixels, learnt.labels) if sides.labelled else rotated(learnt.pixels)
        return train_classifier(pixels, labels, num_classes, recipe, heard)

    identity = {
        "training": sides.training_digest,
        "shape": dataclasses.asdict(sides.shape),
        "training_samples": config.training_samples,
        "anchors": len(apart.anchors),
        "recipe": dataclasses.asdict(recipe),
        "precision": supported("bf16", torch.device("cpu")),
    }
    return cache.remembered(tools.cache_url, identity, sides.shape.channels, num_classes, train)


def _looked_at(
    views: Mapping[str, View], shape: Shape, network: Classifier, seed: int, tools: Tools
) -> Mapping[str, Mapping[str, Seen]]:
    """By view and change."""
    total = sum(len(view.numbers) for view in views.values())
    looks = look(
        views,
        shape,
        network,
        tools.features,
        num_workers=tools.num_workers,
        on_progress=lambda done: tools.say("look at images", done, total),
    )
    found: dict[str, dict[str, Seen]] = {}
    for name, view in views.items():
        order = philox.permutation(philox.stream_key(seed, "evaluate/shuffle"), len(view.numbers))
        found[name] = {
            change: Seen(
                numbers=view.numbers[order],
                look=Look(described=one.described.of(order), pixels=one.pixels[order]),
            )
            for change, one in looks[name].items()
        }
    return found


def _anchors(training: Mapping[str, Seen], sides: Sides) -> Mapping[str, Described]:
    """Real training images, as they are and made worse: what numbers are read by."""
    real = training[AS_THEY_ARE].look.described
    anchors = {"real": real} | {change: training[change].look.described for change in defects.CHANGES}
    counts = np.bincount(real.labels)
    if sides.labelled and (counts > 0).sum() > 1:
        anchors["one class missing"] = real.of(defects.without_class(real.labels, int(counts.argmax())))
    anchors["ten images repeated"] = real.of(defects.repeated(len(real.labels)))
    return anchors


def _alike(
    reference: NDArray[np.int64], gen: NDArray[np.int64], sides: Sides
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of both sides with equally many of each class, where both have classes: images of some classes lie nearer
    to each other than those of others, and shares of classes must not look like copies.
    """
    all_rows = np.arange(len(reference), dtype=np.int64), np.arange(len(gen), dtype=np.int64)
    if not sides.comparable:
        return all_rows
    rows = [[np.flatnonzero(labels == label) for label in range(len(sides.classes))] for labels in (reference, gen)]
    counts = [min(map(len, pair)) for pair in zip(*rows, strict=True)]
    if sum(counts) < 2 * metrics.GROUPS:
        return all_rows
    kept = [np.sort(np.concatenate([one[:n] for one, n in zip(side, counts, strict=True)])) for side in rows]
    return kept[0], kept[1]


def _utility(real: Samples, reference: Seen, sides: Sides, config: EvaluateConfig, tools: Tools) -> Mapping[str, Any]:
    numbers = chosen(sides.gen.num_samples, config.training_samples, config.seed)
    gen = _read(sides.gen, numbers, sides, "read synthetic images", tools.say)
    total = config.utility_steps * config.utility_seeds * len(utility.ARMS)
    arms = utility_of(
        Labelled(pixels=real.pixels, labels=real.labels),
        Labelled(pixels=gen.pixels, labels=gen.labels),
        Labelled(pixels=reference.look.pixels, labels=reference.labels),
        len(sides.classes),
        steps=config.utility_steps,
        seeds=range(config.seed, config.seed + config.utility_seeds),
        on_progress=lambda steps: tools.say("train on real and synthetic images", steps, total),
    )
    of_arms = {
        name: {
            "mean": arm.mean,
            "spread": arm.spread,
            "above_guessing": arm.balanced - 1 / len(sides.classes),
            "classes": list(arm.of_classes),
        }
        for name, arm in arms.items()
    }
    return {"worth": utility.worth(arms, len(sides.classes)), "arms": of_arms}


def _notices(found: Mapping[str, Any], reference: Seen, gen: Seen, sides: Sides, apart: _Apart) -> list[str]:
    """What a reader must know to read the numbers right."""
    count, width = found["num_samples"], found["features"]["width"]
    notices = []
    if count <= width:
        notices.append(
            f"FID is of {count:,} images a side and {width:,} features: covariances of so few are singular, and the "
            "distance is too large; compare it with its anchors and intervals only, or evaluate more images."
        )
    if len(np.intersect1d(apart.anchors, apart.learnt)):
        notices.append(
            "The training images are too few to keep some apart: the real anchors are images that the classifier "
            "learnt from."
        )
    if sides.shape.fit is not None:
        channels = "grey" if sides.shape.channels == 1 else "RGB"
        notices.append(
            f"Images that were not {sides.shape.resolution}² {channels} were brought to that ({sides.shape.fit})."
        )
    searched, there = (found["memorisation"][name] for name in ("training_samples", "training_images"))
    if searched < there:
        notices.append(f"Copies were looked for in {searched:,} of {there:,} training images.")
    if "utility" in found and found["utility"]["arms"]["real"]["above_guessing"] < utility.LEAST:
        notices.append(
            "Real images teach the classifier nothing here, so what synthetic ones are worth is not known: 0."
        )
    return notices + (_of_classes(found, reference.labels, gen.labels, sides) if sides.comparable else [])


def _of_classes(
    found: Mapping[str, Any], reference: NDArray[np.int64], gen: NDArray[np.int64], sides: Sides
) -> list[str]:
    notices = []
    few = len(sides.classes) - len(found["classes"])
    if few:
        notices.append(
            f"{few} classes have fewer than {2 * metrics.GROUPS} images on a side: not compared by themselves."
        )
    shares = [np.bincount(labels, minlength=len(sides.classes)) / len(labels) for labels in (reference, gen)]
    for side, share in zip(("reference", "synthetic"), shares, strict=True):
        missing = [sides.classes[label] for label in np.flatnonzero(share == 0)]
        if missing:
            notices.append(f"No {side} image of {', '.join(missing)} was among those looked at.")
    apart = 0.5 * float(abs(shares[0] - shares[1]).sum())
    by_chance = math.sqrt((len(sides.classes) - 1) / (2 * len(gen)))
    if apart > _OTHER_SHARES + by_chance:
        notices.append(
            f"Classes have other shares in the synthetic set than in the reference ({apart:.0%} of the images would "
            "have to change class): FID, KID, recall and coverage of all images measure that too."
        )
    return notices


_OTHER_SHARES = 0.05


def _numbers(result: Compared, sides: Sides) -> dict[str, Any]:
    """As JSON will have it."""
    others = {name: _plain(one) for name, one in result.others.items()}
    found = {"metrics": others.pop("synthetic"), "anchors": others, "memorisation": result.copies.report()}
    if sides.comparable:
        found["classes"] = {sides.classes[label]: dataclasses.asdict(one) for label, one in result.classes.items()}
    return found


def _plain(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(one) for name, one in estimates.items()}
