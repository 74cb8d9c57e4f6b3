"""Cases that do what the pool is there to catch."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np

from tests.fuzz.pool import Outcome

HANG_SEC, PEAK_BYTES = 4, 200 * 1024**2
EXPECTED_NOISE = "expected"


def _flood() -> None:
    np.ones(PEAK_BYTES, np.uint8)


def _exhaust() -> None:
    np.ones(2**34, np.uint8)


CASES: Mapping[str, Callable[[], object]] = {
    "good": lambda: sys.stderr.write("expected\n"),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "still good": lambda: None,
    "exception": lambda: {}["missing"],
    "warning": lambda: warnings.warn("escaped", stacklevel=1),
    "noise": lambda: os.write(2, b"from C\n"),
    "flood": _flood,
    "exhaust": _exhaust,
    "hang": lambda: time.sleep(600),
}


def make(_: int, number: int) -> Callable[[], object]:
    """The case of a number."""
    return list(CASES.values())[number]


def check(case: Callable[[], object]) -> Outcome:
    """What the pool calls."""
    case()
    return Outcome("bad", "done")
