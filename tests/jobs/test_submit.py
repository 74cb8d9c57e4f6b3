"""`ganymede submit` without a cluster: names of jobs, and what is refused before anything is sent."""

import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import cli, submit
from tests.s3_server import free_ports

VERIFY = ["--", "verify", "--dataset", "s3://b/data"]


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int = cli.EXIT_BAD_INPUT) -> str:
    """The one line on stderr."""
    assert cli.main(["submit", *words]) == code
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("ganymede submit: ")
    return line


def test_an_id_is_that_of_what_two_runs_must_not_share() -> None:
    one = submit.submission_id("train", "s3://b/run")
    assert re.fullmatch(r"train-[0-9a-f]{16}", one)
    assert one == submit.submission_id("train", "s3://b/run/")
    others = [("generate", "s3://b/run", ""), ("train", "s3://b/run2", ""), ("train", "s3://b/run", "2026-11")]
    assert len({one, *(submit.submission_id(*other) for other in others)}) == 4


def test_the_id_is_of_the_output_and_the_period_and_of_nothing_else() -> None:
    def named(*words: str) -> str:
        verb, job = submit._job(words)
        return submit.submission_id(verb.name, submit._output(job), submit._period(job))

    train = ("train", "--dataset", "s3://b/data", "--out", "s3://b/run")
    assert named(*train) == named(*train, "--preset", "dcgan", "--train.seed", "7")
    assert named(*train) != named("train", "--dataset", "s3://b/data", "--out", "s3://b/other")
    loop = ("run", "--source", "s3://b/raw", "--out", "s3://b/loop")
    assert len({named(*loop), named(*loop, "--period", "2026-10"), named(*loop, "--period", "2026-09")}) == 3
    assert named(*VERIFY[1:]) == submit.submission_id("verify", "s3://b/data")


def test_a_configuration_file_of_this_machine_is_sent_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "smaller.yaml"
    file.write_text("train: {total_kimg: 7, seed: 3}\nnetwork: {name: r3gan}\n")
    words = ["train", "--dataset", "s3://b/data", "--out", "s3://b/a run", "--preset", "r3gan-cifar10"]
    assert submit._entrypoint(words, *submit._job(words)) == shlex.join(["python", "-m", "jobs.train", *words[1:]])
    with_file = [*words, f"--config={file}", "--train.seed", "4"]
    verb, job = submit._job(with_file)
    sent = shlex.split(submit._entrypoint(with_file, verb, job))
    assert sent[:3] == ["python", "-m", "jobs.train"]
    assert not any(word.startswith(("--config", "--preset")) for word in sent)
    assert cli.configuration(verb, sent[3:]) == job
    assert (job.train.total_kimg, job.train.seed) == (7, 4)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no verb follows --"),
        (["--"], "no verb follows --"),
        (["verify", "--dataset", "s3://b/data"], "unrecognized arguments"),
        (["--", "verfy"], "there is no verb 'verfy' (did you mean 'verify'?)"),
        (["--", "submit"], "there is no verb 'submit'"),
        ([*VERIFY, "--dry-run"], "need no cluster: ganymede verify --dataset s3://b/data --dry-run"),
        (["--", "verify"], "--dataset must be given"),
        (["--", "train", "--dataset", "s3://b/data", "--out", "s3://b/run", "--train.total-kimgs", "1"], "total-kimg"),
        (["--", "train", "--dataset", "s3://b/data", "--out", "s3://b/run", "--train.total-kimg", "-1"], "above 0"),
        (["--", "run", "--source", "s3://b/raw", "--out", "s3://b/loop", "--period", "never"], "never"),
        (["--", "verify", "--dataset", "data"], "data: the job runs in a folder that Ray removes"),
        (VERIFY, "which cluster? Give --address http://HOST:8265"),
        (["--address", "127.0.0.1:6379", *VERIFY], "which cluster?"),
        (["--image", "--working-dir", ".", *VERIFY], "not allowed with argument"),
    ],
)
def test_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], why: str
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert why in refused(capsys, words)


def test_no_cluster_there_is_worth_another_try() -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "jobs.submit", "--address", f"http://127.0.0.1:{port}", *VERIFY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == cli.EXIT_FAILED
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ganymede submit: no Ray cluster answers at http://127.0.0.1:{port}")


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.mark.filterwarnings("default")  # of sockets that requests leaves open
def test_what_is_no_dashboard_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is none, and a gateway whose dashboard is away."""
    assert "is no address of a dashboard" in refused(capsys, ["--address", "http://127.0.0.1:abc", *VERIFY])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert "503" in refused(capsys, ["--address", url, *VERIFY], cli.EXIT_FAILED)
        server.shutdown()


def test_a_job_does_the_period_that_its_id_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though it may begin in the next one. Ray's client is not what is tested here."""
    sent: dict[str, Any] = {}
    client = SimpleNamespace(list_jobs=list, submit_job=lambda **job: sent.update(job))
    monkeypatch.setattr(submit, "_client", lambda _: client)
    file = tmp_path / "hourly.yaml"
    file.write_text("period: this-hour\n")
    loop = ["run", "--source", "s3://b/raw", "--out", "s3://b/loop"]
    for words in ([*loop, "--period", "this-hour"], [*loop, "--config", str(file)]):
        assert cli.main(["submit", "--no-wait", "--", *words]) == cli.EXIT_DONE
        period = sent["metadata"]["period"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d", period)
        assert sent["submission_id"] == submit.submission_id("run", "s3://b/loop", period)
        _, job = submit._job(["run", *shlex.split(sent["entrypoint"])[3:]])
        assert job.period == period


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.EXIT_DONE
    assert "submit" in capsys.readouterr().out
    assert cli.main(["submit", "--help"]) == cli.EXIT_DONE
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--address", "--working-dir", "--image", "--no-wait"))


@pytest.mark.parametrize(
    ("folder", "why"), [("nothing", "has no folder jobs/"), ("", "the project is not installed from its repository")]
)
def test_what_is_no_repository_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, why: str
) -> None:
    monkeypatch.setattr(submit, "_ROOT", tmp_path)
    given = ["--working-dir", str(tmp_path / folder)] if folder else []
    with pytest.raises(submit.InputError, match=re.escape(why)):
        submit._runtime_env(submit._parser().parse_args(given))


def test_keys_are_not_sent_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    sent = submit._runtime_env(submit._parser().parse_args([]))
    assert sent["working_dir"] == str(Path(submit.__file__).parents[1])
    assert "very secret" not in str(sent)
    assert set(sent) == {"working_dir", "excludes"}
    assert submit._runtime_env(submit._parser().parse_args(["--image"])) == {}
    assert submit._who().endswith(f"@{socket.gethostname()}")
