"""Features of a split's samples, computed by Ray Data actors from the shards where they lie."""

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
from pipeline.evaluate import defects, memorisation
from pipeline.evaluate.classifier import Classifier, reduced
from pipeline.evaluate.metrics import Described
from pipeline.evaluate.samples import read_samples, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What is taken from N samples, in the order of their numbers."""

    described: Described
    small: memorisation.Small
    """[N, S, S, C]."""


class _Describer:
    """An actor: reads a window of samples, and has the network look at them."""

    def __init__(self, network: Classifier, reader: IndexReader, shape: tuple[int, int], change: str) -> None:
        torch.set_num_threads(1)
        self._network, self._reader, self._shape, self._change = network.eval(), reader, shape, change

    def __call__(self, batch: Mapping[str, NDArray[np.object_]]) -> pa.Table:
        (numbers,) = batch["numbers"]
        try:
            result: object = self._look(np.asarray(numbers, np.int64))
        except (InputError, RetryableError) as error:
            result = error
        # Pickled, an error too: raised in the task it would come back with Ray Data's advice added to its text.
        return pa.table({"first": [int(numbers[0])], "result": pa.array([pickle.dumps(result)], pa.large_binary())})

    @torch.no_grad()
    def _look(self, numbers: NDArray[np.int64]) -> Look:
        samples = read_samples(self._reader, numbers, *self._shape)
        pixels = defects.CHANGES[self._change](samples.pixels, numbers) if self._change else samples.pixels
        features = self._network.features(torch.from_numpy(reduced(pixels)))
        logits = self._network.last(features)
        return Look(
            described=Described(features=features.numpy(), logits=logits.numpy(), labels=samples.labels),
            small=memorisation.shrunk(pixels),
        )


def look(
    reader: IndexReader,
    numbers: NDArray[np.int64],
    shape: tuple[int, int],
    network: Classifier,
    *,
    num_workers: int,
    change: str = "",
    on_progress: Callable[[int], None] = lambda _: None,
) -> Look:
    """At the samples with these sorted numbers, of a dataset of (resolution, channels), as they are or with a `change`
    of `defects`; needs a running Ray. `on_progress` hears how many more are done.

    Raises what the first bad sample raises: EvaluateError, DatasetError, or StorageError.
    """
    parts = windows(numbers, *shape)
    items = ray.data.from_items([{"numbers": part} for part in parts], override_num_blocks=len(parts))
    count = min(num_workers, len(parts))
    results = items.map_batches(
        _Describer,
        fn_constructor_args=(network, reader, shape, change),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, initial_size=count, max_size=count),
        num_cpus=1,
    )
    results.context.enable_progress_bars = False
    found: dict[int, Look] = {}
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        result = pickle.loads(batch["result"][0].as_py())
        if isinstance(result, Exception):
            raise result
        found[batch["first"][0].as_py()] = result
        on_progress(len(result.small))
    return _joined([found[first] for first in sorted(found)])


def _joined(parts: Sequence[Look]) -> Look:
    described = [dataclasses.asdict(part.described) for part in parts]
    whole = {name: np.concatenate([one[name] for one in described]) for name in described[0]}
    return Look(described=Described(**whole), small=np.concatenate([part.small for part in parts]))
