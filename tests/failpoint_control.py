"""The control folder of `failpoints/sitecustomize.py`, from the side of a test: who shall die where, and who did."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.train.checkpoint import COMMIT, OBJECTS

WORKER_STEPS = ("before shard put", "after shard put", "before part put", "after part put")
DRIVER_STEPS = ("before dataset.json", "after dataset.json")
STEPS = WORKER_STEPS + DRIVER_STEPS
"""The named steps of a dataset's commit, in their order."""
PUT_STEPS = tuple(f"{when} checkpoint {name} put" for name in (*OBJECTS, COMMIT) for when in ("before", "after"))
DELETE_STEPS = tuple(f"{when} checkpoint {name} delete" for name in (COMMIT, *OBJECTS) for when in ("before", "after"))
"""Those of a checkpoint's commit, and of its end."""
_FOLDER = Path(__file__).parent / "failpoints"
_ROOT = Path(__file__).parents[1]


class Failpoints:
    """One control folder, for all drivers and workers of a cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        for name in ("armed", "claimed"):
            (folder / name).mkdir(parents=True)

    def environment(self) -> Mapping[str, str]:
        """What puts the failpoints into every Python process that has it."""
        return {"GANYMEDE_FAILPOINTS": str(self._folder), "PYTHONPATH": f"{_FOLDER}:{_ROOT}"}

    def arm(self, step: str, skip: int = 0, fate: str = "killed") -> None:
        """Let the process that comes to `step` after `skip` others be `killed`, or `frozen` there until it is."""
        assert step in STEPS + PUT_STEPS + DELETE_STEPS
        (self._folder / "armed" / f"{self._number:06d} {step} {skip} {fate}").touch()
        self._number += 1

    def armed(self) -> list[str]:
        """Fates that nobody has met yet."""
        return sorted(path.name for path in (self._folder / "armed").iterdir())

    def disarm(self) -> None:
        """Let nobody meet what is armed."""
        for path in (self._folder / "armed").iterdir():
            path.unlink()

    def thaw(self) -> None:
        """Let those that are frozen go on."""
        for path in (self._folder / "claimed").glob("* frozen"):
            path.unlink()

    def passed(self, out: str) -> list[Mapping[str, Any]]:
        """Steps that processes came to for an output URL, in order: `pid`, `step`, `url`."""
        return [line for line in self._log("passed.log") if line["url"].startswith(f"{out}/")]

    def killed(self) -> list[str]:
        """Steps at which processes died, in the order in which that was armed. One that was killed from outside at the
        moment that it came there is among them.
        """
        names = sorted(path.name for path in (self._folder / "claimed").glob("* killed"))
        return [name.partition(" ")[2].rsplit(" ", 2)[0] for name in names]

    def frozen(self) -> list[Mapping[str, Any]]:
        """Processes that stand at a step, or stood there till they were killed: `pid`, `raylet` of its node, `step`."""
        return self._log("frozen.log")

    def last_step(self, pid: int) -> str:
        """The last step that a process came to."""
        steps = [line["step"] for line in self._log("passed.log") if line["pid"] == pid]
        return steps[-1] if steps else "nothing yet"

    def _log(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line.endswith("}")]  # others are not whole (yet)
