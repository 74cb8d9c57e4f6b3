"""From rates to ratios, targets and the lines that are printed."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case."""

    case: str
    """Name and place of the data: jpeg256 local."""
    contender: str
    kind: Literal["ceiling", "ours", "peer"]
    workers: int
    rates: Sequence[float]
    """Images a second, one a round."""
    is_default: bool = False
    """Of ours: decodes where `FeedConfig` does unless told otherwise."""

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the issue asks of a figure."""

    key: str
    text: str
    must: float
    aim: float
    at_least: bool
    """Larger is better."""

    def verdict(self, value: float | None) -> str:
        """In a word or two."""
        if value is None:
            return "not measured"
        sign = 1 if self.at_least else -1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "must reached" if self.reached(value) else "MISSED"

    def reached(self, value: float | None) -> bool:
        """Whether the must is; a figure that was not measured misses none."""
        return value is None or (value >= self.must if self.at_least else value <= self.must)


RATIO_TARGETS = (
    Target(key="jpeg256_local_vs_ceiling", text="256² JPEG, local / ceiling", must=0.75, aim=0.9, at_least=True),
    Target(key="jpeg256_local_vs_peer", text="256² JPEG, local / fastest peer", must=1.25, aim=1.5, at_least=True),
    Target(key="jpeg256_s3_vs_ceiling", text="256² JPEG, S3 / ceiling", must=0.5, aim=0.65, at_least=True),
    Target(key="png32_local_vs_peer", text="32² PNG, local / fastest peer", must=1.0, aim=2.0, at_least=True),
)
OTHER_TARGETS = (
    Target(key="first_batch_sec", text="first batch after ray.init, short plan, s", must=5, aim=2.5, at_least=False),
    Target(key="first_batch_long_plan_sec", text="first batch, 488,000 chunks, s", must=15, aim=6, at_least=False),
    # "flat": no more than what an allocator keeps.
    Target(key="growth_mb", text="driver + object store growth over 50 passes, MB", must=300, aim=30, at_least=False),
)


def ratios(rows: Sequence[Row]) -> dict[str, float | None]:
    """The figures of RATIO_TARGETS; None where one side was not measured."""
    jpeg, png, s3 = "jpeg256 local", "png32 local", "jpeg256 s3"
    return {
        "jpeg256_local_vs_ceiling": _ratio(_ours(rows, jpeg), _fastest(rows, jpeg, "ceiling")),
        "jpeg256_local_vs_peer": _ratio(_ours(rows, jpeg), _fastest(rows, jpeg, "peer")),
        "jpeg256_s3_vs_ceiling": _ratio(_ours(rows, s3), _fastest(rows, s3, "ceiling")),
        "png32_local_vs_peer": _ratio(_ours(rows, png), _fastest(rows, png, "peer")),
    }


def _ours(rows: Sequence[Row], case: str) -> float | None:
    """What a user gets who sets nothing."""
    return max((row.rate for row in rows if row.case == case and row.is_default), default=None)


def _fastest(rows: Sequence[Row], case: str, kind: str) -> float | None:
    return max((row.rate for row in rows if row.case == case and row.kind == kind), default=None)


def _ratio(ours: float | None, other: float | None) -> float | None:
    return round(ours / other, 3) if ours and other else None


def rates_table(rows: Sequence[Row]) -> str:
    """Markdown: who read what how fast."""
    lines = ["| case | contender | workers | img/s | of the ceiling |", "|---|---|---|---|---|"]
    for row in rows:
        share = _ratio(row.rate, _fastest(rows, row.case, "ceiling"))
        name = f"**{row.contender}** (default)" if row.is_default else row.contender
        lines.append(f"| {row.case} | {name} | {row.workers} | {row.rate:,.0f} | {share if share else ''} |")
    return "\n".join(lines)


def targets_table(figures: Mapping[str, float | None]) -> str:
    """Markdown: what was asked for and what came out."""
    lines = ["| target | must | aim | measured | |", "|---|---|---|---|---|"]
    for target in (*RATIO_TARGETS, *OTHER_TARGETS):
        value, sign = figures.get(target.key), "≥" if target.at_least else "≤"
        shown = "" if value is None else f"{value:g}"
        lines.append(
            f"| {target.text} | {sign} {target.must:g} | {sign} {target.aim:g} | {shown} | {target.verdict(value)} |"
        )
    return "\n".join(lines)


def missed(figures: Mapping[str, float | None]) -> list[str]:
    """The keys whose must is not reached."""
    return [target.key for target in (*RATIO_TARGETS, *OTHER_TARGETS) if not target.reached(figures.get(target.key))]


def last_line(figures: Mapping[str, float | None]) -> str:
    """JSON for a program to read."""
    body = {
        "bench": "ingest",
        "ratios": {target.key: figures.get(target.key) for target in RATIO_TARGETS},
        **{target.key: figures.get(target.key) for target in OTHER_TARGETS},
    }
    return json.dumps(body)
