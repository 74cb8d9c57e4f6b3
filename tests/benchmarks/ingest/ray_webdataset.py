"""Ray Data's own WebDataset reader: shards and samples shuffled, decoded by a map, batches taken in the driver."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import simplejpeg
from numpy.typing import NDArray

from pipeline import images
from tests.benchmarks.ingest.measure import Batch, Spec, print_result, steady_rate

_OBJECT_STORE_BYTES = 2**30
_SHUFFLE_SAMPLES = 1000


def main(spec: Spec) -> None:
    """Print images a second over a window; `workers` are the CPUs that Ray is given."""
    ray.init(
        address="local",
        num_cpus=spec.workers,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    print_result(steady_rate(_batches(spec), spec))
    sys.stdout.flush()
    ray.shutdown()
    os._exit(0)


def _batches(spec: Spec) -> Iterator[Batch]:
    """One long pass: the shards are listed so many times, since an execution that ends is slow to be started anew."""
    times = -(-spec.num_images // spec.num_samples)
    coded = ray.data.read_webdataset(
        spec.shards * times, suffixes=[spec.extension, "cls"], decoder=None, shuffle="files"
    )
    decode = _decode_jpeg if spec.extension == "jpg" else _decode_png
    dataset = coded.map_batches(
        lambda batch: _decoded(batch, spec.extension, decode), batch_size=spec.batch_size, batch_format="numpy"
    )
    batches = dataset.iter_batches(
        batch_size=spec.batch_size, drop_last=True, local_shuffle_buffer_size=_SHUFFLE_SAMPLES, batch_format="numpy"
    )
    for batch in batches:
        yield np.ascontiguousarray(batch["image"]), batch["label"]


def _decoded(batch: dict[str, NDArray[Any]], extension: str, decode: Any) -> dict[str, NDArray[Any]]:
    pixels = np.stack([decode(data) for data in batch[extension]])
    return {"image": pixels, "label": np.array([int(label) for label in batch["cls"]])}


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    return pixels


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    return images.decode(data, channels=3).pixels


if __name__ == "__main__":
    main(Spec.parse(sys.argv[1]))
