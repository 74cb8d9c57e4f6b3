"""`ganymede verify`: reads a dataset again and says whether it is what its index says."""

import dataclasses
import sys

from jobs import cli
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
from pipeline import storage
from pipeline.dataset import ray_verify, record

_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """A dataset to verify."""

    dataset: str
    """URL of a dataset that `prepare` or `generate` wrote."""


def run(job: VerifyJob, terminal: Terminal) -> int:
    """Say what is wrong, a line each, or that nothing is."""
    url = storage.resolve(job.dataset)
    dataset, digest = record.read(url)
    if dataset.shards_url:
        raise record.DatasetError(
            f"{url}: an index of shards that others wrote, without digests of their images; nothing to compare with"
        )
    samples = sum(dataset.num_samples(split) for split in dataset.splits)
    start_ray(terminal)
    with terminal.progress(samples, "img", "verify") as bar:
        problems = ray_verify.problems(url, dataset, bar.update)
    for problem in problems[:_SHOWN]:
        terminal.warn(problem)
    if problems:
        terminal.fail(f"{url}: {len(problems)} problems; make it again at another URL, or restore what was changed")
        return cli.EXIT_REFUSED
    terminal.line(f"verify: {samples:,} images as their index says, dataset {digest[:16]}: {url}")
    return cli.EXIT_DONE


VERB = cli.Verb(name="verify", help="reads a dataset again", config=VerifyJob, presets={}, run=run)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
