"""A driver in a process of its own: `python -m tests.train.run_driver JSON`, on the Ray that RAY_ADDRESS names, or on
one of its own.

Trains as the `train` verb does, on a dataset that lies there, and ends as it does: prints what it hears, and the error.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import ray

from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline.dataset import record
from pipeline.dataset.index import open_split
from pipeline.errors import InputError, RetryableError
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.chunk import ChunkReader, Decoder
from pipeline.stream.order import OrderPlan
from pipeline.train.ownership import Ownership
from pipeline.train.ray_train import fit, wasted_steps
from pipeline.train.workers import WorkersConfig, fit_workers
from tests.train.test_loop import spec_of


def reader_of(data: str, timeout_sec: float = 0.0) -> ChunkReader:
    """Of the dataset of `tests.small`, 16², grey."""
    index = open_split(data, record.read(data)[0], "train")
    plan = OrderPlan(num_samples=index.num_samples, seed=0, batch_size=8, num_lanes=4, steps_per_group=3)
    decoder = Decoder(resolution=16, channels=1)
    return ChunkReader(index=index, plan=plan, decoder=decoder, in_tasks=True, storage_timeout_sec=timeout_sec)


def main(arguments: list[str]) -> int:
    """0, or 1 or 2 as the verb has it."""
    told = json.loads(arguments[0])
    network, step = NetworkConfig(**told.get("network", {})), StepConfig(**told.get("step", {}))
    reader = reader_of(told["data"], told.get("timeout_sec", 0.0))
    spec = spec_of(told["run"], reader, **told.get("train", {}))
    if told.get("network"):
        spec = dataclasses.replace(spec, network=network, step=step)
    config = WorkersConfig(**{name: _tuple(value) for name, value in told.get("workers", {}).items()})
    start_ray(Terminal("test"))
    workers = fit_workers(config, spec.train.num_lanes, ray.cluster_resources())

    def on_progress(cur_nimg: int, _: Mapping[str, Any]) -> None:
        print(f"at {cur_nimg}", flush=True)

    try:
        with Ownership(spec.run_url) as owner:
            fit(dataclasses.replace(spec, owner=owner.number), reader, workers, on_progress, print)
    except (InputError, RetryableError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1 if isinstance(error, RetryableError) else 2
    print(f"done, {wasted_steps(spec.run_url)} steps wasted", flush=True)
    return 0


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
