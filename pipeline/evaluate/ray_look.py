"""Features of splits' samples, computed by Ray Data actors from the shards where they lie."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError, RetryableError
from pipeline.evaluate import defects, features
from pipeline.evaluate.classifier import Classifier, reduced
from pipeline.evaluate.features import FeaturesConfig
from pipeline.evaluate.metrics import Described
from pipeline.evaluate.samples import Shape, read_samples, windows
from pipeline.images import Pixels

AS_THEY_ARE = ""
"""The change of `defects` that is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Samples to look at."""

    reader: IndexReader
    """Of the split that they lie in."""
    numbers: NDArray[np.int64]
    """Which, sorted."""
    changes: tuple[str, ...] = (AS_THEY_ARE,)
    """How: as they are, and with changes of `defects`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What is taken from N samples, in the order of their numbers."""

    described: Described
    pixels: Pixels
    """uint8 [N, S, S, C], `reduced`."""


class _Describer:
    """An actor: reads a window of samples, and has the networks look at them."""

    def __init__(
        self, network: Classifier, config: FeaturesConfig, readers: Mapping[str, IndexReader], shape: Shape
    ) -> None:
        torch.set_num_threads(1)
        self._network, self._readers, self._shape = network.eval(), readers, shape
        self._features = None if config.network == "domain" else features.load(config)

    def __call__(self, batch: Mapping[str, NDArray[np.object_]]) -> pa.Table:
        (name,), (numbers,), (changes,) = batch["name"], batch["numbers"], batch["changes"]
        try:
            result: object = self._look(str(name), np.asarray(numbers, np.int64), changes)
        except (InputError, RetryableError) as error:
            result = error
        # Pickled, an error too: raised in the task it would come back with Ray Data's advice added to its text.
        data = pa.array([pickle.dumps(result)], pa.large_binary())
        return pa.table({"name": [str(name)], "first": [int(numbers[0])], "result": data})

    def _look(self, name: str, numbers: NDArray[np.int64], changes: Sequence[str]) -> dict[str, Look]:
        samples = read_samples(self._readers[name], numbers, self._shape)
        found = {}
        for change in changes:
            pixels = defects.CHANGES[change](samples.pixels, numbers) if change else samples.pixels
            found[change] = Look(described=self._described(pixels, samples.labels), pixels=reduced(pixels))
        return found

    @torch.no_grad()
    def _described(self, pixels: Pixels, labels: NDArray[np.int64]) -> Described:
        own = self._network.features(torch.from_numpy(reduced(pixels)))
        logits = self._network.last(own)
        found = own.numpy() if self._features is None else self._features(pixels)
        return Described(features=found, logits=logits.numpy(), labels=labels)


def look(
    views: Mapping[str, View],
    shape: Shape,
    network: Classifier,
    config: FeaturesConfig,
    *,
    num_workers: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Mapping[str, Mapping[str, Look]]:
    """At the samples of each view, by its name and then by change, with one pool of actors; needs a running Ray.
    `on_progress` hears how many more samples were read.

    Raises what the first bad sample raises: EvaluateError, DatasetError, or StorageError; and FeaturesError.
    """
    parts = [
        {"name": name, "numbers": part, "changes": list(view.changes)}
        for name, view in views.items()
        for part in windows(view.numbers, shape)
    ]
    items = ray.data.from_items(parts, override_num_blocks=len(parts))
    count = min(num_workers, len(parts))
    results = items.map_batches(
        _Describer,
        fn_constructor_args=(network, config, {name: view.reader for name, view in views.items()}, shape),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, initial_size=count, max_size=count),
        num_cpus=1,
    )
    results.context.enable_progress_bars = False
    found: dict[str, dict[int, dict[str, Look]]] = {name: {} for name in views}
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        result = pickle.loads(batch["result"][0].as_py())
        if isinstance(result, Exception):
            raise result
        found[batch["name"][0].as_py()][batch["first"][0].as_py()] = result
        on_progress(len(next(iter(result.values())).pixels))
    return {
        name: {
            change: _joined([by_first[first][change] for first in sorted(by_first)]) for change in views[name].changes
        }
        for name, by_first in found.items()
    }


def _joined(parts: Sequence[Look]) -> Look:
    described = [dataclasses.asdict(part.described) for part in parts]
    whole = {name: np.concatenate([one[name] for one in described]) for name in described[0]}
    return Look(described=Described(**whole), pixels=np.concatenate([part.pixels for part in parts]))
