"""Shards → the formats of LitData and MosaicML, with the same encoded bytes. Runs in .venv-peers.

`python -m tests.benchmarks.ingest.convert FORMAT OUT SHARD…`; OUT appears when it is whole.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.ingest.peers import stand_in_for_torchvision

_CHUNK_BYTES = 64 * 1024**2


def main(form: str, out: str, shards: list[str]) -> None:
    """Convert, unless it is done."""
    if os.path.isdir(out):
        return
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    writers: dict[str, Callable[[str, list[str]], None]] = {"litdata": _write_litdata, "mosaicml": _write_mosaicml}
    writers[form](partial, shards)
    os.rename(partial, out)


def samples(shard: str) -> Iterator[dict[str, Any]]:
    """Encoded image and label of each sample of a shard."""
    import webdataset

    for sample in webdataset.WebDataset([shard], shardshuffle=False):
        image = next(sample[extension] for extension in ("jpg", "png") if extension in sample)
        yield {"image": image, "label": int(sample["cls"])}


def _write_litdata(out: str, shards: list[str]) -> None:
    import litdata

    litdata.optimize(fn=samples, inputs=shards, output_dir=out, chunk_bytes=_CHUNK_BYTES, num_workers=2)


def _write_mosaicml(out: str, shards: list[str]) -> None:
    stand_in_for_torchvision()
    import streaming

    columns = {"image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=out, columns=columns, size_limit=_CHUNK_BYTES) as writer:
        for shard in shards:
            for sample in samples(shard):
                writer.write(sample)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
