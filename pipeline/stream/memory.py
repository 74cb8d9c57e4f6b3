"""Memory that is used again once nobody holds it.

Fresh memory costs a page fault every 4 KB: at 256² they were a tenth of what reading and decoding an image cost.
"""

import sys

import numpy as np
from numpy.typing import NDArray

_SLACK = 1.25


class Recycled:
    """Hands out byte arrays; a later one may have the memory of an earlier one that has been let go of.

    Whether it has is asked of Python's reference counts: views, buffers and tensors over an array hold it.
    Not for use by two threads at once.
    """

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], with anything in it."""
        free = [at for at in range(len(self._arrays)) if sys.getrefcount(self._arrays[at]) == _FREE]
        for at in free:
            if len(self._arrays[at]) >= size:
                return self._arrays[at][:size]
        for at in reversed(free):  # too small, and never to be used again where sizes grow
            del self._arrays[at]
        self._arrays.append(np.empty(int(size * _SLACK), np.uint8))
        return self._arrays[-1][:size]


def _free_count() -> int:
    """What is counted for an array that only its list holds: versions of Python differ."""
    arrays = [np.empty(1, np.uint8)]
    return sys.getrefcount(arrays[0])


_FREE = _free_count()
