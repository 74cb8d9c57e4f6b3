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
from pipeline.config import ConfigError, to_dict
from pipeline.dataset import record
from pipeline.dataset.index import open_split
from pipeline.dataset.record import DatasetRecord
from pipeline.errors import InputError
from pipeline.evaluate import gates, metrics
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

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"num_workers must be at least 0, not {self.num_workers}")
        if self.training_split == self.reference_split:
            raise ConfigError(
                f"training_split and reference_split are both {self.reference_split!r}: images that were trained on "
                "say nothing; prepare the real images with a folder test/ of others, and train on train"
            )


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
        "gates": to_dict(job.gates),
    }
    report = _stored(out, inputs)
    if report is not None:
        terminal.line(f"evaluate: already done: {storage.join(out, REPORT)}")
        return _verdict(report, out, terminal)
    storage.probe(out)
    sides = Sides(
        training=open_split(real_url, real, job.training_split),
        reference=open_split(real_url, real, job.reference_split),
        gen=open_split(gen_url, gen, _SPLIT),
        shape=(real.resolution, real.channels),
        classes=real.classes,
        gen_labelled=gen.classes == real.classes,
    )
    gates.judge(job.gates, dict.fromkeys(_judged(sides, job), 0.0))  # what cannot be judged is told before the work
    start_ray(terminal)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    with _Bars(terminal) as bars:
        found = evaluate(sides, job.evaluate, min(job.num_workers or cpus, cpus), bars.say)
    judged = gates.judge(job.gates, _numbers(found))
    body = {
        "format": FORMAT,
        "inputs": inputs,
        "lineage": _lineage(gen),
        "found": found,
        "gates": [dataclasses.asdict(gate) for gate in judged],
        "passed": all(gate.passed for gate in judged),
    }
    storage.put_if_absent(storage.join(out, REPORT), record.encode_json(body))
    report = _stored(out, inputs)
    assert report is not None
    return _verdict(report, out, terminal)


def _open(url: str) -> tuple[str, DatasetRecord, str]:
    resolved = storage.resolve(url)
    return resolved, *record.read(resolved)


def _check_alike(real_url: str, real: DatasetRecord, gen_url: str, gen: DatasetRecord) -> None:
    for what in ("resolution", "channels"):
        ours, theirs = getattr(gen, what), getattr(real, what)
        if ours != theirs:
            raise InputError(f"{gen_url} has {what} {ours}, {real_url} has {theirs}; compare a set with what it is of")
    if gen.classes and real.classes and gen.classes != real.classes:
        raise InputError(f"{gen_url} has other classes than {real_url}; compare a set with what it is of")


def _stored(out: str, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The report of an earlier run of the same evaluation. Raises InputError where another one's lies."""
    url = storage.join(out, REPORT)
    if storage.stat(url) is None:
        return None
    try:
        body = json.loads(storage.read(url))
        same = body["format"] == FORMAT and body["inputs"] == json.loads(json.dumps(inputs))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{url}: not a report of ganymede ({error}); choose another output URL") from error
    if not same:
        raise InputError(f"{url}: the report of another evaluation; choose another output URL")
    return dict(body)


def _lineage(gen: DatasetRecord) -> dict[str, Any]:
    return {"synthetic": dict(gen.lineage), "code_version": importlib.metadata.version("ganymede")}


def _judged(sides: Sides, job: EvaluateJob) -> list[str]:
    utility = ["utility"] if sides.comparable and job.evaluate.utility_steps else []
    return [*metrics.NAMES, "copies_p_value", *utility]


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """What gates judge, by name."""
    numbers = {name: one["value"] for name, one in found["metrics"].items()}
    numbers["copies_p_value"] = found["memorisation"]["p_value"]
    return numbers | ({"utility": found["utility"]["worth"]} if "utility" in found else {})


def _verdict(report: Mapping[str, Any], out: str, terminal: Terminal) -> int:
    """Say what was found beside its anchors, and whether it passed the gates."""
    found = report["found"]
    names = list(found["metrics"])
    rows = {"synthetic": found["metrics"], **found["anchors"]}
    width = max(map(len, rows))
    terminal.line(f"{'':{width}}  " + "  ".join(f"{name:>16}" for name in names))
    for row, numbers in rows.items():
        shown = (f"{numbers[name]['value']:.4g} ± {numbers[name]['error']:.2g}" for name in names)
        terminal.line(f"{row:{width}}  " + "  ".join(f"{text:>16}" for text in shown))
    if "utility" in found:
        arms = ", ".join(f"{arm} {one['mean']:.3f}" for arm, one in found["utility"]["arms"].items())
        terminal.line(f"accuracy on real images when trained on: {arms}")
    for gate in report["gates"]:
        verdict = "passed" if gate["passed"] else "FAILED"
        terminal.line(f"{verdict}: {gate['name']} {gate['value']:.4g}, limit {gate['limit']:.4g}")
    if not report["passed"]:
        failed = ", ".join(gate["name"] for gate in report["gates"] if not gate["passed"])
        terminal.fail(f"{out}: failed {failed}; see {storage.join(out, REPORT)}")
        return cli.EXIT_REFUSED
    terminal.line(f"evaluate: passed {len(report['gates'])} gates, {found['num_samples']:,} images a side: {out}")
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
