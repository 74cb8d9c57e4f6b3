"""FID of a run's snapshots, by a small classifier of its training images: a number to compare them with one another."""

import dataclasses

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from pipeline import philox, snapshot, storage
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import classifier
from pipeline.evaluate.classifier import Classifier, Recipe, reduced, rotated, train_classifier
from pipeline.evaluate.moments import Moments, fid, merged, moments
from pipeline.evaluate.samples import Samples, Shape, chosen, read_all
from pipeline.gan.sample import sample
from pipeline.images import Pixels
from pipeline.train.spec import RunSpec

_LEARNT_FROM = 20_000
"""Training images that the classifier sees, at most."""
_STEP_IMAGES, _STEPS = 128, (50, 500)
_SHARE = 0.03
"""The classifier sees this share of the images that are seen in the whole run, in so many steps at least and at
most: so it costs a short run little."""
_TURNS = 4
_PIXELS_AT_ONCE = 2**19
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What all snapshots of a run are compared with."""

    network: Classifier
    """Whose features are compared."""
    real: Moments
    """Of n training images."""
    labels: NDArray[np.int64]
    """Of those, [n]; a snapshot's images get the same. 0 without classes."""


def measure(spec: RunSpec, index: IndexReader, url: str) -> float:
    """FID of a snapshot of the run, from the same noise, labels and real images at every call.

    The first for a run makes and stores what it compares with. Raises what reading and storing raise.
    """
    stick = _yardstick(spec, index)
    source = snapshot.load(url)
    key, parts = philox.stream_key(_SEED, "fid/z"), []
    for rows in _windows(len(stick.labels), spec.shape.resolution):
        z = philox.normals(key, rows, source.config.network.z_dim)
        arrays = (torch.from_numpy(array) for array in (z, stick.labels[rows]))
        parts.append(_moments(stick.network, sample(source.G_ema, *arrays, precision="fp32").numpy()))
    return fid(stick.real, merged(parts))


def _yardstick(spec: RunSpec, index: IndexReader) -> Yardstick:
    """As stored below the run, so that a resumed run compares with the same; made where it is not."""
    network_url, real_url = (
        storage.join(spec.run_url, "fid", f"{name}.safetensors") for name in ("classifier", "real")
    )
    if storage.stat(real_url) is None:
        training = _read(spec, index)
        if storage.stat(network_url) is None:
            storage.put_if_absent(network_url, classifier.encode(_train(spec, training)))
        storage.put_if_absent(real_url, _real(spec, training, _network(spec, network_url)))
    real = {name: tensor.numpy() for name, tensor in safetensors.torch.load(storage.read(real_url)).items()}
    found = Moments(count=len(real["labels"]), mean=real["mean"], scatter=real["scatter"])
    return Yardstick(network=_network(spec, network_url), real=found, labels=real["labels"])


def _read(spec: RunSpec, index: IndexReader) -> Samples:
    """Some of the training images, as networks are shown them but for chance."""
    numbers = chosen(index.num_samples, max(_LEARNT_FROM, spec.train.fid_samples), _SEED)
    shape = Shape(resolution=spec.shape.resolution, channels=spec.shape.channels, fit="crop")
    return read_all(index, numbers, shape, reduced)


def _labelled(spec: RunSpec) -> bool:
    """Whether there is a class to tell from another; else the classifier tells how far images are turned."""
    return len(spec.classes) > 1


def _train(spec: RunSpec, training: Samples) -> Classifier:
    pixels, labels = (training.pixels, training.labels) if _labelled(spec) else rotated(training.pixels)
    wanted = int(_SHARE * spec.train.total_nimg / _STEP_IMAGES)
    recipe = Recipe(steps=min(max(wanted, _STEPS[0]), _STEPS[1]), seed=_SEED)
    return train_classifier(pixels, labels, len(spec.classes) if _labelled(spec) else _TURNS, recipe)


def _network(spec: RunSpec, url: str) -> Classifier:
    """The stored one, whoever made it."""
    return classifier.decode(storage.read(url), spec.shape.channels, len(spec.classes) if _labelled(spec) else _TURNS)


def _real(spec: RunSpec, training: Samples, network: Classifier) -> bytes:
    """Moments and labels of the images that snapshots are compared with, as safetensors."""
    rows = chosen(len(training.labels), spec.train.fid_samples, _SEED)
    found = merged([_moments(network, training.pixels[rows[at]]) for at in _windows(len(rows), spec.shape.resolution)])
    labels = training.labels[rows] if spec.shape.num_classes else np.zeros(len(rows), np.int64)
    arrays = {"mean": found.mean, "scatter": found.scatter, "labels": labels}
    return bytes(safetensors.torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}))


@torch.no_grad()
def _moments(network: Classifier, pixels: Pixels) -> Moments:
    """Of the features of images, uint8 [n, R, R, C]."""
    return moments(network.features(torch.from_numpy(reduced(pixels))).numpy())


def _windows(count: int, resolution: int) -> list[NDArray[np.int64]]:
    """Numbers below `count`, in parts that a CPU's caches hold."""
    size = max(1, min(100, _PIXELS_AT_ONCE // resolution**2))
    return np.split(np.arange(count, dtype=np.int64), range(size, count, size))
