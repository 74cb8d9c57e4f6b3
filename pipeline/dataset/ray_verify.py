"""A dataset is verified by Ray Data: one task an index part."""

import pickle
from collections.abc import Callable

import pyarrow as pa
import ray.data

from pipeline.dataset import verify
from pipeline.dataset.record import DatasetRecord
from pipeline.errors import InputError, RetryableError


def problems(url: str, dataset: DatasetRecord, on_progress: Callable[[int], None]) -> list[str]:
    """All that is wrong with the dataset at `url`, in the order of its index; needs a running Ray.

    `on_progress` is told of the number of samples of each part that was read. Raises what storage raises where it
    cannot be asked.
    """
    units = [(split, listed) for split in sorted(dataset.splits) for listed in dataset.splits[split]]

    def check(batch: pa.Table) -> pa.Table:
        number = batch["id"][0].as_py()
        try:
            result: object = verify.check_part(url, dataset, *units[number])
        except (InputError, RetryableError) as error:
            result = error
        # Pickled, an error too: raised in the task it would come back with Ray Data's advice added to its text.
        return pa.table({"number": [number], "result": [pickle.dumps(result)]})

    numbers = ray.data.range(len(units), override_num_blocks=len(units))
    results = numbers.map_batches(check, batch_size=1, batch_format="pyarrow")
    results.context.enable_progress_bars = False
    found: dict[int, verify.Found] = {}
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        result = pickle.loads(batch["result"][0].as_py())
        if isinstance(result, Exception):
            raise result
        found[batch["number"][0].as_py()] = result
        on_progress(result.samples)
    return verify.check_whole(url, [found[number] for number in sorted(found)])
