"""What actors say of samples is what one process says of them, in order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import memorisation
from pipeline.evaluate.classifier import Classifier
from pipeline.evaluate.ray_look import look
from pipeline.evaluate.samples import EvaluateError, chosen, read_samples
from tests.small import make_dataset


@pytest.fixture
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(1, 2).eval()


@pytest.mark.usefixtures("ray_session")
def test_features_of_shards_in_place(tmp_path: Path, network: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_dataset(str(tmp_path), num_samples=2500, shard_size=300)
    reader = IndexReader(str(tmp_path / "train"), made.splits["train"])
    numbers, heard = chosen(2500, 700, seed=0), list[int]()
    monkeypatch.setattr("pipeline.evaluate.samples._WINDOW", 250)
    found = look(reader, numbers, (16, 1), network, num_workers=2, on_progress=heard.append)
    assert sum(heard) == 700
    assert len(heard) == 3
    samples = read_samples(reader, numbers, 16, 1)
    with torch.no_grad():
        features = network.features(torch.from_numpy(samples.pixels))
        logits = network.last(features)
    np.testing.assert_allclose(found.described.features, features.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.described.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(found.small, memorisation.shrunk(samples.pixels))
    assert np.array_equal(found.described.labels, samples.labels)


@pytest.mark.usefixtures("ray_session")
def test_a_bad_sample_ends_it_in_its_own_words(tmp_path: Path, network: Classifier) -> None:
    made = make_dataset(str(tmp_path), num_samples=100)
    reader = IndexReader(str(tmp_path / "train"), made.splits["train"])
    row = reader.rows(40, 41).to_pylist()[0]
    data = bytearray(storage.read(reader.shard_url(row["shard"])))
    data[row["offset"] + 40] ^= 255
    storage.put(reader.shard_url(row["shard"]), bytes(data))
    with pytest.raises(EvaluateError, match=r"^/\S*shard-000001\.tar, key 000000040: [^\n]*$"):
        look(reader, chosen(100, 100, seed=0), (16, 1), network, num_workers=1)
