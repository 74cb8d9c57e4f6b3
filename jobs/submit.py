"""`ganymede submit`: a verb on a Ray cluster, as a job that exists once, followed from here.

The job's id is made of the verb and where it writes, so Ray itself refuses to run the same twice at a time. One that
has ended is put in place again by the same command, and the verb goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import getpass
import hashlib
import importlib
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.terminal import Terminal
from pipeline import periods
from pipeline.config import closest
from pipeline.errors import InputError, RetryableError

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_AGENT_SEC = 60.0
_ROOT = Path(__file__).parents[1]
_NOT_CARRIED = ("/.git", "/.venv", "/.venv-peers", "/.cluster", "/.bench", "/demo")
_USAGE = "ganymede submit [--address URL] [--working-dir DIR | --image] [--no-wait] -- VERB [flags of the verb]"
_DESCRIPTION = """Runs a verb on a Ray cluster, prints what the job prints, and exits with its exit code. Ctrl-C stops
only the printing. Keys of the object store are not sent along, since anyone who sees the cluster's jobs could read
them: the cluster's nodes must have them. The token is taken as Ray takes it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH."""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit and follow; returns the job's exit code, or 2 for what cannot be submitted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    terminal = Terminal(cli.SUBMIT)
    try:
        own, words = _divided(arguments)
        parser = _parser()
        options = parser.parse_args(own)
        if options.help:
            terminal.line(parser.format_help().rstrip())
            return cli.EXIT_DONE
        verb, job = _job(words)
        return _submit(options, words, verb, job, terminal)
    except InputError as error:
        terminal.fail(str(error))
        return cli.EXIT_BAD_INPUT
    except RetryableError as error:
        terminal.fail(str(error))
        return cli.EXIT_FAILED
    except (OSError, RuntimeError) as error:  # what Ray's client raises; those of requests are OSErrors
        terminal.fail(f"the cluster does not answer as it should; the job, if submitted, goes on: {_first_line(error)}")
        return cli.EXIT_FAILED
    except KeyboardInterrupt:
        terminal.fail("interrupted")
        return cli.EXIT_INTERRUPTED


def submission_id(verb: str, output: str, period: str = "") -> str:
    """The job's name: the verb, and a digest of what two runs must not share."""
    text = "\0".join((verb, output.rstrip("/"), period))
    return f"{verb}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _divided(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="ganymede submit", usage=_USAGE, description=_DESCRIPTION, allow_abbrev=False, add_help=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and leave")
    parser.add_argument("--address", metavar="URL", help=f"of the cluster's dashboard [default {_ADDRESS}]")
    carried = parser.add_mutually_exclusive_group()
    carried.add_argument(
        "--working-dir", metavar="DIR", help="folder that the job runs from, sent along [default: this repository]"
    )
    carried.add_argument("--image", action="store_true", help="send nothing: the cluster's image has the project")
    parser.add_argument("--no-wait", action="store_true", help="leave once the job is submitted, with exit code 0")
    return parser


def _job(words: Sequence[str]) -> tuple[cli.Verb, Any]:
    """The verb and its configuration. Raises InputError as the verb itself would."""
    if not words:
        raise cli.UsageError(f"no verb follows --; usage: {_USAGE}")
    name = words[0]
    if name not in cli.VERBS:
        raise cli.UsageError(f"there is no verb {name!r}{closest(name, cli.VERBS)}; verbs: {', '.join(cli.VERBS)}")
    verb: cli.Verb = importlib.import_module(f"jobs.{name}").VERB
    return verb, cli.configuration(verb, words[1:])


def _output(job: Any) -> str:
    """Where the verb writes, or what it reads again. Raises InputError for a folder that the job would lose."""
    url = str(getattr(job, "out", "") or getattr(job, "dataset", ""))
    if "://" not in url and not Path(url).is_absolute():
        raise InputError(f"{url}: the job runs in a folder that Ray removes; give s3://… or an absolute path")
    return url


def _period(job: Any) -> str:
    text = str(getattr(job, "period", ""))
    return periods.resolve(text, datetime.datetime.now(datetime.UTC)) if text else ""


def _submit(options: argparse.Namespace, words: Sequence[str], verb: cli.Verb, job: Any, terminal: Terminal) -> int:
    output, period = _output(job), _period(job)
    if period:  # as it is named now, in the id as well: the job may begin in the next hour
        words, job = [*words, "--period", period], dataclasses.replace(job, period=period)
    name = submission_id(verb.name, output, period)
    client = _client(options.address)
    before = _make_room(client, name, output)
    entrypoint = _entrypoint(words, verb, job)
    metadata = {"output": output, "submitted_by": _who(), **({"period": period} if period else {})}
    job_of_ray = {"submission_id": name, "metadata": metadata, "runtime_env": _runtime_env(options)}
    try:
        _patiently(lambda: client.submit_job(entrypoint=entrypoint, **job_of_ray))
    except RuntimeError as error:
        if "already exists" in str(error):  # another submitter came between
            raise InputError(_taken(client, name, output)) from error
        raise RetryableError(f"the cluster takes no job: {_first_line(error)}") from error
    terminal.line(f"submit: job {name}; its log: ray job logs -f {name}; stop it: ray job stop {name}")
    return cli.EXIT_DONE if options.no_wait else _follow(client, name, before, terminal)


def _entrypoint(words: Sequence[str], verb: cli.Verb, job: Any) -> str:
    """The job's command. A configuration file may lie on this machine alone: what it says is sent as flags instead."""
    flags = words[1:]
    if any(word == "--config" or word.startswith("--config=") for word in flags):
        flags = shlex.split(cli.typed(verb, job))[2:]
    return shlex.join(["python", "-m", f"jobs.{verb.name}", *flags])


def _patiently(submit: Callable[[], Any]) -> None:
    """A head that has just started takes no job until its agent is there."""
    deadline_sec = time.monotonic() + _AGENT_SEC
    while True:
        try:
            submit()
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_sec:
                raise
        time.sleep(1)


def _client(address: str | None) -> Any:
    """Raises InputError where no cluster is named or the token is refused, RetryableError where none answers."""
    url = address or os.environ.get(_ADDRESS) or os.environ.get("RAY_ADDRESS", "")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"which cluster? Give --address http://HOST:8265, its dashboard, or set {_ADDRESS}")
    os.environ[_ADDRESS] = url  # Ray takes this one whatever it is told
    logging.disable(logging.WARNING)  # Ray tells of each file that it sends or leaves out
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise InputError(
            f"the Ray cluster at {url} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH ({_first_line(error)})"
        ) from error
    except ConnectionError as error:
        raise RetryableError(f"no Ray cluster answers at {url}: {_first_line(error)}") from error
    except RuntimeError as error:
        raise InputError(f"the Ray cluster at {url} refuses: {_first_line(error)}") from error
    except ValueError as error:
        raise InputError(f"{url} is no address of a dashboard: {_first_line(error)}") from error


def _make_room(client: Any, name: str, output: str) -> int:
    """Delete the job of that id which has ended; the length of its log, which Ray lets the next one add to.

    Raises InputError for one that has not ended.
    """
    found = [job for job in client.list_jobs() if job.submission_id == name]
    if not found:
        return 0
    if not found[0].status.is_terminal():
        raise InputError(_taken(client, name, output))
    try:
        log = client.get_job_logs(name)
        client.delete_job(name)
    except RuntimeError as error:  # another submitter has put a new one in its place
        raise InputError(_taken(client, name, output)) from error
    return len(log)


def _taken(client: Any, name: str, output: str) -> str:
    try:
        job = client.get_job_info(name)
    except RuntimeError:
        return f"another submitter works on {output} at this moment; try again"
    began = (
        f" since {datetime.datetime.fromtimestamp(job.start_time / 1000):%Y-%m-%d %H:%M:%S}" if job.start_time else ""
    )
    whose = (job.metadata or {}).get("submitted_by", "somebody")
    return (
        f"{output}: job {name} of {whose} is {job.status.value.lower()}{began}; "
        f"follow it: ray job logs -f {name}; stop it: ray job stop {name}"
    )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _runtime_env(options: argparse.Namespace) -> dict[str, Any]:
    """What is sent along: a folder, or nothing. Raises InputError for what is no folder."""
    if options.image:
        return {}
    folder = Path(options.working_dir).absolute() if options.working_dir else _ROOT
    if not options.working_dir and not (folder / "pyproject.toml").exists():
        raise InputError("the project is not installed from its repository: give --working-dir, or --image")
    if not (folder / "jobs").is_dir():
        raise InputError(f"{folder}: has no folder jobs/; give the repository, or --image")
    return {"working_dir": str(folder), "excludes": list(_NOT_CARRIED)}


def _follow(client: Any, name: str, shown: int, terminal: Terminal) -> int:
    """Print what the job prints until it ends, `shown` characters left out; its exit code."""
    try:
        asyncio.run(_print_log(client, name, shown))
    except KeyboardInterrupt:
        terminal.fail(f"the job goes on; follow it: ray job logs -f {name}; stop it: ray job stop {name}")
        return cli.EXIT_INTERRUPTED
    job = client.get_job_info(name)
    if job.status == "SUCCEEDED":
        return cli.EXIT_DONE
    if job.status == "STOPPED":
        terminal.fail(f"job {name} was stopped; the same command goes on where it stopped")
        return cli.EXIT_FAILED
    code = job.driver_exit_code
    why = f"exit code {code}" if code else _shortened(job.message)
    terminal.fail(f"job {name} failed: {why}")
    return code if code in (cli.EXIT_BAD_INPUT, cli.EXIT_REFUSED, cli.EXIT_INTERRUPTED) else cli.EXIT_FAILED


async def _print_log(client: Any, name: str, shown: int) -> None:
    """Print the job's log as it grows, from character `shown`, each part once.

    Raises RetryableError when the cluster is gone.
    """
    from aiohttp import ClientError  # Ray's client has imported it

    failures = 0
    while True:
        at = 0
        try:
            async for text in client.tail_job_logs(name):  # always from the beginning
                new = text[max(0, shown - at) :]
                at += len(text)
                if new:
                    sys.stdout.write(new)
                    sys.stdout.flush()
                    shown, failures = at, 0
            if client.get_job_status(name).is_terminal():
                return
        except (RuntimeError, OSError, ClientError) as error:
            failures += 1
            if failures > 5:
                raise RetryableError(
                    f"the cluster does not answer; job {name} may go on: {_first_line(error)}"
                ) from error
        await asyncio.sleep(1)


def _shortened(text: str | None, limit: int = 300) -> str:
    return (text or "no reason given").strip()[:limit]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
