"""What the labels of a split tell, counted in one pass in the order of the index: how many samples each class has, and
how well they are mixed, that is how long runs of one class are.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.dataset.record import LabelRuns


@dataclasses.dataclass(frozen=True)
class LabelTally:
    """What is counted of consecutive samples; adding two is counting both, one after the other."""

    counts: Mapping[object, int]
    """Label → samples."""
    runs: int = 0
    """Runs of equal labels."""
    first: object = None
    """Label of the first sample."""
    last: object = None
    """Label of the last one."""

    def __add__(self, other: "LabelTally") -> "LabelTally":
        if not self.runs or not other.runs:
            return self if self.runs else other
        joined = self.last == other.first
        counts = Counter(self.counts)
        counts.update(other.counts)
        return LabelTally(counts, self.runs + other.runs - joined, self.first, other.last)

    def class_counts(self, labels: Sequence[object]) -> tuple[int, ...]:
        """Samples of each class; `labels` are those of all classes as the column says them, in order."""
        return tuple(self.counts.get(label, 0) for label in labels)

    def label_runs(self) -> LabelRuns | None:
        """The mean run, and what independent draws from the same frequencies would give; None without two classes."""
        if len(self.counts) < 2:
            return None
        rows = sum(self.counts.values())
        # In whole numbers, so that the one division rounds alike everywhere: 1 / (1 − Σp²).
        same = sum(count**2 for count in self.counts.values())
        return LabelRuns(mean=rows / self.runs, independent=rows**2 / (rows**2 - same))


def tally(labels: pa.ChunkedArray) -> LabelTally:
    """The tally of a label column."""
    if not len(labels):
        return LabelTally({})
    coded = labels.combine_chunks().dictionary_encode(null_encoding="encode")
    codes, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    counts = {names[code]: count for code, count in enumerate(np.bincount(codes).tolist())}
    runs = 1 + int(np.count_nonzero(codes[1:] != codes[:-1]))
    return LabelTally(counts, runs, names[codes[0]], names[codes[-1]])


def tally_pieces(columns: Iterable[pa.ChunkedArray]) -> LabelTally:
    """The tally of a label column that comes in pieces, in the order of the index."""
    return sum(map(tally, columns), LabelTally({}))


def label_runs(columns: Iterable[pa.ChunkedArray]) -> LabelRuns | None:
    """The runs of a split whose label column comes in pieces, in the order of the index."""
    return tally_pieces(columns).label_runs()
