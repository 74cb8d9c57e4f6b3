"""Memory is used again only when nobody holds it, whatever holds it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from pipeline.stream.memory import Recycled

HOLDERS: list[Callable[[NDArray[np.uint8]], Any]] = [
    lambda array: array,
    lambda array: array[3:5],
    lambda array: array.reshape(2, 5)[1],
    lambda array: array.data,
    lambda array: memoryview(array)[2:4],
    lambda array: pa.py_buffer(array),
    lambda array: torch.from_numpy(array),
    lambda array: torch.from_numpy(array).reshape(2, 5)[0],
]


@pytest.mark.parametrize("hold", HOLDERS)
def test_what_is_held_is_left_alone(hold: Callable[[NDArray[np.uint8]], Any]) -> None:
    memory = Recycled()
    held = hold(memory.take(10))
    other = memory.take(10)
    seen = held.numpy() if isinstance(held, torch.Tensor) else np.asarray(held)
    assert not np.shares_memory(seen, other)


@pytest.mark.parametrize("hold", HOLDERS)
def test_what_is_let_go_of_is_used_again(hold: Callable[[NDArray[np.uint8]], Any]) -> None:
    memory = Recycled()
    held = hold(memory.take(10))
    place = memory._arrays[0].ctypes.data
    del held
    assert memory.take(8).ctypes.data == place
    assert len(memory.take(4)) == 4
    assert len(memory._arrays) == 1


def test_what_is_too_small_is_given_back() -> None:
    memory = Recycled()
    for size in range(10, 10_000, 500):
        assert len(memory.take(size)) == size
    assert len(memory._arrays) == 1
