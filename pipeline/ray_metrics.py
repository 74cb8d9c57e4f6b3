"""What a run tells Prometheus, by Ray's metrics agent on each node, which shows names with `ray_` in front of them.

Everything is handed over once a tick, a chunk or a shard, or twice a second by the driver: never within a step. What a
process counted in the last seconds before it was killed may be missing. Ray forgets a gauge twenty seconds after it was
set, so each is set again all the while.
"""

import functools
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Metric

from pipeline import storage

COUNTERS: Mapping[str, str] = {
    "ganymede_read_nimg": "Real images that training took.",
    "ganymede_quarantined_nimg": "Of these, images that could not be read and were replaced by others.",
    "ganymede_read_bytes": "Bytes of the chunks that reached training: image files, or pixels where tasks decode.",
    "ganymede_steps": "Iterations of training.",
    "ganymede_step_sec": "Seconds of ticks, all their iterations took and waited for.",
    "ganymede_data_wait_sec": "Of these, seconds that rank 0 waited for data.",
    "ganymede_checkpoint_sec": "Seconds that training stood still to copy its state for a checkpoint.",
    "ganymede_generated_nimg": "Images of the shards that are done.",
    "ganymede_shards": "Shards done, by outcome: written, adopted, conflicted.",
    "ganymede_put_retries": "Puts to the object store that were tried once more.",
}
GAUGES: Mapping[str, str] = {
    "ganymede_cur_nimg": "Images seen, the clock of training.",
    "ganymede_total_nimg": "The clock at the end of the run.",
    "ganymede_stat": "Means over the last tick: losses, logits, penalties on the gradient, by stat.",
    "ganymede_fid": "FID of the last snapshot that has one.",
    "ganymede_shards_left": "Shards that the driver still waits for.",
}
STATS = (
    "d_loss",
    "g_loss",
    "real_logits",
    "gen_logits",
    "real_prob",
    "gen_prob",
    "r1_penalty",
    "r2_penalty",
    "gradient_penalty",
)
"""Those of a tick that are shown, where its step has them."""
_MORE_TAGS: Mapping[str, tuple[str, ...]] = {"ganymede_shards": ("outcome",), "ganymede_stat": ("stat",)}
REFRESH_SEC = 5.0
_gauges_lock = threading.Lock()
_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
"""Name and tags → what was set last."""
_retries_lock = threading.Lock()
_retries_told = 0


class RunMetrics:
    """The metrics of one run, as one process of it tells them. Threads may share it."""

    def __init__(self, run_url: str) -> None:
        self._tags = {"run": run_url}

    def add(self, name: str, value: float, **tags: str) -> None:
        """Count `value` more; Ray refuses zero, which says nothing."""
        if value > 0:
            _metric(name).inc(value, tags=self._tags | tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge; it is shown for as long as this process lives."""
        tags = self._tags | tags
        with _gauges_lock:
            _gauges[name, tuple(tags.items())] = value
            _metric(name).set(value, tags=tags)
            _start_refreshing()

    def tick(self, stats: Mapping[str, float], seen_nimg: int, batch_size: int, real_batches: int) -> None:
        """A tick of training in which the clock went on by `seen_nimg`, as the loop reports it."""
        read_nimg = seen_nimg * real_batches
        self.add("ganymede_read_nimg", read_nimg)
        self.add("ganymede_quarantined_nimg", round(stats["replaced"] * read_nimg))
        self.add("ganymede_steps", seen_nimg // batch_size)
        self.add("ganymede_step_sec", stats["elapsed_sec"])
        self.add("ganymede_data_wait_sec", stats["data_wait_share"] * stats["elapsed_sec"])
        self.add("ganymede_checkpoint_sec", stats["checkpoint_sec"])
        for name in STATS:
            if name in stats:
                self.set("ganymede_stat", stats[name], stat=name)

    def put_retries(self) -> None:
        """Count what this process's puts were tried again since it was last told, for whatever run."""
        global _retries_told
        with _retries_lock:
            before, _retries_told = _retries_told, storage.put_retries()
            self.add("ganymede_put_retries", _retries_told - before)


@functools.cache
def _start_refreshing() -> None:
    threading.Thread(target=_refresh, name="gauges", daemon=True).start()


def _refresh() -> None:
    while True:
        time.sleep(REFRESH_SEC)
        with _gauges_lock:
            for (name, tags), value in _gauges.items() if ray.is_initialized() else ():
                _metric(name).set(value, tags=dict(tags))


@functools.cache
def _metric(name: str) -> Any:
    kind: type[Metric] = Counter if name in COUNTERS else Gauge
    return kind(name, {**COUNTERS, **GAUGES}[name], tag_keys=("run", *_MORE_TAGS.get(name, ())))
