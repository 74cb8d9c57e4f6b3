"""Commands in manifests and documents, given to the verbs' own parsers, and nothing of them run."""

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from typing import Any

from jobs import cli

RETRY = ["python", "/opt/ganymede/infra/retry.py", "--"]


def resolved(command: str) -> Any:
    """The configuration that `[… retry.py --] python -m jobs.VERB FLAGS` means; AssertionError where it means none."""
    words = shlex.split(command)
    if "--" in words and words[1].endswith("infra/retry.py"):
        words = words[words.index("--") + 1 :]
    assert words[:2] == ["python", "-m"], command
    assert words[2].startswith("jobs."), command
    found: list[Any] = []
    verb: cli.Verb = importlib.import_module(words[2]).VERB
    caught = dataclasses.replace(verb, run=lambda job, _terminal: found.append(job) or cli.EXIT_DONE)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.run_verb(caught, words[3:])
    assert code == cli.EXIT_DONE, f"{command}: {errors.getvalue()}"
    return found[0]


def in_text(text: str) -> list[str]:
    """Every command of a verb in code blocks of a document."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line[line.index("python -m jobs.") :] for line in lines if "python -m jobs." in line]
