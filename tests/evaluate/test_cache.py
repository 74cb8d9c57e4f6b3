"""A classifier is trained once for the same images and recipe."""

from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.evaluate import classifier
from pipeline.evaluate.cache import remembered
from pipeline.evaluate.classifier import Classifier, Recipe, train_classifier
from pipeline.evaluate.samples import EvaluateError
from tests.evaluate.pictures import labelled


def trained() -> Classifier:
    return train_classifier(*labelled(200, seed=0), 4, Recipe(steps=5))


def never() -> Classifier:
    raise AssertionError("trained again")


def test_it_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, identity = str(tmp_path), {"training": "abc", "steps": 5}
    first = remembered(url, identity, 1, 4, trained)
    again = remembered(url, identity, 1, 4, never)
    pixels = torch.from_numpy(labelled(20, seed=1)[0])
    assert torch.equal(first(pixels), again(pixels))
    with pytest.raises(AssertionError, match="trained again"):
        remembered(url, {"training": "abc", "steps": 6}, 1, 4, never)
    monkeypatch.setattr(classifier, "VERSION", 2)
    with pytest.raises(AssertionError, match="trained again"):
        remembered(url, identity, 1, 4, never)


@pytest.mark.parametrize("damaged", [b"", b"not safetensors", classifier.encode(Classifier(3, 4))])
def test_a_damaged_file_is_named(tmp_path: Path, damaged: bytes) -> None:
    remembered(str(tmp_path), {}, 1, 4, trained)
    (name,) = [entry.name for entry in storage.list_entries(str(tmp_path))]
    storage.put(str(tmp_path / name), damaged)
    with pytest.raises(EvaluateError, match=r"classifier-\w+\.safetensors: no classifier .*; remove it"):
        remembered(str(tmp_path), {}, 1, 4, never)
