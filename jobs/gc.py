"""`ganymede gc`: lists what lies at a dataset's URL and is not of it, and removes it if told to."""

import dataclasses
import sys

from jobs import cli
from jobs.terminal import Terminal
from pipeline import storage
from pipeline.dataset import garbage

_SHOWN = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class GcJob:
    """A dataset to tidy."""

    dataset: str
    """URL of a dataset that `prepare` or `generate` wrote, or began."""
    remove: bool = False
    """Remove what is listed; without it nothing is touched."""
    abandon: bool = False
    """Give an unfinished dataset up: all of it is listed. Nobody may still be making it."""


def run(job: GcJob, terminal: Terminal) -> int:
    """List, and remove if told to."""
    url = storage.resolve(job.dataset)
    names = garbage.unnamed(url, abandon=job.abandon)
    if not names:
        terminal.line(f"gc: nothing to remove: {url}")
        return cli.EXIT_DONE
    for name in names[:_SHOWN]:
        terminal.line(f"gc: {name}")
    if len(names) > _SHOWN:
        terminal.line(f"gc: and {len(names) - _SHOWN:,} more")
    if job.remove:
        with terminal.progress(len(names), "objects", "gc") as bar:
            for name in names:
                storage.delete(storage.join(url, name))
                bar.update(1)
    done = "removed" if job.remove else "objects that nothing names; --remove removes them"
    terminal.line(f"gc: {len(names):,} {done}: {url}")
    return cli.EXIT_DONE


VERB = cli.Verb(name="gc", help="lists, then removes, what a dataset does not name", config=GcJob, presets={}, run=run)

if __name__ == "__main__":
    sys.exit(cli.run_verb(VERB, sys.argv[1:]))
