"""Reports for the tests of the page: what `ganymede evaluate` finds, whole, least, and as an enemy would have it."""

import copy
from typing import Any

import numpy as np

from pipeline.evaluate.report.gallery import Gallery, Picture
from pipeline.png import encode

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HOSTILE = "<script>alert(1)</script>"
_NAMES = ("fid", "kid", "precision", "recall", "density", "coverage", "inception_score")
_SETS = {
    "synthetic": (8.137, 0.0061, 0.8123, 0.6312, 0.9131, 0.7425, 7.912),
    "real": (0.5127, -0.00012, 0.9511, 0.9487, 1.0214, 0.9602, 9.127),
    "blurred": (61.72, 0.0713, 0.4132, 0.2051, 0.3127, 0.2218, 6.213),
    "noisy": (38.41, 0.0387, 0.5721, 0.4412, 0.4875, 0.3921, 6.881),
    "one class missing": (17.91, 0.0139, 0.9532, 0.8541, 1.0317, 0.8642, 8.112),
    "ten images repeated": (241.3, 0.3127, 0.9612, 0.0124, 1.2345, 0.0102, 4.127),
}


def _estimates(name: str, times: float = 1.0) -> dict[str, dict[str, float]]:
    """`times` as bad."""
    values = {
        of: value * times if of in ("fid", "kid") else value / times
        for of, value in zip(_NAMES, _SETS[name], strict=True)
    }
    return {of: {"value": value, "error": max(abs(value) * 0.0237, 0.00011)} for of, value in values.items()}


def _class(times: float, count: int) -> dict[str, Any]:
    return {"num_samples": count, "metrics": _estimates("synthetic", times), "real_fid": _estimates("real")["fid"]}


def whole_report() -> dict[str, Any]:
    """Of ten classes, with everything that a report can have."""
    count = len(CLASSES)
    arms = {
        name: {"mean": mean, "spread": spread, "classes": [mean - 0.031 * (place % 4) for place in range(count)]}
        for name, mean, spread in (
            ("real", 0.8912, 0.0031),
            ("real + flips", 0.8987, 0.0027),
            ("synthetic", 0.8633, 0.0052),
            ("both", 0.9021, 0.0018),
        )
    }
    arms["synthetic"]["classes"][6] = 0.4127
    arms["real"]["classes"][3] = None
    found = {
        "num_samples": 10_000,
        "features": {"network": "domain", "width": 128},
        "notices": ["The labels of synthetic images were chosen in the proportions of the training split."],
        "metrics": _estimates("synthetic"),
        "anchors": {name: _estimates(name) for name in _SETS if name != "synthetic"},
        "classes": {name: _class(1 + place / 7, 1001 - place) for place, name in enumerate(CLASSES)},
        "memorisation": {
            "limit": 12.345,
            "near": 4,
            "near_held_out": 10,
            "p_value": 0.9713,
            "num_tested": 9876,
            "training_images": 60012,
            "findable_share": 0.0031,
            "training_samples": 60_000,
            "repeated": 3,
            "repeated_in_reference": 1,
            "exact_in_training": 0,
            "exact_inside": 2,
        },
        "utility": {"worth": 0.9653, "arms": arms},
        "class_names": list(CLASSES),
    }
    return {
        "format": 2,
        "inputs": {
            "real": "sha256:" + "1f" * 32,
            "synthetic": "sha256:" + "e4" * 32,
            "training_split": "train",
            "reference_split": "test",
            "evaluate": {"num_samples": 10_000, "training_samples": 60_000, "utility_steps": 2000, "seed": 0},
            "features": {"network": "domain", "steps": 2000},
            "gates": {"max_fid": 10.0, "min_utility": 0.5, "min_copies_p_value": 0.001},
        },
        "urls": {"real": "s3://bucket/fashion-mnist-28", "synthetic": "s3://bucket/synthetic-1"},
        "command": "ganymede evaluate --real s3://bucket/fashion-mnist-28 --synthetic s3://bucket/synthetic-1 "
        "--out s3://bucket/report-1 --gates.max-fid 10",
        "lineage": {
            "synthetic": {
                "training_run": {"url": "s3://bucket/run-1", "preset": "r3gan-tiny", "cur_nimg": 2_000_000},
                "dataset_digest": "sha256:" + "1f" * 32,
                "snapshot_digest": "sha256:" + "9c" * 32,
                "class_counts": [1000] * 10,
                "code_version": "0.1.0",
            },
            "code_version": "0.1.0",
            "torch": "2.13.0",
        },
        "found": found,
        "gates": [
            {"name": "utility", "value": 0.9653, "limit": 0.5, "at": "least", "passed": True},
            {"name": "copies_p_value", "value": 0.9713, "limit": 0.001, "at": "least", "passed": True},
            {"name": "fid", "value": 8.137, "limit": 10.0, "at": "most", "passed": True},
        ],
        "passed": True,
    }


def least_report() -> dict[str, Any]:
    """Without classes, usefulness, notices and gates."""
    report = whole_report()
    found = report["found"]
    del found["classes"], found["utility"], found["anchors"]["one class missing"]
    return report | {"found": found | {"notices": [], "class_names": []}, "gates": []}


def failed_report() -> dict[str, Any]:
    """Two of three gates failed, one of them by less than three digits show."""
    report = whole_report()
    gates = copy.deepcopy(report["gates"])
    gates[0] |= {"value": 0.49996, "passed": False}
    gates[2] |= {"value": 12.34, "passed": False}
    return report | {"gates": gates, "passed": False}


def hostile_report() -> dict[str, Any]:
    """A hundred classes, with names of 200 letters without a space, one that is a script; URLs and lineage like it."""
    names = [HOSTILE, *(f"{place:03}" + "W" * 197 for place in range(99))]
    report = whole_report()
    found = report["found"]
    found["classes"] = {name: _class(1 + place / 9, 100) for place, name in enumerate(names)}
    found["class_names"], found["notices"] = names, [HOSTILE, "n" * 300]
    for arm in found["utility"]["arms"].values():
        arm["classes"] = [arm["mean"]] * len(names)
    report["urls"] = {"real": f"s3://bucket/{HOSTILE}", "synthetic": "s3://bucket/" + "x" * 300}
    deep: dict[str, Any] = {HOSTILE: HOSTILE}
    for level in range(20):
        deep = {f"{level}" + "k" * 100: deep}
    return report | {"lineage": {"synthetic": deep}, "command": f"ganymede evaluate --real '{HOSTILE}' " + "y" * 300}


def galleries() -> list[Gallery]:
    """Small pictures that are enlarged, and one that is wider than a phone."""
    chance = np.random.default_rng(0)

    def picture(caption: str, height: int, width: int) -> Picture:
        pixels = chance.integers(256, size=(height, width, 1), dtype=np.uint8)
        return Picture(caption=caption, alt=f"Grain, {caption}", png=encode(pixels))

    pairs = tuple(picture(f"{distance} levels apart", 28, 56) for distance in (9.1, 9.7, 10.2))
    return [
        Gallery(title="Synthetic images", text="Taken by chance.", pictures=(picture("a sheet of ten", 58, 298),)),
        Gallery(title="Nearest training images", text="Synthetic on the left, training on the right.", pictures=pairs),
        Gallery(title="A wide sheet", text="Shrunk to the screen.", pictures=(picture("wide", 40, 1600),)),
    ]
