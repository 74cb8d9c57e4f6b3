"""Plots as numbers: axes, and rows of marks with intervals, in percent of the axis. The page draws them as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.evaluate.report.wording import Shown, number

_LETTER, _LETTER_GAP = 6.0, 3.0  # percent of the axis, on a phone
_BENT_FROM = 30.0  # largest size over smallest from which even steps would hide the small ones
_FINEST = 1e-4  # of the largest size: what is smaller than that is as good as 0
_ALIKE = 1e-9  # share of their size by which numbers may differ and still be one place
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A line across the plot."""

    at: float
    """Percent of the axis."""
    label: str
    """Empty where there is no room for one."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Where numbers stand."""

    low: float
    high: float
    bend: float
    """Sizes above it are on a logarithmic scale, those below on a linear one; 0: all on a linear one."""
    places: tuple[float, ...]
    """Numbers to draw a line at."""

    def at(self, value: float) -> float:
        """Percent of the axis; what lies beyond an end stands on it."""
        low, high, here = (self._stretched(one) for one in (self.low, self.high, value))
        return round(100 * min(max((here - low) / (high - low), 0.0), 1.0), 2)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """The lines, and labels where there is room."""
        ticks: list[Tick] = []
        taken = -math.inf
        for place in self.places:
            at, label = self.at(place), number(place)
            half = _LETTER / 2 * len(label)
            room = at - half >= taken
            taken = at + half + _LETTER_GAP if room else taken
            ticks.append(Tick(at=at, label=label if room else ""))
        return tuple(ticks)

    def _stretched(self, value: float) -> float:
        return math.asinh(value / self.bend) if self.bend else value


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A number on the axis, with its interval; percent of the axis."""

    kind: str
    """"synthetic" or "real", which look different."""
    at: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a plot, and of the table that goes with it."""

    name: str
    kind: str
    """"synthetic" for what the report is about, "real" for what it is read by."""
    marks: tuple[Mark, ...]
    says: str
    """The plot of this row in words."""
    cells: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A table whose second column is a plot."""

    caption: str
    first: str
    """Heads the names of the rows."""
    shows: str
    """Heads the plot."""
    columns: tuple[str, ...]
    """Head the cells."""
    axis: Axis
    rows: tuple[Row, ...]
    better: str = ""
    """The side of the axis, "left" or "right"; empty: neither."""
    guide: float | None = None
    """Percent of the axis at which a line helps to compare rows."""
    bars: bool = False
    """Counts from 0 rather than points on a scale."""
    wide: bool = False
    """It may need more room than there is, and scrolls."""

    @property
    def axis_says(self) -> str:
        """The axis in words."""
        kind = "bent axis, logarithmic away from 0," if self.axis.bend else "axis"
        side = f"; better is to the {self.better}" if self.better else ""
        return f"{self.shows}: {kind} from {number(self.axis.low)} to {number(self.axis.high)}{side}"


def even(values: Iterable[float], *, base: float = math.inf, top: float = -math.inf) -> Axis:
    """An axis of even steps that has all these values on it, and `base` and `top`."""
    ends = [*values, base, top]
    low = min(one for one in ends if one != -math.inf)
    high = max(one for one in ends if one != math.inf)
    alike = high - low <= _ALIKE * max(abs(low), abs(high), _ALIKE)
    high = low + max(1.0, abs(low) * _FINEST) if alike else high
    step = _step((high - low) / 4)
    places = tuple(step * place for place in range(math.floor(low / step), math.ceil(high / step) + 1))
    return Axis(low=places[0], high=places[-1], bend=0.0, places=places)


def bent(intervals: Sequence[tuple[float, float]]) -> Axis:
    """An axis from 0 for numbers of sizes that differ by orders of magnitude, a little below 0 too; of even steps where
    they do not.
    """
    ends = [end for interval in intervals for end in interval]
    largest = max(map(abs, ends))
    sizes = [max(abs(low + high), high - low) / 2 for low, high in intervals]
    bend = max(min((size for size in sizes if size > 0), default=0.0), largest * _FINEST)
    if largest <= bend * _BENT_FROM:
        return even(ends, base=0.0)
    low, high = min(0.0, *ends), max(0.0, *ends)
    decades = [10.0**power for power in range(math.ceil(math.log10(bend)), math.floor(math.log10(largest)) + 1)]
    places = [-one for one in reversed(decades)] + [0.0, *decades]
    return Axis(low=low, high=high, bend=bend, places=tuple(one for one in places if low <= one <= high))


def mark(axis: Axis, kind: str, value: float, margin: float = 0.0) -> Mark:
    """A number on an axis, and what lies within a margin of it."""
    return Mark(kind=kind, at=axis.at(value), low=axis.at(value - margin), high=axis.at(value + margin))


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(nice * power for nice in _NICE if nice * power >= least * (1 - 1e-9))
