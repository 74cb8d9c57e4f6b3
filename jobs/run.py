"""`ganymede run`: images → shards → a trained GAN → shards of synthetic images → what they are worth, in one go."""

import dataclasses
import sys
import time

import numpy as np

from jobs import cli, evaluate, generate, prepare, recipes, train
from jobs.terminal import Terminal
from pipeline import images, storage
from pipeline.dataset import record, sheet
from pipeline.errors import InputError
from pipeline.evaluate.gates import GateConfig
from pipeline.evaluate.ray_evaluate import EvaluateConfig
from pipeline.gan.networks.build import NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.generate.plan import GenerateConfig
from pipeline.prepare.plan import PrepareConfig
from pipeline.train.spec import TrainConfig
from pipeline.train.workers import WorkersConfig

_COLUMNS, _ROWS, _GAP_PX = 10, 10, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """The whole loop."""

    source: str
    """Images: a folder, a zip, IDX files, WebDataset shards, or fashion-mnist."""
    out: str
    """URL below which images/, training/, synthetic/ and report/ are written; the same command again finishes them."""
    prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)
    """Images to shards."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Architecture of G and D."""
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    """Loss, optimisers, precision, averaging."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length, order, intervals."""
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)
    """Training processes and their resources."""
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    """What to make."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """How much of what was made is looked at."""
    gates: GateConfig = dataclasses.field(default_factory=GateConfig)
    """What must be found."""


def run(job: RunJob, terminal: Terminal) -> int:
    """Prepare, train, generate, evaluate; each step that is done already says so and costs nothing."""
    started = time.monotonic()
    out = storage.resolve(job.out)
    real, training, synthetic, report = (
        storage.join(out, name) for name in ("images", "training", "synthetic", "report")
    )
    prepare_job = prepare.PrepareJob(source=job.source, out=real, prepare=job.prepare)
    train_job = train.TrainJob(
        dataset=real, out=training, network=job.network, step=job.step, train=job.train, workers=job.workers
    )
    generate_job = generate.GenerateJob(
        snapshot=training, out=synthetic, generate=job.generate, use_gpu=job.workers.use_gpu
    )
    evaluate_job = evaluate.EvaluateJob(
        real=real, synthetic=synthetic, snapshot=training, out=report, evaluate=job.evaluate, gates=job.gates
    )
    code = prepare.run(prepare_job, terminal)
    if code != cli.EXIT_DONE:
        return code
    judged = evaluate_job.reference_split in record.read(real)[0].splits
    if not judged and job.gates != GateConfig():
        raise InputError(f"gates are set, and {job.source} has no folder test/ to judge by; add one, or leave them out")
    code = train.run(train_job, terminal) or generate.run(generate_job, terminal)
    if code != cli.EXIT_DONE:
        return code
    picture = _picture(out, real, synthetic)
    if judged:
        code = evaluate.run(evaluate_job, terminal)
    else:
        terminal.warn("no evaluation: the source has no folder test/ of images that are not trained on")
    done = "done" if code == cli.EXIT_DONE else "refused by a gate"
    terminal.line(f"run: {done} in {time.monotonic() - started:.0f} s; real | synthetic, a row a class: {picture}")
    return code


def _picture(out: str, real: str, synthetic: str) -> str:
    """Real images left, synthetic ones right, a row a class."""
    halves = []
    for url in (real, synthetic):
        dataset, _ = record.read(url)
        halves.append(sheet.class_rows(url, dataset, "train", _COLUMNS, _ROWS))
    gap = np.full((len(halves[0]), _GAP_PX, halves[0].shape[2]), 255, np.uint8)
    url = storage.join(out, "real-and-synthetic.png")
    storage.put(url, images.encode(np.concatenate([halves[0], gap, halves[1]], axis=1), "png", 100))
    return url


VERB = cli.Verb(
    name="run", help="prepare, train, generate and evaluate in one go", config=RunJob, presets=recipes.RUN, run=run
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
