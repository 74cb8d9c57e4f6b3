"""The number by which a run compares its snapshots."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import snapshot, storage
from pipeline.gan.networks.build import ImageShape
from pipeline.stream.chunk import ChunkReader
from pipeline.train import fid
from pipeline.train.fid import measure
from pipeline.train.spec import RunSpec
from tests.small import shape_image
from tests.train.test_loop import reader, spec_of, train

__all__ = ["reader"]


@pytest.fixture
def spec(tmp_path: Path, reader: ChunkReader) -> RunSpec:
    """Of a run that has a snapshot."""
    spec = spec_of(str(tmp_path / "run"), reader, total_kimg=0.04, snapshot_kimg=0.04, fid_samples=40)
    train(spec, reader)
    return spec


def test_it_is_the_same_again_and_what_it_compares_with_stays(spec: RunSpec, reader: ChunkReader) -> None:
    """Also where the images are gone, with other settings, and in another run."""
    url = snapshot.find(spec.run_url)
    found = measure(spec, reader.index, url)
    other = dataclasses.replace(spec, run_url=f"{spec.run_url}-2")
    assert measure(other, reader.index, url) == found > 0
    shutil.rmtree(Path(spec.run_url).parent / "data")
    changed = dataclasses.replace(spec, train=dataclasses.replace(spec.train, fid_samples=10, snapshot_kimg=99.0))
    assert measure(changed, reader.index, url) == found
    names = [entry.name for entry in storage.list_entries(f"{spec.run_url}/fid")]
    assert names == ["classifier.safetensors", "real.safetensors"]


@pytest.mark.parametrize("classes", [True, False])
def test_images_like_the_real_ones_have_a_lower_one(
    spec: RunSpec, reader: ChunkReader, monkeypatch: pytest.MonkeyPatch, classes: bool
) -> None:
    if not classes:
        shape = ImageShape(resolution=16, channels=1, num_classes=0)
        spec = dataclasses.replace(spec, shape=shape, classes=(), class_counts=())
    asked: list[int] = []

    def real(_: Any, z: torch.Tensor, label: torch.Tensor, *, precision: str) -> torch.Tensor:
        assert precision == "fp32"
        asked.extend(label.tolist())
        return torch.from_numpy(np.stack([shape_image(999 + i, i % 2, 16) for i in range(len(z))]))

    def worse(_: Any, z: torch.Tensor, label: torch.Tensor, *, precision: str) -> torch.Tensor:
        return real(_, z, label, precision=precision) // 8

    found = []
    for one in (real, worse):
        monkeypatch.setattr(fid, "sample", one)
        found.append(measure(spec, reader.index, snapshot.find(spec.run_url)))
    assert found[0] < 0.5 * found[1]
    assert len(asked) == 2 * 40
    assert set(asked) == ({0, 1} if classes else {0})
