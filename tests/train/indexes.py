"""Indexes that do not give what they should, for tasks too: so in a module that every process finds."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError


class Gated(IndexReader):
    """Gives rows when a file is there."""

    gate: Path

    def rows(self, start: int, stop: int) -> pa.Table:
        while not self.gate.exists():
            time.sleep(0.02)
        return super().rows(start, stop)


class Broken(IndexReader):
    """Gives no rows."""

    def rows(self, start: int, stop: int) -> pa.Table:
        raise InputError(f"rows {start} to {stop} cannot be read\nfor some reason")


def like(index: IndexReader, kind: type[IndexReader], **more: Any) -> IndexReader:
    """The same index as another kind of it."""
    made = kind.__new__(kind)
    vars(made).update(vars(index) | more)
    return made
