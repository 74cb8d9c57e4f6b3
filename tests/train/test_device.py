"""Batches on the device: the same values in the same order; to a GPU the next one is copied meanwhile."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.stream.batches import Batch
from pipeline.train.device import on_device


def _batches(count: int, drawn: list[int]) -> Iterator[Batch]:
    """Batches in memory that the next but one overwrites, as the feed's are."""
    memory = [np.empty((4, 8, 8, 3), np.uint8) for _ in range(2)]
    for step in range(count):
        drawn.append(step)
        image = memory[step % 2]
        image[:] = step
        label = np.full(4, step)
        yield Batch(step=step, image=image, label=label, sample=label, position=label, replaced=())


def test_on_a_cpu_nothing_is_copied_or_drawn_ahead() -> None:
    drawn: list[int] = []
    staged = on_device(_batches(3, drawn), torch.device("cpu"))
    for step in range(3):
        batch, image, label = next(staged)
        assert drawn == list(range(step + 1))
        assert image.data_ptr() == batch.image.ctypes.data
        assert image.eq(step).all()
        assert label.eq(step).all()
    assert next(staged, None) is None


@pytest.mark.gpu
def test_on_a_gpu_each_batch_comes_whole_and_one_is_drawn_ahead() -> None:
    drawn: list[int] = []
    device = torch.device("cuda")
    staged = on_device(_batches(50, drawn), device)
    for step in range(50):
        batch, image, label = next(staged)
        assert batch.step == step
        assert drawn == list(range(min(step + 2, 50)))
        busy = torch.ones(2000, 2000, device=device)
        for _ in range(10):  # kernels that are still running when the next batch is copied
            busy = busy @ busy * 1e-4
        assert image.device.type == label.device.type == "cuda"
        assert image.eq(step).all()
        assert label.eq(step).all()
    assert next(staged, None) is None
