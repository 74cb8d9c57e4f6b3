"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

import base64
import functools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from pipeline.evaluate.report import plots
from pipeline.evaluate.report.gallery import Gallery, Picture
from pipeline.evaluate.report.wording import Shown, apart, gate, judged, number, shown, with_margin

_WIDTH = 720  # px that a picture of few pixels is enlarged to, at most
_ENLARGED = 8  # times, at most
_DEEPEST = 8  # levels of lineage that are laid out; what lies deeper is written as JSON


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    word: str
    why: str

    @property
    def sign(self) -> str:
        return {"Passed": "✓", "Failed": "✗"}.get(self.word, "")


@dataclass(frozen=True, kw_only=True)
class _Gate:
    name: str
    """In a table."""
    sentence: str
    """As a part of one."""
    found: Shown
    limit: Shown
    at: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class _Figure:
    caption: str
    alt: str
    source: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True, kw_only=True)
class _Fact:
    name: str
    number: Shown
    unit: str = ""
    text: str


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A line of the lineage, with those below it."""

    name: str
    text: str
    below: "tuple[_Entry, ...]" = ()


def render(report: Mapping[str, Any], galleries: Sequence[Gallery]) -> str:
    """The page of what report.json holds and of these pictures. The same text whenever it is the same report."""
    found, gates = report["found"], [_gate(one) for one in report["gates"]]
    copies, utility = found["memorisation"], found.get("utility")
    near = "Images that lie nearer to a training image than the limit"
    repeated = "Images with another one almost like them in their own set"
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            found=found,
            verdict=_verdict(report["passed"], gates),
            gates=gates,
            glance=_glance(found),
            sections=[(one, [_figure(picture) for picture in one.pictures]) for one in galleries],
            metrics=plots.of_metrics(found),
            classes=plots.of_classes(found["classes"]) if found.get("classes") else None,
            arms=plots.of_arms(utility["arms"]) if utility else None,
            arms_by_class=plots.of_arms_by_class(utility["arms"], found["class_names"]) if utility else None,
            near=plots.of_counts(near, copies["near"], copies["near_held_out"]),
            repeats=plots.of_counts(repeated, copies["repeated"], copies["repeated_in_reference"]),
            copies=_copies(copies),
            features=_entries(found["features"], _DEEPEST),
            lineage=_entries(report["lineage"], _DEEPEST),
            settings=_entries(report["inputs"], _DEEPEST),
            number=number,
        )
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluate.report", "."),
        autoescape=True,  # whatever a template is called: names of classes and URLs are not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _gate(one: Mapping[str, Any]) -> _Gate:
    value, limit = apart(one["value"], one["limit"])
    return _Gate(
        name=gate(one["name"]),
        sentence=judged(**one),
        found=Shown(text=value, exact=repr(one["value"])),
        limit=Shown(text=limit, exact=repr(one["limit"])),
        at=one["at"],
        passed=one["passed"],
    )


def _verdict(passed: bool, gates: Sequence[_Gate]) -> _Verdict:
    broken = [one.sentence for one in gates if not one.passed]
    if broken:
        limits = "The limit" if len(gates) == 1 else f"{len(broken)} of {len(gates)} limits"
        are = "is" if len(broken) == 1 else "are"
        return _Verdict(
            word="Failed", why=f"{limits} set for the synthetic images {are} not kept: {'; '.join(broken)}."
        )
    if not passed:
        return _Verdict(word="Failed", why="The synthetic images were not let through, though they keep every limit.")
    if not gates:
        return _Verdict(word="Not judged", why="No limits were set, so none could be broken: read the numbers below.")
    limits = (
        "The one limit set for the synthetic images is"
        if len(gates) == 1
        else f"All {len(gates)} limits set for the synthetic images are"
    )
    return _Verdict(word="Passed", why=f"{limits} kept: {'; '.join(one.sentence for one in gates)}.")


def _glance(found: Mapping[str, Any]) -> list[_Fact]:
    """What most readers want to know, in three numbers."""
    copies, facts = found["memorisation"], []
    if found.get("utility"):
        text = "of what real images teach a classifier, these teach; at 0 % it could as well guess."
        facts.append(_Fact(name="Usefulness", number=shown(found["utility"]["worth"], 3, 100), unit="%", text=text))
    text = (
        f"of {number(copies['num_tested'])} synthetic images lie very near to a training image; of as many real images "
        f"that nothing was trained on, {number(copies['near_held_out'])} do."
    )
    facts.append(_Fact(name="Possible copies", number=shown(copies["near"]), text=text))
    if "fid" in found["metrics"]:
        real = found["anchors"].get("real", {}).get("fid")
        beside = f"; real images have {number(real['value'])}" if real else ""
        text = f"is the distance to real images (FID). Lower is better{beside}."
        facts.append(_Fact(name="Likeness", number=with_margin(**found["metrics"]["fid"]), text=text))
    return facts


def _figure(picture: Picture) -> _Figure:
    width, height = struct.unpack(">II", picture.png[16:24])  # where every PNG has its size
    times = max(1, min(_ENLARGED, _WIDTH // width))
    return _Figure(
        caption=picture.caption,
        alt=picture.alt,
        source=f"data:image/png;base64,{base64.b64encode(picture.png).decode()}",
        width=width * times,
        height=height * times,
        enlarged=times > 1,
    )


def _copies(copies: Mapping[str, Any]) -> tuple[_Fact, ...]:
    """What the search for copies says beside its counts of near images."""
    return (
        _Fact(
            name="p-value",
            number=shown(copies["p_value"]),
            text="Probability of so many near images, or more, if synthetic images lie no nearer to training images "
            "than held-out ones do. A very small one, such as 0.001, says that there are copies, or that synthetic "
            "images are more alike than real ones, such as blurred ones: the pairs show which.",
        ),
        _Fact(
            name="Smallest share that would be found",
            number=shown(copies["findable_share"], 2, 100),
            unit="%",
            text="If a smaller share of the synthetic images are copies, so few images may not show it.",
        ),
        _Fact(
            name="Limit of distance",
            number=shown(copies["limit"]),
            text="What is nearer counts as near: root mean square over the pixels of small versions, in levels of "
            "0 to 255. Mirrored and shifted training images are tried too.",
        ),
        _Fact(
            name="Images that the test compares",
            number=shown(copies["num_tested"]),
            text="On each side, with equally many of each class where both sides have classes.",
        ),
        _Fact(
            name="Training images searched",
            number=shown(copies["training_samples"]),
            text="For copies.",
        ),
        _Fact(
            name="Training images that there are",
            number=shown(copies["training_images"]),
            text="Copies of those that were not searched are not found.",
        ),
        _Fact(
            name="Equal to a training image",
            number=shown(copies["exact_in_training"]),
            text="Synthetic images, the same in every pixel, seen at 64² or less.",
        ),
        _Fact(
            name="Equal to another synthetic image",
            number=shown(copies["exact_inside"]),
            text="The same in every pixel, in the same set, seen at 64² or less.",
        ),
    )


def _entries(value: Mapping[str, Any] | Sequence[Any], levels: int) -> tuple[_Entry, ...]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value, 1)
    return tuple(_entry(str(name), one, levels) for name, one in pairs)


def _entry(name: str, value: Any, levels: int) -> _Entry:
    plain = not _holds(value) or (not isinstance(value, Mapping) and not any(map(_holds, value)))
    if not plain and value and levels > 1:
        return _Entry(name=name, text="", below=_entries(value, levels - 1))
    if plain and value and _holds(value):
        return _Entry(name=name, text=", ".join(map(_written, value)))
    return _Entry(name=name, text=_written(value))


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
