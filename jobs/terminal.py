"""What a person sees while a command runs: a few lines, one progress bar, and where the log is.

Results go to stdout; warnings, progress and the log's place to stderr; what libraries say goes to the log file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_LINE_SEC = 10.0
"""Where stderr is no terminal, a progress line is printed at most this often."""

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, as one blank."""
    return " ".join(text.split())


def duration(hours: float) -> str:
    """In seconds or hours."""
    return f"{hours * 3600:,.0f} s" if hours < 0.1 else f"{hours:,.1f} h"


class Progress:
    """How far long work is: a bar on a terminal, else plain lines at most every PLAIN_LINE_SEC and one at the end."""

    def __init__(self, total: int | None, unit: str, desc: str, initial: int, say: Callable[[str], None]) -> None:
        self._total, self._unit, self._desc = total, unit, desc
        self._initial = self._done = initial
        self._say = say
        self._postfix: dict[str, Any] = {}
        self._started_sec = self._said_sec = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            # Only where it is used: a command's --help must be fast.
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=f" {unit}", desc=desc, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._say(self._text())

    def update(self, n: int, **postfix: Any) -> None:
        """`n` more units are done; `postfix` are named values to show beside the count, until they are given anew."""
        self._done += n
        self._postfix.update(postfix)
        if self._bar is not None:
            self._bar.set_postfix(self._postfix, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._said_sec >= PLAIN_LINE_SEC:
            self._said_sec = time.monotonic()
            self._say(self._text())

    def _text(self) -> str:
        rate = (self._done - self._initial) / max(time.monotonic() - self._started_sec, 1e-9)
        share = f"/{self._total} ({100 * self._done // self._total}%)" if self._total else ""
        postfix = "".join(f", {name} {_short(value)}" for name, value in self._postfix.items())
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
        return f"{self._desc}: {self._done}{share} {self._unit}, {rate:.3g} {self._unit}/s{left}{postfix}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _native_stderr_to(path: Path) -> Iterator[None]:
    """Within it, what compiled libraries write to file descriptor 2 goes to a file; Python's sys.stderr stays.

    Ray's C++ side prints its advice there, beside its own logs, and no Python setting reaches it.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, ValueError, OSError):  # replaced by a caller, e.g. a test's capture: nothing to move
        yield
        return
    shown, before = os.dup(descriptor), sys.stderr
    sys.stderr = open(shown, "w", buffering=1, encoding=before.encoding, errors="backslashreplace")  # noqa: SIM115
    with path.open("ab") as file:
        os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, descriptor)
        sys.stderr.close()
        sys.stderr = before


class Terminal:
    """The terminal of one run of a verb."""

    def __init__(self, verb: str, verbose: bool = False) -> None:
        self.verb = verb
        self.verbose = verbose
        self.log_path = Path(tempfile.gettempdir()) / f"ganymede-logs-{os.getuid()}" / f"{verb}-{os.getpid()}.log"
        """Where what libraries say goes; the file exists once `capture_logs` was entered."""
        self._log_places: list[str] = []
        self._captures = False

    def line(self, text: str) -> None:
        """Print a line of the result on stdout."""
        self._print_log_places()
        self._write(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print on stderr, as one line, what the user must act on."""
        self._print_log_places()
        self._write(f"warning: {one_line(text)}", sys.stderr)

    def fail(self, text: str) -> None:
        """Print on stderr, as one line, why the command failed."""
        self._write(f"ganymede {self.verb}: {one_line(text)}", sys.stderr)

    def progress(self, total: int | None, unit: str, desc: str, initial: int = 0) -> Progress:
        """A context manager with `update(n, **postfix)`; `initial` of `total` (None: unknown) are already done."""
        self._print_log_places()
        return Progress(total, unit, desc, initial, lambda text: self._write(text, sys.stderr))

    def mention_log(self, place: str) -> None:
        """Add a place to the line that says where the log is, or print a line of its own when that one is out."""
        self._log_places.append(place)
        if self._log_places[0] != str(self.log_path):
            self._print_log_places()

    @contextlib.contextmanager
    def capture_logs(self) -> Iterator[None]:
        """Within it, logging and warnings go to the log file, and to stderr as well where `verbose`.

        Raises InputError where the log file cannot be opened.
        """
        handlers = [self._file_handler()]
        if self.verbose:
            handlers.append(logging.StreamHandler(sys.stderr))
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.INFO)
        for handler in handlers:
            handler.setLevel(logging.INFO)
            handler.setFormatter(logging.Formatter(_LOG_FORMAT))
            root.addHandler(handler)
        logging.captureWarnings(True)
        self._log_places = [str(self.log_path)]
        self._captures = True
        try:
            with contextlib.nullcontext() if self.verbose else _native_stderr_to(self.log_path):
                yield
        finally:
            self._captures = False
            logging.captureWarnings(False)
            root.setLevel(level)
            for handler in handlers:
                root.removeHandler(handler)
                handler.close()

    def _file_handler(self) -> logging.Handler:
        try:
            self.log_path.parent.mkdir(mode=0o700, exist_ok=True)
            return logging.FileHandler(self.log_path, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the log {self.log_path}: {error.strerror}; set TMPDIR elsewhere") from error

    def _print_log_places(self) -> None:
        if self._captures and self._log_places:
            places, self._log_places = self._log_places, []
            self._write("log: " + "; ".join(places), sys.stderr)

    @staticmethod
    def _write(text: str, stream: Any) -> None:
        # A bar that is being shown must be cleared first and drawn again after; tqdm.write does that.
        if "tqdm" in sys.modules and sys.stderr.isatty():
            sys.modules["tqdm"].tqdm.write(text, file=stream)
            stream.flush()
        else:
            print(text, file=stream, flush=True)
