"""The decode ceiling: all cores decode images that lie in memory, and do nothing else."""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.dataset import record
from pipeline.dataset.index import open_split
from tests.benchmarks.ingest.measure import CheckError, Spec, print_result

_HELD_IMAGES = 2_000


def main(spec: Spec) -> None:
    """Print images a second over a window."""
    coded, labels = _held(spec)
    decode = _decode_jpeg if spec.extension == "jpg" else _decode_png
    for data, label in zip(coded[:100], labels[:100], strict=True):
        if int(decode(data).sum(dtype=np.uint8)) != label:
            raise CheckError(f"{spec.contender}: an image does not add up to its label")
    _rate(decode, coded, spec.workers, spec.warmup_sec)
    print_result(_rate(decode, coded, spec.workers, spec.window_sec))


def _held(spec: Spec) -> tuple[list[bytes], list[int]]:
    """Encoded images and their labels."""
    dataset, _ = record.read(spec.url)
    index = open_split(spec.url, dataset, "train")
    rows = index.rows(0, min(_HELD_IMAGES, spec.num_samples)).to_pylist()
    coded = [storage.read_range(index.shard_url(row["shard"]), row["offset"], row["size"]) for row in rows]
    return coded, [row["label"] for row in rows]


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    return pixels


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    return images.decode(data, channels=3).pixels


def _rate(decode: Callable[[bytes], object], coded: list[bytes], num_threads: int, window_sec: float) -> dict[str, Any]:
    counts = [0] * num_threads
    started = time.perf_counter()
    until = started + window_sec

    def work(thread: int) -> None:
        for data in itertools.cycle(coded[thread::num_threads]):
            decode(data)
            counts[thread] += 1
            if time.perf_counter() >= until:
                return

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {"img_per_sec": sum(counts) / seconds, "images": sum(counts), "seconds": seconds}


if __name__ == "__main__":
    main(Spec.parse(sys.argv[1]))
