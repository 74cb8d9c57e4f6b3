"""`ganymede evaluate`: real and synthetic images → a report of what the synthetic ones are worth, and a verdict."""

import dataclasses
import importlib.metadata
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch

from jobs import cli
from jobs.ray_session import start_ray
from jobs.terminal import Progress, Terminal
from pipeline import config, snapshot, storage
from pipeline.config import ConfigError, to_dict
from pipeline.dataset import record
from pipeline.dataset.index import open_split
from pipeline.dataset.record import DatasetRecord
from pipeline.errors import InputError
from pipeline.evaluate import features, gates, metrics
from pipeline.evaluate.features import FeaturesConfig
from pipeline.evaluate.gates import GateConfig
from pipeline.evaluate.ray_evaluate import EvaluateConfig, Evaluation, Sides, Tools, evaluate
from pipeline.evaluate.report import page, pictures
from pipeline.evaluate.samples import Shape
from pipeline.snapshot import Snapshot

FORMAT = 2
REPORT, PAGE = "report.json", "report.html"
_SPLIT = "train"  # where generated images lie
_CACHE = Path("~/.cache/ganymede/evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """An evaluation."""

    real: str
    """URL of the dataset that was trained on."""
    synthetic: str
    """URL of the dataset that was generated."""
    out: str
    """URL to write report.html and report.json to. The same command again shows its verdict."""
    snapshot: str = ""
    """URL of the snapshot, or run, that made the synthetic images, for pictures of what lies between them and for D's
    scores; empty: where `generate` had it from, if it is still there."""
    training_split: str = "train"
    """Split of the real images that was trained on."""
    reference_split: str = "test"
    """Split of the real images to compare with, which nothing was trained on."""
    resize: Literal["no", "crop", "pad"] = "no"
    """How images whose size is not that of the real ones are brought to it; no: they are refused."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """How much is looked at."""
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    """What is compared."""
    gates: GateConfig = dataclasses.field(default_factory=GateConfig)
    """What must be found."""
    cache: str = ""
    """URL where classifiers of real images are kept for further evaluations; empty: below ~/.cache/ganymede."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dataset:
    url: str
    record: DatasetRecord
    digest: str


def run(job: EvaluateJob, terminal: Terminal) -> int:
    """Evaluate, or show what was found before; the verdict is the exit code."""
    out, real, gen = storage.resolve(job.out), _open(job.real), _open(job.synthetic)
    if job.features.weights:  # workers run in other folders
        weights = storage.resolve(job.features.weights)
        job = dataclasses.replace(job, features=dataclasses.replace(job.features, weights=weights))
    _check(job, real, gen)
    inputs = {
        "real": real.digest,
        "synthetic": gen.digest,
        "training_split": job.training_split,
        "reference_split": job.reference_split,
        "resize": job.resize,
        "evaluate": to_dict(job.evaluate),
        "features": {**to_dict(job.features), "digest": features.digest(job.features)},
        "gates": to_dict(job.gates),
    }
    report = _stored(out, inputs)
    if report is not None:
        terminal.line(f"evaluate: already done: {storage.join(out, PAGE)}")
        return _verdict(report, out, terminal)
    if job.features.network != "domain":
        features.load(job.features)  # what does not fit is told before the work
    storage.probe(out)
    sides = _sides(job, real, gen)
    gates.judge(job.gates, dict.fromkeys(_judged(sides, job), 0.0))  # and so is what cannot be judged
    found_snapshot = _snapshot(job, gen, terminal)
    start_ray(terminal)
    with _Bars(terminal) as bars:
        evaluation = evaluate(sides, job.evaluate, _tools(job, bars))
        bars.end()
        galleries = pictures.galleries(_subject(sides, evaluation, found_snapshot))
    body = _body(job, inputs, real, gen, evaluation.found)
    _store(storage.join(out, PAGE), page.render(body, galleries).encode())
    storage.put_if_absent(storage.join(out, REPORT), record.encode_json(body))  # last: it says that all is there
    report = _stored(out, inputs)
    assert report is not None
    return _verdict(report, out, terminal)


def _open(url: str) -> _Dataset:
    resolved = storage.resolve(url)
    found, digest = record.read(resolved)
    return _Dataset(url=resolved, record=found, digest=digest)


def _check(job: EvaluateJob, real: _Dataset, gen: _Dataset) -> None:
    """Raise InputError for sets that cannot be compared."""
    for what in ("resolution", "channels"):
        theirs, ours = getattr(gen.record, what), getattr(real.record, what)
        if ours != theirs and job.resize == "no":
            raise InputError(
                f"{gen.url} has {what} {theirs}, {real.url} has {ours}; compare a set with what it is of, or have its "
                "images brought to the size of the real ones by --resize crop or pad"
            )
    if gen.record.classes and real.record.classes and gen.record.classes != real.record.classes:
        raise InputError(f"{gen.url} has other classes than {real.url}; compare a set with what it is of")
    for name in (job.training_split, job.reference_split):
        if name not in real.record.splits:
            raise InputError(
                f"{real.url}: no split {name!r}, it has {', '.join(sorted(real.record.splits))}; prepare the real "
                "images with folders train/ and test/, or name others with --training-split and --reference-split"
            )


def _sides(job: EvaluateJob, real: _Dataset, gen: _Dataset) -> Sides:
    shape = Shape(
        resolution=real.record.resolution,
        channels=real.record.channels,
        fit=None if job.resize == "no" else job.resize,
    )
    return Sides(
        training=open_split(real.url, real.record, job.training_split),
        training_digest=f"{real.digest}/{job.training_split}",
        reference=open_split(real.url, real.record, job.reference_split),
        gen=open_split(gen.url, gen.record, _SPLIT),
        shape=shape,
        classes=real.record.classes,
        gen_labelled=gen.record.classes == real.record.classes,
    )


def _snapshot(job: EvaluateJob, gen: _Dataset, terminal: Terminal) -> Snapshot | None:
    """The one that made the images: as named, or where their maker had it from. Raises InputError for another one."""
    wanted = gen.record.lineage.get("snapshot_digest")
    if wanted is None and job.snapshot:
        raise InputError(f"{gen.url} does not say which snapshot made it; leave --snapshot out")
    if job.snapshot:
        return _that_made(str(wanted), storage.resolve(job.snapshot))
    try:
        made_by = config.mapping_from_yaml(storage.read(storage.join(gen.url, "events", "generate.yaml")).decode())
        return _that_made(str(wanted), storage.resolve(str(made_by["snapshot"])))
    except (InputError, KeyError, UnicodeDecodeError) as error:
        terminal.warn(f"no snapshot, so no pictures between latents; name it with --snapshot ({error})")
        return None


def _that_made(digest: str, url: str) -> Snapshot:
    """The snapshot of that digest: a run's, whichever of its snapshots it is, or the one at the URL."""
    of_run = snapshot.url_of(url, digest)
    found = snapshot.load(of_run if snapshot.is_one(of_run) else snapshot.find(url))
    if found.digest != digest:
        raise InputError(f"{url}: the images were made by snapshot {digest}, and this is {found.digest}; name that one")
    return found


def _tools(job: EvaluateJob, bars: "_Bars") -> Tools:
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return Tools(
        features=job.features,
        cache_url=storage.resolve(job.cache or str(_CACHE.expanduser())),
        num_workers=min(job.num_workers or cpus, cpus),
        say=bars.say,
    )


def _subject(sides: Sides, evaluation: Evaluation, found: Snapshot | None) -> pictures.Subject:
    reference, gen = (
        pictures.Shown(reader=reader, numbers=seen.numbers, labels=seen.labels)
        for reader, seen in ((sides.reference, evaluation.reference), (sides.gen, evaluation.gen))
    )
    numbers = evaluation.training_numbers
    return pictures.Subject(
        reference=reference,
        gen=gen,
        training=pictures.Shown(reader=sides.training, numbers=numbers, labels=np.zeros_like(numbers)),
        copies=evaluation.copies,
        classes=sides.classes if sides.comparable else (),
        shape=sides.shape,
        snapshot=found,
    )


def _body(
    job: EvaluateJob, inputs: Mapping[str, Any], real: _Dataset, gen: _Dataset, found: Mapping[str, Any]
) -> dict[str, Any]:
    """What report.json says."""
    judged = gates.judge(job.gates, _numbers(found))
    lineage = {
        "synthetic": dict(gen.record.lineage),
        "code_version": importlib.metadata.version("ganymede"),
        "torch": torch.__version__,
    }
    return {
        "format": FORMAT,
        "inputs": inputs,
        "urls": {"real": real.url, "synthetic": gen.url},
        "command": cli.typed(VERB, job),
        "lineage": lineage,
        "found": found,
        "gates": [dataclasses.asdict(gate) for gate in judged],
        "passed": all(gate.passed for gate in judged),
    }


def _store(url: str, data: bytes) -> None:
    """Of what report.json has not committed, another one may lie there: it goes."""
    if storage.put_if_absent(url, data) is storage.Put.OTHER:
        storage.delete(url)
        storage.put_if_absent(url, data)


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
    terminal.line(f"evaluate: {'':{width}}  " + "  ".join(f"{name:>16}" for name in names))
    for row, numbers in rows.items():
        shown = (f"{numbers[name]['value']:.4g} ± {numbers[name]['error']:.2g}" for name in names)
        terminal.line(f"evaluate: {row:{width}}  " + "  ".join(f"{text:>16}" for text in shown))
    if "utility" in found:
        arms = ", ".join(f"{arm} {one['mean']:.3f}" for arm, one in found["utility"]["arms"].items())
        terminal.line(f"evaluate: accuracy on real images when trained on: {arms}")
    for notice in found["notices"]:
        terminal.line(f"evaluate: note: {notice}")
    for gate in report["gates"]:
        verdict = "passed" if gate["passed"] else "FAILED"
        terminal.line(f"evaluate: {verdict}: {gate['name']} {gate['value']:.4g}, limit {gate['limit']:.4g}")
    if not report["passed"]:
        failed = ", ".join(gate["name"] for gate in report["gates"] if not gate["passed"])
        terminal.fail(f"{out}: failed {failed}; see {storage.join(out, PAGE)}")
        return cli.EXIT_REFUSED
    count = found["num_samples"]
    terminal.line(f"evaluate: passed {len(report['gates'])} gates, {count:,} images a side: {storage.join(out, PAGE)}")
    return cli.EXIT_DONE


class _Bars:
    """A bar for each thing that is done, one after the other. Several threads may say so."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._what = terminal, ""
        self._bar: Progress | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def end(self) -> None:
        """What was said last is over."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._what, self._bar = "", None

    def say(self, what: str, done: int, total: int) -> None:
        """So many more of `total` are done of that; a new name is a new bar."""
        with self._lock:
            if what != self._what:
                self.end()
                unit = "steps" if what.startswith("train") else "img" if "image" in what else "sets"
                self._what, self._bar = what, self._terminal.progress(total, unit, f"evaluate: {what}")
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
