"""A training run and a generation on a Ray of its own: `python -m tests.ray_metrics_driver FOLDER`.

Prints, as JSON, what the metrics agent showed last of each series, by name and tags of ours, and which it showed at the
end.
"""

import dataclasses
import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from pipeline import ray_metrics, s3, snapshot, storage
from pipeline.generate import shard_writer
from pipeline.generate.ray_generate import Workers as GenerateWorkers
from pipeline.generate.ray_generate import generate
from pipeline.ray_metrics import RunMetrics
from pipeline.train import ray_train
from pipeline.train.ownership import Ownership
from pipeline.train.spec import RunSpec
from tests.generate.test_generate import factory_of, make_snapshot, plan_of
from tests.small import make_dataset
from tests.train.run_driver import reader_of
from tests.train.test_loop import spec_of
from tests.train.test_ray_train import ONE

_REPORT_SEC = 1.0
_LOOK_SEC = 0.25


def main(folder: str) -> None:
    """Run both, and look at the agent's page all the while."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": int(1000 * _REPORT_SEC)},
    )
    ray_metrics.REFRESH_SEC = _REPORT_SEC / 2  # as often a report as else
    seen: dict[str, dict[str, float]] = {}
    last: set[str] = set()
    end = threading.Event()
    watcher = threading.Thread(target=_watch, args=(seen, last, end))
    watcher.start()
    _generate(folder)
    _train(folder)
    time.sleep(4 * _REPORT_SEC)  # Ray forgets a gauge after two
    end.set()
    watcher.join()
    print(json.dumps({"seen": _by_tags(seen), "last": sorted(last)}))


def _watch(seen: dict[str, dict[str, float]], last: set[str], end: threading.Event) -> None:
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while not end.wait(_LOOK_SEC):
        try:
            text = urllib.request.urlopen(page, timeout=10).read().decode()
        except OSError:
            continue  # the agent is not up yet
        last.clear()
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name.startswith("ray_ganymede_"):
                    tags = [one.labels[tag] for tag in ("run", "outcome", "stat") if one.labels.get(tag)]
                    name = "|".join([one.name, *tags])
                    seen.setdefault(name, {})[one.labels["WorkerId"]] = one.value
                    last.add(name)


def _by_tags(seen: dict[str, dict[str, float]]) -> dict[str, float]:
    """Processes' counters added up; of a gauge there is one."""
    return {name: sum(values.values()) for name, values in seen.items()}


def _generate(folder: str) -> None:
    """Three shards, one of them there already."""
    url, out = make_snapshot(f"{folder}/of"), f"{folder}/out"
    source = snapshot.load(url)
    plan = plan_of(source)
    there = shard_writer.build_shard(factory_of(plan, source), 0)
    storage.put_if_absent(storage.join(out, shard_writer.SPLIT, "shard-000000.tar"), there)
    generate(url, out, plan, {}, workers=GenerateWorkers(count=1), on_progress=lambda _: None)


def _train(folder: str) -> None:
    """Long enough to be looked at, on a dataset in which one image is damaged."""
    data = f"{folder}/data"
    make_dataset(data, num_samples=50)
    shard = Path(data, "train", "shard-000000.tar")
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\0\0\0\0", 1))
    reader = reader_of(data)
    spec = spec_of(f"{folder}/run", reader, total_kimg=2.0, tick_kimg=0.2, checkpoint_kimg=0.4)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, max_replaced_fraction=0.5))

    with Ownership(spec.run_url) as owner:
        ray_train.fit(dataclasses.replace(spec, owner=owner.number), reader, ONE, lambda *_: None)
    _tell_what_this_run_has_not(spec)


def _tell_what_this_run_has_not(spec: RunSpec) -> None:
    """A FID, as the driver hears of one; and puts tried again, told twice as after two ticks."""
    heard: list[Any] = []
    ray_train._told(spec, lambda *one: heard.append(one))(2000, {"fid": 12.5})
    assert heard == [(2000, {"fid": 12.5})]
    s3._retries.add(3)
    metrics = RunMetrics(spec.run_url)
    metrics.put_retries()
    metrics.put_retries()


if __name__ == "__main__":
    main(sys.argv[1])
