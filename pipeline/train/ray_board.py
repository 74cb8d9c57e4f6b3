"""What a run's processes tell each other: an actor beside the driver, which outlives every group of workers."""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.train.checkpoint import Checkpoint


class Board:
    """How far the run is, where the next group starts, and what ended the last ones."""

    def __init__(self, cur_nimg: int) -> None:
        """`cur_nimg`: how far drivers before this one came."""
        self._cur_nimg, self._shown = cur_nimg, dict[str, Any]()
        self._heard = time.monotonic()
        self._start: Checkpoint | None = None
        self._failures, self._reason = 0, ""
        self._failure: Exception | None = None
        self._damaged: set[int] = set()

    def tell(self, cur_nimg: int, shown: dict[str, Any]) -> None:
        """Rank 0 is at `cur_nimg`."""
        self._cur_nimg, self._shown = cur_nimg, shown
        self.alive()

    def alive(self) -> None:
        """A rank is at work, whatever it waits for."""
        self._heard = time.monotonic()

    def state(self) -> tuple[int, dict[str, Any], float]:
        """cur_nimg, what to show beside it, and for how many seconds no rank has been heard."""
        return self._cur_nimg, self._shown, time.monotonic() - self._heard

    def begin(self, start: Checkpoint | None) -> tuple[int, int, str]:
        """A group starts. Returns the images whose training is lost, the failures without a checkpoint since, and why
        the group before ended: "" if there was none, or its driver ended and nothing is lost.
        """
        at = start.cur_nimg if start else 0
        if start and (self._start is None or start.number > self._start.number):
            self._failures = min(self._failures, 1)
        lost = max(0, self._cur_nimg - at)
        reason = self._reason or ("the driver before ended" if lost else "")
        self._cur_nimg, self._start, self._reason = at, start, "the cluster changed"
        self.alive()
        return lost, self._failures, reason

    def start(self) -> Checkpoint | None:
        """The checkpoint that data and ranks start from."""
        return self._start

    def failed(self, reason: str) -> None:
        """A group ended by the death of a worker."""
        self._failures, self._reason = self._failures + 1, reason

    def fail(self, error: Exception) -> None:
        """No restart mends this."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """The first such."""
        return self._failure

    def note_damaged(self, number: int) -> None:
        """A checkpoint that did not load."""
        self._damaged.add(number)

    def damaged(self) -> set[int]:
        """Those."""
        return self._damaged


def open_board(cur_nimg: int) -> Any:
    """A board on the driver's node: others come and go."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote(cur_nimg)
