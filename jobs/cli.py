"""The command line: `ganymede <verb> ...`, which is `python -m jobs.<verb> ...`.

A verb is a `Verb`: a frozen dataclass of configuration, presets for it, and a function to run. Everything else is made
from these here: typed flags over every field, `--preset`, `--config`, `--dry-run`, exit codes, a quiet terminal.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from jobs.terminal import Progress, Terminal, one_line
from pipeline import config
from pipeline.config import Leaf
from pipeline.errors import InputError, RetryableError

__all__ = ["EXIT_BAD_INPUT", "EXIT_DONE", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_REFUSED", "Progress", "Terminal"]
__all__ += ["VERBS", "Parser", "UsageError", "Verb", "configuration", "main", "run_verb"]

EXIT_DONE = 0
EXIT_FAILED = 1  # worth another try
EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3  # the evidence says no: a failed gate, a stopped collapse; do not retry
EXIT_INTERRUPTED = 130

VERBS = {
    "prepare": "images -> shards",
    "train": "shards -> a trained generator",
    "generate": "a trained generator -> shards of synthetic images",
    "evaluate": "says what a set of synthetic images is worth",
    "verify": "reads a dataset again and compares it with its index",
    "gc": "lists, then removes, what a dataset does not name",
    "run": "prepare, train, generate, evaluate and publish in one go",
}
"""Every verb and what it does; `jobs.<verb>` is imported only when it is asked for."""

SUBMIT = "submit"
"""Not a verb, but the way to a cluster for one: `ganymede submit [flags] -- VERB [flags]`, see `jobs.submit`."""

_OWN_FLAGS = ("help", "preset", "config", "dry-run", "verbose")
_NEGATIVE_VALUE = re.compile(r"^-[\d.]")


class UsageError(InputError):
    """Arguments that mean no command."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command."""

    name: str
    """As typed: `ganymede NAME`, and `jobs/NAME.py`."""
    help: str
    """One line: what goes in and what comes out."""
    config: type[Any]
    """Frozen keyword-only dataclass of all it can be told (see `pipeline.config`)."""
    presets: Mapping[str, Mapping[str, Any]]
    """Name -> dotted overrides, e.g. {"demo": {"train.total_kimg": 20}}."""
    run: Callable[[Any, Terminal], int]
    """Does the work for a configuration and returns the exit code."""
    preview: Callable[[Any], Iterator[str]] | None = None
    """What --dry-run says beside the configuration: lines, printed as comments of its YAML."""


@dataclass(frozen=True, kw_only=True)
class _Flag:
    """The flags of one field; `shown` is what --help lists, `hidden` is the long form where there is a short one."""

    leaf: Leaf
    shown: str
    hidden: str | None


class Parser(argparse.ArgumentParser):
    """argparse that raises its complaints instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: the first argument is the verb, the rest are its own. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(_main_help())
        return EXIT_DONE
    known = [*VERBS, SUBMIT]
    if name not in known:
        what = f"there is no verb {name!r}{config.closest(name, known)}" if name else "which verb?"
        print(f"ganymede: {what}; verbs: {', '.join(known)}; see ganymede --help", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        module = importlib.import_module(f"jobs.{name}")
        if name == SUBMIT:
            return int(module.main(arguments[1:]))
        verb: Verb = module.VERB
    except KeyboardInterrupt:
        Terminal(name).fail("interrupted")
        return EXIT_INTERRUPTED
    return run_verb(verb, arguments[1:])


def _main_help() -> str:
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    submit = f"  {SUBMIT:<10} runs a verb on a Ray cluster: ganymede {SUBMIT} [flags] -- VERB [flags]"
    about = "ganymede VERB --help lists its flags and presets."
    return f"usage: ganymede VERB [flags]\n\nverbs:\n{verbs}\n\non a cluster:\n{submit}\n\n{about}"


def configuration(verb: Verb, argv: Sequence[str]) -> Any:
    """What a verb's flags mean, and nothing is run. Raises InputError for what they cannot, --help and --dry-run."""
    parser, flags = _parser(verb)
    options = vars(_parse(verb, parser, argv))
    if options.pop("help") or options["dry_run"]:
        raise UsageError(f"--help and --dry-run need no cluster: ganymede {verb.name} {shlex.join(argv)}")
    return _resolve(verb, flags, options)


def run_verb(verb: Verb, argv: Sequence[str]) -> int:
    """Parse, run, and turn what goes wrong into one line on stderr and the exit code (see the constants above)."""
    terminal = Terminal(verb.name, verbose="--verbose" in argv)
    try:
        parser, flags = _parser(verb)
        options = vars(_parse(verb, parser, argv))
        if options.pop("help"):
            terminal.line(parser.format_help().rstrip())
            return EXIT_DONE
        job = _resolve(verb, flags, options)
        if options["dry_run"]:
            terminal.line(config.to_yaml(job).rstrip())
            for line in verb.preview(job) if verb.preview else ():
                terminal.line(f"# {line}")
            return EXIT_DONE
        with terminal.capture_logs():
            return _run(verb, job, terminal)
    except InputError as error:
        terminal.fail(str(error))
        return _exit_code(error)
    except KeyboardInterrupt:
        terminal.fail("interrupted")
        return EXIT_INTERRUPTED


def _run(verb: Verb, job: Any, terminal: Terminal) -> int:
    try:
        return verb.run(job, terminal)
    except Exception as error:  # noqa: BLE001 - this is the edge of the program: nothing may leave it as a traceback
        logging.getLogger("ganymede").error("".join(traceback.format_exception(error)))
        known, text = _known_cause(error)
        if known is None:
            what = _cut(one_line(f"{type(error).__name__}: {error}"))
            terminal.fail(f"internal error: {what}; the traceback is in {terminal.log_path}")
        elif isinstance(known, RetryableError):
            terminal.fail(f"{text} (log: {terminal.log_path})")
        else:
            terminal.fail(text)
        return _exit_code(known)


def _exit_code(known: BaseException | None) -> int:
    """A store that is away is bad input as well, since its address may be wrong: another try is what tells."""
    return EXIT_BAD_INPUT if isinstance(known, InputError) and not isinstance(known, RetryableError) else EXIT_FAILED


def _cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _known_cause(error: BaseException) -> tuple[InputError | RetryableError | None, str]:
    """The outermost error of ours among those that led to this one, if any, and what it says.

    What a Ray task raises comes back as an error that is of our class as well, but whose text is a traceback: the
    error itself is its `cause`, to whose first line Ray Data adds advice of its own.
    """
    at: BaseException | None = error
    through_ray = False
    while at is not None:
        cause = getattr(at, "cause", None)
        if cause is None and isinstance(at, InputError | RetryableError):
            return at, str(at).partition("\n")[0] if through_ray else str(at)
        through_ray = through_ray or cause is not None
        at = cause or at.__cause__
    return None, ""


def _parse(verb: Verb, parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    options, unknown = parser.parse_known_args(list(_joined_negatives(argv)))
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [text for action in parser._actions for text in action.option_strings]
        what = f"unknown flag {flag!r}" if flag.startswith("-") else f"unexpected argument {flag!r}"
        raise UsageError(f"{what}{config.closest(flag, known)}; see ganymede {verb.name} --help")
    return options


def _joined_negatives(argv: Sequence[str]) -> Iterator[str]:
    """`--flag -1e-3` as `--flag=-1e-3`: argparse would take the value for a flag."""
    pending: str | None = None
    for argument in argv:
        if pending is not None and _NEGATIVE_VALUE.match(argument):
            yield f"{pending}={argument}"
            pending = None
            continue
        if pending is not None:
            yield pending
        pending = argument if argument.startswith("--") and "=" not in argument else None
        if pending is None:
            yield argument
    if pending is not None:
        yield pending


def _flags(verb: Verb) -> list[_Flag]:
    """Every field with its flags; the verb's own section is shown without its name where that name is free."""
    leaves = list(config.leaves(verb.config))
    taken = {leaf.name for leaf in leaves} | set(_OWN_FLAGS)
    flags = []
    for leaf in leaves:
        short = leaf.name.removeprefix(f"{verb.name}.")
        has_short = short != leaf.name and _dashed(short) not in map(_dashed, taken)
        flags.append(_Flag(leaf=leaf, shown=short if has_short else leaf.name, hidden=leaf.name if has_short else None))
    return flags


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _parser(verb: Verb) -> tuple[Parser, list[_Flag]]:
    parser = Parser(
        prog=f"ganymede {verb.name}",
        usage=f"ganymede {verb.name} [--preset NAME] [--config FILE_OR_URL] [flags]",
        description=f"{verb.help}. Later ones win: defaults, preset, config file, flags.",
        epilog=f"presets: {', '.join(verb.presets) or 'none'}",
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    own = parser.add_argument_group("command")
    own.add_argument("-h", "--help", action="store_true", help="show this and leave")
    own.add_argument("--preset", metavar="NAME", help="start from a named set of values")
    own.add_argument("--config", metavar="FILE_OR_URL", help="YAML as --dry-run prints it, or a part of it")
    own.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration as YAML, and what it will take, and leave",
    )
    own.add_argument("--verbose", action="store_true", help="show on the terminal too what goes to the log file")
    flags = _flags(verb)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        section = flag.leaf.name.rpartition(".")[0] or "job"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        _add_flag(groups[section], flag)
    return parser, flags


def _add_flag(group: argparse._ArgumentGroup, flag: _Flag) -> None:
    leaf = flag.leaf
    # A bool flag alone means true.
    alone = {"nargs": "?", "const": "true"} if config.non_optional(leaf.type) is bool else {}
    common: dict[str, Any] = {"dest": leaf.name, "default": argparse.SUPPRESS, "metavar": _metavar(leaf.type), **alone}
    default = "required" if leaf.default is MISSING else f"default {_as_text(leaf.default)}"
    text = f"{leaf.doc} [{default}]".strip().replace("%", "%%")
    group.add_argument(f"--{_dashed(flag.shown)}", help=text, **common)
    if flag.hidden is not None:
        group.add_argument(f"--{_dashed(flag.hidden)}", help=argparse.SUPPRESS, **common)


def _metavar(tp: Any) -> str:
    inner = config.non_optional(tp)
    if typing.get_origin(inner) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(inner))) + "}"
    if typing.get_origin(inner) is tuple:
        return f"{_metavar(typing.get_args(inner)[0])},..."
    return {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT"}.get(inner, "VALUE")


def _as_text(value: Any) -> str:
    """The value as one would type it after its flag."""
    if isinstance(value, tuple):
        return ",".join(map(_as_text, value)) or "empty"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or "empty"


def typed(verb: Verb, job: Any) -> str:
    """What one types to get this configuration, for a shell: the flags of all that is not the default."""
    words = ["ganymede", verb.name]
    for flag, leaf in zip(_flags(verb), config.leaves(verb.config, base=job), strict=True):
        if leaf.default != flag.leaf.default:
            words += [f"--{_dashed(flag.shown)}", _as_text(leaf.default)]
    return shlex.join(words)


def _resolve(verb: Verb, flags: Sequence[_Flag], options: Mapping[str, Any]) -> Any:
    """The configuration: defaults, preset, config file, flags, later ones over earlier ones."""
    # Only where it is used: storage brings boto3 and pyarrow, and --help must be fast.
    from pipeline import storage

    names = {flag.leaf.name: f"--{_dashed(flag.shown)}" for flag in flags}
    types = {flag.leaf.name: flag.leaf.type for flag in flags}
    given = {
        name: config.parse_value(types[name], text, names[name]) for name, text in options.items() if name in names
    }
    layers = (_preset(verb, options["preset"]), _config_file(verb, options["config"]), config.nest(verb.config, given))
    try:
        job = config.from_dict(verb.config, functools.reduce(config.merge, layers))
    except config.MissingFieldsError as error:
        missing = ", ".join(names[name] for name in error.names)
        raise UsageError(f"{missing} must be given; see ganymede {verb.name} --help") from error
    for leaf in config.leaves(verb.config, base=job):
        if isinstance(leaf.default, str):  # before the configuration is printed or saved
            storage.refuse_credentials(leaf.default)
    return job


def _preset(verb: Verb, name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in verb.presets:
        known = ", ".join(verb.presets) or "none"
        raise UsageError(f"there is no preset {name!r}{config.closest(name, verb.presets)}; presets: {known}")
    return config.nest(verb.config, verb.presets[name])


def _config_file(verb: Verb, url: str | None) -> dict[str, Any]:
    if url is None:
        return {}
    # Only where it is used: storage brings boto3 and pyarrow, and --help must be fast.
    from pipeline import storage

    try:
        text = storage.read(url).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{url}: is not a text in UTF-8; --config wants a YAML file") from error
    mapping = config.mapping_from_yaml(text, url)
    try:
        return config.partial_dict(verb.config, mapping)
    except config.ConfigError as error:
        raise config.ConfigError(f"{url}: {error}") from error
