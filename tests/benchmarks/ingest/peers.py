"""The peers, each as its documentation says to use it with a PyTorch loader: shuffled, whole batches, uint8 NHWC.

Runs in .venv-peers and imports nothing of ours but the clock. LitData and MosaicML read the same encoded bytes in their
own formats (`convert`); a contender's name is LIBRARY or LIBRARY+DECODER.
"""

import importlib.machinery
import io
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, default_collate

from tests.benchmarks.ingest.measure import Batch, Spec, print_result, steady_rate

_SHUFFLE_SAMPLES = 1000
Decode = Callable[[bytes], NDArray[np.uint8]]


def main(spec: Spec) -> None:
    """Print images a second over a window."""
    library, _, decoder = spec.contender.partition("+")
    make = {"webdataset": _webdataset, "litdata": _litdata, "mosaicml": _mosaicml}[library]
    print_result(steady_rate(make(spec, decoder), spec))
    sys.stdout.flush()
    os._exit(0)  # without waiting for loader processes that fill queues nobody reads


def _webdataset(spec: Spec, decoder: str) -> Iterator[Batch | None]:
    """Shards and samples shuffled; without a decoder its own stock one, `rgb8`."""
    import webdataset

    dataset = webdataset.WebDataset(spec.shards, shardshuffle=len(spec.shards)).shuffle(_SHUFFLE_SAMPLES)
    if decoder:
        dataset = dataset.to_tuple(spec.extension, "cls").map_tuple(_decoder(decoder), int)
    else:
        dataset = dataset.decode("rgb8").to_tuple(spec.extension, "cls")
    dataset = dataset.batched(spec.batch_size, collation_fn=_collate_pairs, partial=False).repeat()
    return _passes(webdataset.WebLoader(dataset, batch_size=None, num_workers=spec.workers))


def _litdata(spec: Spec, decoder: str) -> Iterator[Batch | None]:
    import litdata

    dataset = litdata.StreamingDataset(spec.url, shuffle=True, drop_last=True, transform=_Transform(_decoder(decoder)))
    return _passes(
        litdata.StreamingDataLoader(
            dataset, batch_size=spec.batch_size, num_workers=spec.workers, drop_last=True, persistent_workers=True
        )
    )


def _mosaicml(spec: Spec, decoder: str) -> Iterator[Batch | None]:
    stand_in_for_torchvision()
    import streaming

    streaming.base.util.clean_stale_shared_memory()  # of a run that was killed: it would refuse to start
    transform = _Transform(_decoder(decoder))

    class Decoded(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[NDArray[np.uint8], int]:
            return transform(super().__getitem__(at))

    dataset = Decoded(local=spec.url, shuffle=True, batch_size=spec.batch_size)
    return _passes(
        DataLoader(
            dataset, batch_size=spec.batch_size, num_workers=spec.workers, drop_last=True, persistent_workers=True
        )
    )


def stand_in_for_torchvision() -> None:
    """MosaicML imports torchvision for datasets of its own that are not used here, and with a CPU build of torch
    torchvision cannot be imported: two names stand in for it.
    """
    wanted: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }
    for name, content in wanted.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        sys.modules[name] = module


class _Transform:
    """A stored sample → pixels and label."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def __call__(self, sample: dict[str, Any]) -> tuple[NDArray[np.uint8], int]:
        return self._decode(sample["image"]), sample["label"]


def _collate_pairs(samples: list[tuple[NDArray[np.uint8], int]]) -> Any:
    return default_collate(samples)


def _decoder(name: str) -> Decode:
    return {"simplejpeg": _decode_simplejpeg, "opencv": _decode_opencv, "pillow": _decode_pillow}[name]


def _decode_simplejpeg(data: bytes) -> NDArray[np.uint8]:
    import simplejpeg

    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    return pixels


def _decode_opencv(data: bytes) -> NDArray[np.uint8]:
    import cv2

    pixels: NDArray[np.uint8] = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return pixels


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _passes(loader: Iterable[Any]) -> Iterator[Batch | None]:
    """Pass after pass of a loader, None after each; webdataset's one pass has no end."""
    while True:
        for image, label in loader:
            yield image.numpy(), label.numpy()
        yield None


if __name__ == "__main__":
    main(Spec.parse(sys.argv[1]))
