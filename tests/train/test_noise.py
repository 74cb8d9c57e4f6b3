"""The step's random numbers: a row's own, whatever batch, rank or part it is in."""

import numpy as np
import pytest
import torch

from pipeline.train.noise import RowNoise

CPU = torch.device("cpu")
KINDS = ("normals", "uniforms", "signs")


def noise(position: list[int], seed: int = 0, attempt: int = 1) -> RowNoise:
    return RowNoise(seed, attempt, np.array(position), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_position_not_on_batch(kind: str) -> None:
    together = getattr(noise([5, 6, 900]), kind)("z/G", 40)
    assert together.shape == (3, 40)
    assert torch.equal(together[1:2], getattr(noise([6]), kind)("z/G", 40))
    assert torch.equal(together[1:], getattr(noise([5, 6, 900]).part(slice(1, 3)), kind)("z/G", 40))
    for other in (noise([5, 6, 900], seed=1), noise([5, 6, 900], attempt=2)):  # a rollback draws new noise
        assert not torch.equal(together, getattr(other, kind)("z/G", 40))
    assert not torch.equal(together, getattr(noise([5, 6, 900]), kind)("z/D", 40))


def test_what_is_drawn_has_its_distribution() -> None:
    rows = noise(list(range(4000)))
    normals, uniforms, signs = (getattr(rows, kind)("a", 20).double() for kind in KINDS)
    assert normals.mean().abs() < 0.02
    assert normals.std().item() == pytest.approx(1, abs=0.02)
    assert 0 < uniforms.min() < 0.001
    assert 0.999 < uniforms.max() < 1
    assert uniforms.mean().item() == pytest.approx(0.5, abs=0.005)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.02
    assert (signs[:, :-1] * signs[:, 1:]).mean().abs() < 0.02
