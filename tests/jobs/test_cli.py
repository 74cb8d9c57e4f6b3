"""The command line, through a verb made up here; as a script this file is that verb."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from jobs import cli, terminal
from jobs.cli import Terminal, Verb, run_verb
from jobs.terminal import Progress
from pipeline.config import ConfigError, from_yaml
from pipeline.errors import InputError, RetryableError


@dataclass(frozen=True, kw_only=True)
class Loader:
    threads: int = 2
    """Decoding threads a task."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    num_images: int = 100
    """Images to make; 100% of them."""
    mode: Literal["fine", "loud", "bug", "input", "retry", "wrapped", "sleep", "ray"] = "fine"
    scale: float = 1.0
    truncate: bool = False
    labels: tuple[int, ...] = ()
    seed: int = 1
    config: str | None = None
    """Its short name is the command's own."""

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise ConfigError("num_images must not be negative")


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    out: str
    """Where to write: a URL."""
    seed: int = 7
    """Top-level, so it owns the short name."""
    generate: Generate = Generate()
    loader: Loader = Loader()


def run(job: GenerateJob, term: Terminal) -> int:
    mode = job.generate.mode
    if mode == "ray":
        return run_ray(term)
    raises = {"bug": KeyError("lost\nkey"), "input": InputError("a\nb is bad"), "retry": RetryableError("try again")}
    if mode in raises:
        raise raises[mode]
    if mode == "wrapped":
        raise RuntimeError("outer") from InputError("inner")
    term.line("started")
    if mode == "sleep":
        time.sleep(60)
    if mode == "loud":
        import logging
        import warnings

        logging.getLogger("some.library").info("chatter")
        warnings.warn("old thing", UserWarning, stacklevel=1)
        term.warn("mind\nthis")
    with term.progress(job.generate.num_images, "img", "making") as progress:
        for _ in range(10):
            progress.update(job.generate.num_images // 10, loss=0.25)
    term.line("finished")
    return cli.EXIT_REFUSED if job.generate.truncate else cli.EXIT_DONE


def run_ray(term: Terminal) -> int:
    """Healthy work, whose result is printed, and then a task that raises an error of ours."""
    import ray

    from jobs.ray_session import start_ray

    def double(batch):  # type: ignore[no-untyped-def]
        print("chatter from a task")
        return {"y": batch["id"] * 2}

    def refuse(batch):  # type: ignore[no-untyped-def]
        raise InputError(f"sample {batch['id'][7]} is no image")

    start_ray(term, object_store_bytes=200 * 2**20)
    total = sum(int(batch["y"].sum()) for batch in ray.data.range(1000).map_batches(double).iter_batches())
    term.line(f"total {total}, store {int(ray.cluster_resources()['object_store_memory'])}")
    ray.data.range(10, override_num_blocks=1).map_batches(refuse).materialize()
    return cli.EXIT_DONE


VERB = Verb(
    name="generate",
    help="a generator -> images",
    config=GenerateJob,
    presets={"demo": {"generate.num_images": 20, "generate.scale": 0.5}, "large": {"generate.num_images": "4000"}},
    run=run,
)


def resolved(capsys: pytest.CaptureFixture[str], *argv: str) -> GenerateJob:
    code = run_verb(VERB, [*argv, "--dry-run"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return from_yaml(GenerateJob, out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run_verb(VERB, argv) == cli.EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, "one line"
    return err.removeprefix("ganymede generate: ").rstrip("\n")


def script(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, *argv]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=60)


def test_flags_of_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", "s3://b/x", "--num-images", "5", "--mode", "loud", "--scale", "-1e-3", "--truncate"]
    job = resolved(capsys, *argv, "--labels", "1,2", "--loader.threads=4")
    assert job.out == "s3://b/x"
    assert job.generate == Generate(num_images=5, mode="loud", scale=-1e-3, truncate=True, labels=(1, 2))
    assert job.loader.threads == 4


def test_a_bool_flag_alone_means_true_and_takes_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, "--truncate", "--out", "x").generate.truncate
    assert not resolved(capsys, "--out", "x", "--truncate", "--truncate", "false").generate.truncate


def test_the_long_form_is_the_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    short = resolved(capsys, "--out", "x", "--num-images", "3")
    assert resolved(capsys, "--out", "x", "--generate.num-images", "3") == short


def test_a_taken_short_name_stays_with_its_owner(capsys: pytest.CaptureFixture[str]) -> None:
    job = resolved(capsys, "--out", "x", "--seed", "3", "--generate.seed", "4", "--generate.config", "c")
    assert (job.seed, job.generate.seed, job.generate.config) == (3, 4, "c")


def test_later_layers_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("out: from-file\ngenerate: {num_images: 30, mode: loud}\n")
    argv = ["--num-images", "40", "--config", str(file), "--preset", "demo"]
    job = resolved(capsys, *argv)
    assert (job.out, job.generate.num_images, job.generate.mode, job.generate.scale) == ("from-file", 40, "loud", 0.5)
    assert resolved(capsys, *argv[2:]).generate.num_images == 30
    assert resolved(capsys, "--preset", "large", "--out", "x").generate.num_images == 4000


def test_dry_run_output_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resolved(capsys, "--out", "x", "--preset", "demo", "--scale", "2e-4")
    assert run_verb(VERB, ["--out", "x", "--preset", "demo", "--scale", "2e-4", "--dry-run"]) == 0
    (tmp_path / "job.yaml").write_text(capsys.readouterr().out)
    assert resolved(capsys, "--config", str(tmp_path / "job.yaml")) == first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--out must be given; see ganymede generate --help"),
        (["--out"], "argument --out: expected one argument"),
        (["--out", "x", "y"], "unexpected argument 'y'; see ganymede generate --help"),
        (["--out", "x", "--num-image", "3"], "unknown flag '--num-image' (did you mean '--num-images'?); see"),
        (["--out", "x", "--num-images", "3x"], "--num-images: wants a whole number (int), got '3x'"),
        (["--out", "x", "--generate.num-images=3x"], "--num-images: wants a whole number (int), got '3x'"),
        (["--out", "x", "--mode", "louder"], "--mode: wants one of fine, loud, bug"),
        (["--out", "x", "--num-images", "-1"], "generate: num_images must not be negative"),
        (["--out", "x", "--preset", "dmo"], "there is no preset 'dmo' (did you mean 'demo'?); presets: demo, large"),
    ],
)
def test_bad_arguments_are_one_line(argv: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *argv).startswith(message)


def test_bad_config_files_are_one_line_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    for content, message in [
        (b"generate: {num_image: 3}", "generate: unknown key 'num_image' (did you mean 'num_images'?)"),
        (b"generate: [", "is not YAML: "),
        (b"\xff\xfe\x00", "is not a text in UTF-8"),
        (b"generate: {scale: fast}", "generate.scale: wants a number (float), got 'fast'"),
    ]:
        file.write_bytes(content)
        assert refused(capsys, "--out", "x", "--config", str(file)).startswith(f"{file}: {message}")
    assert "nothing.yaml" in refused(capsys, "--out", "x", "--config", str(tmp_path / "nothing.yaml"))


def test_help_lists_short_forms_docs_defaults_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(VERB, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--num-images INT Images to make; 100% of them. [default 100]" in text
    assert "--generate.num-images" not in text
    assert "--generate.seed INT [default 1]" in text
    assert "--generate.config TEXT" in text
    assert "--out TEXT Where to write: a URL. [required]" in text
    assert "presets: demo, large" in text


def test_main_knows_its_verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jobs.generate", SimpleNamespace(VERB=VERB))
    assert cli.main(["generate", "--out", "x", "--dry-run"]) == 0
    assert "num_images: 100" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert cli.main(["generat"]) == cli.EXIT_BAD_INPUT
    assert "there is no verb 'generat' (did you mean 'generate'?); verbs: prepare" in capsys.readouterr().err
    assert cli.main([]) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


def heavy(*arguments: str) -> tuple[str, str]:
    """What the command line prints, and which modules it has then imported of those that take long."""
    code = (
        "import sys; from jobs.cli import main; main(sys.argv[1:]);"
        "print('heavy:', [m for m in ('torch', 'ray', 'boto3', 'pyarrow', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    printed, _, modules = done.stdout.rpartition("heavy: ")
    return printed, modules.strip()


def test_help_imports_nothing_heavy() -> None:
    printed, modules = heavy("--help")
    assert all(verb in printed for verb in cli.VERBS)
    assert modules == "[]"


def test_help_of_generate_comes_before_torch() -> None:
    printed, modules = heavy("generate", "--help")
    assert "--num-images" in printed
    assert modules == "['numpy']"


def test_a_quiet_run(tmp_path: Path) -> None:
    done = script("--out", "x", "--mode", "loud", env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, "started\nfinished\n")
    log_line, warning, progress = done.stderr.splitlines()
    log = Path(log_line.removeprefix("log: "))
    assert log.parent == tmp_path / f"ganymede-logs-{os.getuid()}"
    assert re.fullmatch(r"generate-\d+\.log", log.name)
    assert warning == "warning: mind this"
    assert re.fullmatch(r"making: 100/100 \(100%\) img, \S+ img/s, 0 s left, loss 0\.25", progress)
    assert "INFO some.library: chatter" in log.read_text()
    assert "UserWarning: old thing" in log.read_text()


def test_verbose_shows_the_log(tmp_path: Path) -> None:
    done = script("--out", "x", "--mode", "loud", "--verbose", env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0
    assert "INFO some.library: chatter" in done.stderr
    assert "UserWarning: old thing" in done.stderr


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [
        ("input", 2, "ganymede generate: a b is bad"),
        ("wrapped", 2, "ganymede generate: inner"),
        ("retry", 1, "ganymede generate: try again (log: LOG)"),
        ("bug", 1, "ganymede generate: internal error: KeyError: 'lost\\nkey'; the traceback is in LOG"),
    ],
)
def test_exit_codes(
    mode: str, code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.tempfile, "tempdir", str(tmp_path))
    assert run_verb(VERB, ["--out", "x", "--mode", mode]) == code
    out, err = capsys.readouterr()
    (log,) = tmp_path.glob("*/*.log")
    assert (out, err) == ("", line.replace("LOG", str(log)) + "\n")
    assert "Traceback" in log.read_text()


def test_the_verbs_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.tempfile, "tempdir", str(tmp_path))
    assert run_verb(VERB, ["--out", "x", "--truncate"]) == cli.EXIT_REFUSED


def test_a_log_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.tempfile, "tempdir", str(tmp_path / "not-there"))
    assert "set TMPDIR" in refused(capsys, "--out", "x")


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "--out", "x", "--mode", "sleep"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that starts the tests in the background has SIGINT ignored, and its children inherit that.
    with subprocess.Popen(command, env=env, text=True, preexec_fn=heed_interrupts, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert err.splitlines()[1:] == ["ganymede generate: interrupted"]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    env = {**os.environ, "TMPDIR": str(tmp_path), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, __file__, "--out", "x"], env=env, stderr=follower, stdout=follower, timeout=60
    )
    os.close(follower)
    shown = b""
    # Linux says EIO, not end of file, once the other side is closed and all is read.
    while True:
        try:
            shown += os.read(leader, 65536)
        except OSError:
            break
    os.close(leader)
    assert done.returncode == 0
    assert b"making: 100%" in shown
    assert b"loss=0.25" in shown


def test_plain_progress_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_LINE_SEC", 0.1)
    said: list[str] = []
    with Progress(None, "img", "making", 50, said.append) as progress:
        for _ in range(200):
            progress.update(1)
        assert said == []
        time.sleep(0.11)
        progress.update(1)
        progress.update(1)
        assert len(said) == 1
    assert [line.split(",")[0] for line in said] == ["making: 251 img", "making: 252 img"]


def test_ray_is_quiet_and_an_error_of_ours_in_a_task_is_known(tmp_path: Path) -> None:
    # No token and no address from outside: the Ray a person on a laptop gets.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, __file__, "--out", "x", "--mode", "ray"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"total 999000, store {200 * 2**20}\n", done.stderr
    log_line, error_line = done.stderr.splitlines()
    assert re.fullmatch(r"log: \S+generate-\d+\.log; Ray's: \S+/session_\S+/logs", log_line)
    assert (done.returncode, error_line) == (2, "ganymede generate: sample 7 is no image")
    assert list(tmp_path.iterdir()) == [], "nothing written to the home folder"
    logs = {path.name for path in Path(log_line.partition("Ray's: ")[2]).iterdir()}
    assert "raylet.out" in logs
    assert not logs & {"dashboard.log", "monitor.log", "log_monitor.log"}, "a process that serves nobody was started"


def test_verbose_shows_what_workers_print(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, __file__, "--out", "x", "--mode", "ray", "--verbose"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert "chatter from a task" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("127.0.0.1:1", 1, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: "),
        ("ray://127.0.0.1:1", 2, "RAY_ADDRESS is ray://127.0.0.1:1, which only a client outside the cluster can use"),
        ("127.0.0.1:x", 2, "RAY_ADDRESS is 127.0.0.1:x, which is no HOST:PORT"),
    ],
)
def test_a_ray_address_that_cannot_work(address: str, code: int, message: str) -> None:
    done = script("--out", "x", "--mode", "ray", env={"RAY_ADDRESS": address})
    assert done.returncode == code
    assert done.stderr.startswith(f"ganymede generate: {message}")


if __name__ == "__main__":
    sys.exit(run_verb(VERB, sys.argv[1:]))
