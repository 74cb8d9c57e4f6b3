"""`ganymede evaluate`: real and synthetic images → a report of what the synthetic ones are worth, and a verdict."""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from typing import Any

import ray

from jobs import cli
from jobs.ray_session import start_ray
from jobs.terminal import Progress, Terminal
from pipeline import storage
from pipeline.config import to_dict
from pipeline.dataset import record
from pipeline.dataset.index import open_split
from pipeline.dataset.record import DatasetRecord
from pipeline.errors import InputError
from pipeline.evaluate import gates
from pipeline.evaluate.gates import GateConfig
from pipeline.evaluate.ray_evaluate import EvaluateConfig, Sides, evaluate

FORMAT = 1
REPORT = "report.json"
_SPLIT = "train"  # where generated images lie


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """An evaluation."""

    real: str
    """URL of the dataset that was trained on."""
    synthetic: str
    """URL of the dataset that was generated."""
    out: str
    """URL to write report.json to. The same command again shows its verdict."""
    training_split: str = "train"
    """Split of the real images that was trained on."""
    reference_split: str = "test"
    """Split of the real images to compare with, which nothing was trained on."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """How much is looked at."""
    gates: GateConfig = dataclasses.field(default_factory=GateConfig)
    """What must be found."""
    num_workers: int = 0
    """Processes that look at images; 0: one for each CPU."""


def run(job: EvaluateJob, terminal: Terminal) -> int:
    """Evaluate, or show what was found before; the verdict is the exit code."""
    out = storage.resolve(job.out)
    (real_url, real, real_digest), (gen_url, gen, gen_digest) = (_open(url) for url in (job.real, job.synthetic))
    _check_alike(real_url, real, gen_url, gen)
    inputs = {
        "real": real_digest,
        "synthetic": gen_digest,
        "training_split": job.training_split,
        "reference_split": job.reference_split,
        "evaluate": to_dict(job.evaluate),
    }
    found = _stored(out, inputs)
    if found is None:
        storage.probe(out)
        sides = Sides(
            training=open_split(real_url, real, job.training_split),
            reference=open_split(real_url, real, job.reference_split),
            gen=open_split(gen_url, gen, _SPLIT),
            shape=(real.resolution, real.channels),
            classes=real.classes,
        )
        start_ray(terminal)
        workers = job.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        with _Bars(terminal) as bars:
            evaluated = evaluate(sides, job.evaluate, workers, bars.say)
        body = {"format": FORMAT, "inputs": inputs, "lineage": _lineage(gen), "found": evaluated}
        storage.put_if_absent(storage.join(out, REPORT), record.encode_json(body))
        found = _stored(out, inputs)
        assert found is not None
    else:
        terminal.line(f"evaluate: already done: {storage.join(out, REPORT)}")
    return _verdict(job, found, out, terminal)


def _open(url: str) -> tuple[str, DatasetRecord, str]:
    resolved = storage.resolve(url)
    return resolved, *record.read(resolved)


def _check_alike(real_url: str, real: DatasetRecord, gen_url: str, gen: DatasetRecord) -> None:
    for what in ("resolution", "channels", "classes"):
        ours, theirs = getattr(gen, what), getattr(real, what)
        if ours != theirs:
            raise InputError(f"{gen_url} has {what} {ours}, {real_url} has {theirs}; compare a set with what it is of")


def _stored(out: str, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an earlier run of the same evaluation found. Raises InputError where another one's report lies."""
    url = storage.join(out, REPORT)
    if storage.stat(url) is None:
        return None
    try:
        body = json.loads(storage.read(url))
        same, found = body["inputs"] == json.loads(json.dumps(inputs)), body["found"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{url}: not a report of ganymede ({error}); choose another output URL") from error
    if not same:
        raise InputError(f"{url}: the report of another evaluation; choose another output URL")
    return dict(found)


def _lineage(gen: DatasetRecord) -> dict[str, Any]:
    return {"synthetic": dict(gen.lineage), "code_version": importlib.metadata.version("ganymede")}


def _verdict(job: EvaluateJob, found: Mapping[str, Any], out: str, terminal: Terminal) -> int:
    """Say what was found beside its anchors, and whether it passes the gates: they are this command's, and another one
    may judge the same numbers by other limits.
    """
    names = list(found["metrics"])
    rows = {"synthetic": found["metrics"], **found["anchors"]}
    width = max(map(len, rows))
    terminal.line(f"{'':{width}}  " + "  ".join(f"{name:>16}" for name in names))
    for row, numbers in rows.items():
        shown = (f"{numbers[name]['value']:.4g} ± {numbers[name]['error']:.2g}" for name in names)
        terminal.line(f"{row:{width}}  " + "  ".join(f"{text:>16}" for text in shown))
    numbers = {name: one["value"] for name, one in found["metrics"].items()}
    numbers["copies_p_value"] = found["memorisation"]["p_value"]
    if "utility" in found:
        accuracy = {arm: one["mean"] for arm, one in found["utility"].items()}
        terminal.line("accuracy on real images: " + ", ".join(f"{arm} {mean:.3f}" for arm, mean in accuracy.items()))
        numbers["utility"] = accuracy["synthetic"] / max(accuracy["real"], 1e-9)
    judged = gates.judge(job.gates, numbers)
    for gate in judged:
        terminal.line(f"{'passed' if gate.passed else 'FAILED'}: {gate.name} {gate.value:.4g}, limit {gate.limit:.4g}")
    failed = [gate.name for gate in judged if not gate.passed]
    if failed:
        terminal.fail(f"{out}: failed {', '.join(failed)}; see {storage.join(out, REPORT)}")
        return cli.EXIT_REFUSED
    terminal.line(f"evaluate: passed {len(judged)} gates, {found['num_samples']:,} images a side: {out}")
    return cli.EXIT_DONE


class _Bars:
    """A bar for each thing that is done, one after the other."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._what = terminal, ""
        self._bar: Progress | None = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def say(self, what: str, done: int, total: int) -> None:
        """So many more of `total` are done of that; a new name is a new bar."""
        if what != self._what:
            self.__exit__(None, None, None)
            self._what, self._bar = what, self._terminal.progress(total, "img" if "look" in what else "steps", what)
        assert self._bar is not None
        self._bar.update(done)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"evaluate.classifier_steps": 500, "evaluate.utility_steps": 250},
}
VERB = cli.Verb(
    name="evaluate",
    help="real and synthetic images -> what the synthetic ones are worth",
    config=EvaluateJob,
    presets=PRESETS,
    run=run,
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
