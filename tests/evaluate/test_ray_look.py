"""What actors say of samples is what one process says of them, in order, of several views at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import defects
from pipeline.evaluate.classifier import Classifier
from pipeline.evaluate.features import FeaturesConfig
from pipeline.evaluate.ray_look import View, look
from pipeline.evaluate.samples import EvaluateError, Shape, chosen, read_samples
from pipeline.images import Pixels
from tests.small import make_dataset


@pytest.fixture
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(1, 2).eval()


SHAPE, DOMAIN = Shape(resolution=16, channels=1), FeaturesConfig()


@pytest.mark.usefixtures("ray_session")
def test_features_of_shards_in_place(tmp_path: Path, network: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_dataset(str(tmp_path), num_samples=2500, shard_size=300)
    reader = IndexReader(str(tmp_path / "train"), made.splits["train"])
    some, few, heard = chosen(2500, 700, seed=0), chosen(2500, 30, seed=1), list[int]()
    monkeypatch.setattr("pipeline.evaluate.samples._WINDOW", 250)
    views = {
        "some": View(reader=reader, numbers=some),
        "few": View(reader=reader, numbers=few, changes=("", "noisy")),
    }
    found = look(views, SHAPE, network, DOMAIN, num_workers=2, on_progress=heard.append)
    assert sorted(heard) == [30, 200, 250, 250]
    assert {name: list(changes) for name, changes in found.items()} == {"some": [""], "few": ["", "noisy"]}

    def check(name: str, change: str, pixels: Pixels, labels: object) -> None:
        with torch.no_grad():
            features = network.features(torch.from_numpy(pixels))
            logits = network.last(features)
        seen = found[name][change]
        np.testing.assert_allclose(seen.described.features, features.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen.described.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
        assert np.array_equal(seen.pixels, pixels)
        assert np.array_equal(seen.described.labels, labels)

    samples = read_samples(reader, some, SHAPE)
    check("some", "", samples.pixels, samples.labels)
    samples = read_samples(reader, few, SHAPE)
    check("few", "", samples.pixels, samples.labels)
    check("few", "noisy", defects.noisy(samples.pixels, few), samples.labels)


@pytest.mark.usefixtures("ray_session")
def test_features_of_another_network(tmp_path: Path, network: Classifier) -> None:
    """An exported one; logits stay the classifier's."""
    made = make_dataset(str(tmp_path), num_samples=40)
    view = View(reader=IndexReader(str(tmp_path / "train"), made.splits["train"]), numbers=np.arange(40))
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    exported = torch.export.export(pooled, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, tmp_path / "pooled.pt2")
    config = FeaturesConfig(network="exported", weights=str(tmp_path / "pooled.pt2"))
    (seen,) = look({"one": view}, SHAPE, network, config, num_workers=1)["one"].values()
    image = (torch.from_numpy(seen.pixels).permute(0, 3, 1, 2) / 127.5 - 1.0).expand(-1, 3, -1, -1)
    np.testing.assert_allclose(seen.described.features, pooled(image).numpy(), atol=1e-5)
    assert seen.described.logits.shape == (40, 2)


@pytest.mark.usefixtures("ray_session")
def test_a_bad_sample_ends_it_in_its_own_words(tmp_path: Path, network: Classifier) -> None:
    made = make_dataset(str(tmp_path), num_samples=100)
    reader = IndexReader(str(tmp_path / "train"), made.splits["train"])
    row = reader.rows(40, 41).to_pylist()[0]
    data = bytearray(storage.read(reader.shard_url(row["shard"])))
    data[row["offset"] + 40] ^= 255
    storage.put(reader.shard_url(row["shard"]), bytes(data))
    with pytest.raises(EvaluateError, match=r"^/\S*shard-000001\.tar, key 000000040: [^\n]*$"):
        look({"one": View(reader=reader, numbers=np.arange(100))}, SHAPE, network, DOMAIN, num_workers=1)
