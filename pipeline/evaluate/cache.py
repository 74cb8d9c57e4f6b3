"""Classifiers that were trained once, kept by what they were trained on and how."""

from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import torch

from pipeline import config, storage
from pipeline.evaluate import classifier
from pipeline.evaluate.classifier import Classifier
from pipeline.evaluate.samples import EvaluateError


def remembered(
    folder_url: str, identity: Mapping[str, Any], channels: int, num_classes: int, train: Callable[[], Classifier]
) -> Classifier:
    """The classifier that was trained under this identity, or that `train` gives, which is then kept. What was made by
    another torch is trained anew. Raises EvaluateError for a damaged file.
    """
    named = config.digest({**identity, "torch": torch.__version__, "recipe": classifier.VERSION})
    url = storage.join(folder_url, f"classifier-{named[:16]}.safetensors")
    if storage.stat(url) is None:
        storage.probe(folder_url)  # before the work
        network = train()
        storage.put_if_absent(url, classifier.encode(network))
        return network
    try:
        return classifier.decode(storage.read(url), channels, num_classes)
    except (safetensors.SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise EvaluateError(f"{url}: no classifier ({why}); remove it, and it will be trained again") from error
