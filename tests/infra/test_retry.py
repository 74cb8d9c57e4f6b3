"""infra/retry.py as a RayJob runs it: a process of its own around a command with exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.infra.rendering import INFRA

SCRIPT = INFRA / "retry.py"


def _command(count: Path, codes: str) -> list[str]:
    """A command that ends its n-th run with the n-th code (the last one from then on); -9 kills itself."""
    code = (
        "import os, sys; path, codes = sys.argv[1], [int(c) for c in sys.argv[2].split(',')]\n"
        "n = os.path.getsize(path) if os.path.exists(path) else 0\n"
        "open(path, 'a').write('x'); print('try', n, flush=True); c = codes[min(n, len(codes) - 1)]\n"
        "os.kill(os.getpid(), -c) if c < 0 else sys.exit(c)"
    )
    return [sys.executable, "-S", "-c", code, str(count), codes]


def _retry(tmp_path: Path, codes: str, *flags: str) -> tuple[int, int, str]:
    """Exit code, number of runs, stderr."""
    count = tmp_path / "count"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--wait-sec", "0", *flags, "--", *_command(count, codes)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout.count("try") == count.stat().st_size
    return done.returncode, count.stat().st_size, done.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 130, 77])
def test_other_codes_than_1_end_it_at_once_and_are_passed_on(tmp_path: Path, code: int) -> None:
    returned, runs, said = _retry(tmp_path, str(code))
    assert (returned, runs) == (code, 1)
    assert (f"exit {code} after" in said) == (code != 0)


def test_exit_1_is_tried_again_until_it_works(tmp_path: Path) -> None:
    returned, runs, said = _retry(tmp_path, "1,1,0")
    assert (returned, runs) == (0, 3)
    assert said.count("exit 1 after") == 2


def test_exit_1_then_3_ends_with_3(tmp_path: Path) -> None:
    assert _retry(tmp_path, "1,3,0")[:2] == (3, 2)


def test_a_kill_by_the_kernel_is_tried_again(tmp_path: Path) -> None:
    returned, runs, said = _retry(tmp_path, "-9,0")
    assert (returned, runs) == (0, 2)
    assert "SIGKILL after" in said


def test_it_gives_up_with_the_code_of_the_last_try(tmp_path: Path) -> None:
    assert _retry(tmp_path, "1", "--tries", "3")[:2] == (1, 3)


def test_a_death_by_signal_is_told_as_a_shell_tells_it(tmp_path: Path) -> None:
    assert _retry(tmp_path, "-9", "--tries", "1")[:2] == (128 + 9, 1)


def test_a_try_that_lasted_long_makes_the_count_begin_anew(tmp_path: Path) -> None:
    returned, runs, _ = _retry(tmp_path, "1,1,1,0", "--tries", "2", "--fresh-sec", "0")
    assert (returned, runs) == (0, 4)


def test_pauses_double(tmp_path: Path) -> None:
    said = _retry(tmp_path, "1,1,0", "--wait-sec", "0.8")[2]
    assert "again in 1 s" in said
    assert "again in 2 s" in said  # 1.6


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_a_signal_goes_to_the_command_and_ends_the_tries(number: signal.Signals, ends: int) -> None:
    # A verb of ours that is interrupted ends with 130; one that is told to go may end with anything.
    code = (
        "import signal, sys, time\n"
        "signal.signal(int(sys.argv[1]), lambda *_: sys.exit(int(sys.argv[2])))\n"
        "print('up', flush=True)\n"
        "for _ in range(300): time.sleep(0.1)"  # a signal just before a sleep is heard only after it
    )
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--", sys.executable, "-S", "-c", code, str(int(number)), str(ends)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == ends
    assert "again" not in said


def test_a_signal_between_two_tries_ends_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--wait-sec", "30", "--", *_command(tmp_path / "count", "1")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "again in" not in process.stderr.readline():
        pass
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("arguments", [[], ["--"], ["--tries", "0", "--", "true"], ["--no-such", "--", "true"]])
def test_arguments_that_mean_nothing_are_bad_input(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, timeout=20, check=False)
    assert done.returncode == 2
