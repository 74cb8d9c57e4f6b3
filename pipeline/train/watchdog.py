"""Ends a process that waits without end: for data, or inside an iteration. Such a run would wait without a word."""

import threading
import time
from collections.abc import Callable, Iterator

from pipeline.stream.batches import Batch
from pipeline.train.workers import WorkersConfig

_LOOKS_A_LIMIT, _LOOK_SEC = 20, 5.0


class Watchdog:
    """Watches from a thread: `on_stuck(awaited, limit_sec)` hears of the first wait that is too long, `on_look` that
    the process lives.
    """

    def __init__(
        self, config: WorkersConfig, on_stuck: Callable[[str, float], None], on_look: Callable[[], object]
    ) -> None:
        self._config, self._on_stuck, self._on_look = config, on_stuck, on_look
        self._begin("start", config.stalled_sec)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        self._begin("first batch", self._config.first_batch_sec)
        for batch in batches:
            self._begin("end of an iteration", self._config.stalled_sec)
            yield batch
            self._begin("batch", self._config.stalled_sec)

    def _begin(self, awaited: str, limit_sec: float) -> None:
        self._awaited = awaited, limit_sec, time.monotonic()

    def _watch(self) -> None:
        shortest = min(self._config.first_batch_sec, self._config.stalled_sec)
        while not self._stop.wait(min(shortest / _LOOKS_A_LIMIT, _LOOK_SEC)):
            self._on_look()
            awaited, limit_sec, since = self._awaited
            if time.monotonic() - since > limit_sec:
                self._on_stuck(awaited, limit_sec)
                return
