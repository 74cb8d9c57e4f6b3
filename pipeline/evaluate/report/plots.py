"""What was found as plots: metrics beside their anchors, classes, what images are worth, counts of near ones."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluate.report import charts
from pipeline.evaluate.report.charts import Axis, Plot, Row
from pipeline.evaluate.report.wording import ANCHORS, ARMS, Metric, metric, number, percent, shown, with_margin

_Estimate = Mapping[str, float]


def of_metrics(found: Mapping[str, Any]) -> tuple[tuple[Metric, Plot], ...]:
    """A plot a metric: the synthetic images, and below them what their number is read by."""
    result = []
    for name, estimate in found["metrics"].items():
        anchors = {one: numbers[name] for one, numbers in found["anchors"].items() if name in numbers}
        axis = _axis(name, [estimate, *anchors.values()])
        rows = [_estimate_row(axis, "Synthetic", "synthetic", estimate)]
        for anchor, known in anchors.items():
            rows.append(_estimate_row(axis, ANCHORS.get(anchor, f"Real, {anchor}"), "real", known))
        info = metric(name)
        plot = Plot(
            caption=f"{info.name} of each set, and two standard errors either way",
            first="Images",
            shows=info.name,
            columns=("Value",),
            axis=axis,
            rows=tuple(rows),
            better=_better(info),
            guide=axis.at(estimate["value"]),
        )
        result.append((info, plot))
    return tuple(result)


def of_classes(classes: Mapping[str, Mapping[str, Any]]) -> Plot:
    """All metrics of each class, FID as a plot beside that of real images; first the classes that lie furthest from it.

    Of few images FID is larger, whatever they are: so classes of other sizes compare only by how far they lie from it.
    """
    names = tuple(next(iter(classes.values()))["metrics"])
    axis = _axis("fid", [one for of in classes.values() for one in (of["metrics"]["fid"], of["real_fid"])])

    def excess(one: tuple[str, Mapping[str, Any]]) -> float:
        return float(one[1]["metrics"]["fid"]["value"] - one[1]["real_fid"]["value"])

    rows = []
    for label, of in sorted(classes.items(), key=excess, reverse=True):
        cells = (shown(of["num_samples"]), *(with_margin(**of["metrics"][name]) for name in names))
        row, real = (
            _estimate_row(axis, label, kind, one)
            for kind, one in (("synthetic", of["metrics"]["fid"]), ("real", of["real_fid"]))
        )
        marks, says = (*row.marks, *real.marks), f"{row.says}; real images {real.says}"
        rows.append(Row(name=label, kind="", marks=marks, says=says, cells=(*cells, with_margin(**of["real_fid"]))))
    return Plot(
        caption="Metrics of each class, and two standard errors either way",
        first="Class",
        shows="FID",
        columns=("Images", *(metric(name).name for name in names), "FID of real"),
        axis=axis,
        rows=tuple(rows),
        better=_better(metric("fid")),
        wide=True,
    )


def of_arms(arms: Mapping[str, Mapping[str, Any]]) -> Plot:
    """How well a classifier does, by what it was trained on."""
    intervals = {name: (100 * arm["mean"], 200 * arm["spread"]) for name, arm in arms.items()}
    axis = charts.even(end for mean, margin in intervals.values() for end in (mean - margin, mean + margin))
    rows = []
    for name, (mean, margin) in intervals.items():
        kind = "synthetic" if name == "synthetic" else "real"
        rows.append(
            Row(
                name=ARMS.get(name, name),
                kind=kind,
                marks=(charts.mark(axis, kind, mean, margin),),
                says=f"from {number(mean - margin)} % to {number(mean + margin)} %",
                cells=(with_margin(arms[name]["mean"], arms[name]["spread"], 100),),
            )
        )
    return Plot(
        caption="Accuracy on real test images, in %, and two standard deviations over repetitions either way",
        first="Trained on",
        shows="Accuracy, %",
        columns=("%",),
        axis=axis,
        rows=tuple(rows),
        better="right",
    )


def of_arms_by_class(arms: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> Plot:
    """The same of each class; first those that lose most where synthetic images take the place of real ones."""
    axis = charts.even((), base=0.0, top=100.0)
    rows = []
    for label in range(max(len(arm["classes"]) for arm in arms.values())):
        values = {name: arm["classes"][label] for name, arm in arms.items()}
        name = class_names[label] if label < len(class_names) else f"class {label}"
        real, gen = values.get("real"), values.get("synthetic")
        gain = math.inf if real is None or gen is None else gen - real
        rows.append((gain, label, _class_row(axis, name, values)))
    return Plot(
        caption="Accuracy on real test images of each class, in %, by what the classifier was trained on",
        first="Class",
        shows="Accuracy, %",
        columns=tuple(ARMS.get(name, name) for name in arms),
        axis=axis,
        rows=tuple(row for _, _, row in sorted(rows, key=lambda one: one[:2])),
        better="right",
        wide=True,
    )


def of_counts(caption: str, synthetic: int, real: int) -> Plot:
    """How many synthetic images and how many real ones, as bars."""
    axis = charts.even((synthetic, real), base=0.0, top=1.0)
    counts = (("Synthetic", "synthetic", synthetic), ("Real, held out", "real", real))
    rows = tuple(
        Row(
            name=name,
            kind=kind,
            marks=(charts.mark(axis, kind, count),),
            says=f"bar of {number(count)}",
            cells=(shown(count),),
        )
        for name, kind, count in counts
    )
    return Plot(
        caption=caption,
        first="Images",
        shows="Count",
        columns=("Count",),
        axis=axis,
        rows=rows,
        better="left",
        bars=True,
    )


def _better(info: Metric) -> str:
    return ("left" if info.lower_is_better else "right") if info.how else ""


def _axis(name: str, estimates: Iterable[_Estimate]) -> Axis:
    info = metric(name)
    intervals = [(one["value"] - 2 * one["error"], one["value"] + 2 * one["error"]) for one in estimates]
    if info.scale == "bent":
        return charts.bent(intervals)
    if info.scale == "share":
        return charts.even((), base=0.0, top=1.0)
    return charts.even((end for interval in intervals for end in interval), base=0.0)


def _estimate_row(axis: Axis, name: str, kind: str, estimate: _Estimate) -> Row:
    value, margin = estimate["value"], 2 * estimate["error"]
    return Row(
        name=name,
        kind=kind,
        marks=(charts.mark(axis, kind, value, margin),),
        says=f"from {number(value - margin)} to {number(value + margin)}",
        cells=(with_margin(value, estimate["error"]),),
    )


def _class_row(axis: Axis, name: str, values: Mapping[str, float | None]) -> Row:
    """Marks of what real and what synthetic images teach, all arms as numbers."""
    compared = {kind: 100 * value for kind in ("real", "synthetic") if (value := values.get(kind)) is not None}
    says = ", ".join(f"{kind} {number(value)} %" for kind, value in compared.items())
    return Row(
        name=name,
        kind="",
        marks=tuple(charts.mark(axis, kind, value) for kind, value in compared.items()),
        says=says or "not known",
        cells=tuple(map(percent, values.values())),
    )
