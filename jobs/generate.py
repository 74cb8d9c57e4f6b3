"""`ganymede generate`: a snapshot → a dataset of synthetic images. What it does with torch is in `generation`."""

import dataclasses
import importlib
import sys
import threading
from collections.abc import Iterator

from jobs import cli, presets
from jobs.terminal import Terminal
from pipeline.config import ConfigError
from pipeline.generate.plan import GenerateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A generation run."""

    snapshot: str
    """URL of a snapshot, or of a training run: then its last one."""
    out: str
    """URL of the dataset to write. The same command again finishes what is missing."""
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    """What to make."""
    only_keys: tuple[str, ...] = ()
    """Make these samples again and write nothing but them, as files at `out`: the bytes that their shard holds."""
    num_workers: int = 0
    """Processes that make shards; 0: one for each CPU, or each GPU."""
    use_gpu: bool = False
    """Run G on GPUs, one a worker."""
    num_encoders: int = 0
    """Threads of a worker that encode; 0: one, or with GPUs as many as there are CPUs for each, at most 16."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_encoders"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")


def run(job: GenerateJob, terminal: Terminal) -> int:
    """Generate what is missing, or say that nothing is."""
    _import_and_start(job, terminal)
    from jobs import generation

    return generation.run(job, terminal)


def _import_and_start(job: GenerateJob, terminal: Terminal) -> None:
    """Import torch while Ray starts, where something is to be made: both take seconds, and Ray mostly waits."""
    from pipeline import storage
    from pipeline.dataset import record

    out = storage.resolve(job.out)
    if job.only_keys or storage.stat(storage.join(out, record.NAME)) is not None:
        return
    from jobs.ray_session import start_ray

    beside = threading.Thread(target=importlib.import_module, args=("jobs.generation",))
    beside.start()
    try:
        start_ray(terminal)
    finally:
        beside.join()


def preview(job: GenerateJob) -> Iterator[str]:
    """What the run will make and take, from a few seconds of work here; nothing is stored and no Ray is started."""
    from jobs import generation

    return generation.preview(job)


VERB = cli.Verb(
    name="generate",
    help="snapshot -> shards of synthetic images",
    config=GenerateJob,
    presets=presets.GENERATE,
    run=run,
    preview=preview,
)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
