"""`ganymede prepare` as a user types it: exit codes, one line for what is wrong, and no harm done by a kill."""

import hashlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import cli, prepare
from pipeline import storage
from pipeline.dataset import record
from tests.prepare import trees

SMALL = ["--resolution", "16", "--shard-size", "8"]


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the verb in this process."""
    capsys.readouterr()
    code = cli.run_verb(prepare.VERB, list(words))
    output = capsys.readouterr()
    return code, output.out, output.err


def _digests(root: Path) -> dict[str, str]:
    # events/prepare.yaml says how the run was started, its places included; all else is compared.
    names = [entry.name for entry in storage.list_entries(str(root)) if entry.name != "events/prepare.yaml"]
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_summary_and_already_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = trees.folder_files(150, splits=("train", "test"))
    files["train/cat/0000.png"] = b"no picture"
    files["train/cat/notes.txt"] = b"x"
    files["test/dog/0001.png"] = trees.image_bytes(5, "GIF")
    url, out = trees.write_folder(tmp_path / "in", files), tmp_path / "out"
    code, said, warned = _run(capsys, "--source", url, "--out", str(out), *SMALL)
    assert code == 0
    assert said.splitlines() == [
        f"prepare: test 150, train 149 images of 16² × 3, 2 classes in {out}; converted: palette 1; "
        "1 files that are no images ignored"
    ]
    assert f"1 corrupt images were left out; see {out}/events" in warned
    before = _digests(out)
    code, said, _ = _run(capsys, "--source", url, "--out", str(out), *SMALL)
    assert (code, said) == (0, f"prepare: already done, test 150, train 149 images of 16² × 3, 2 classes in {out}\n")
    assert _digests(out) == before


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_columns_of_parquet_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = trees.hub_table([trees.image_bytes(i) for i in range(12)], [0] * 12)
    table = table.append_column("photo", table["image"]).append_column("kind", pa.array(["x", "y", "z"] * 4))
    trees.write_parquet(tmp_path / "in/train.parquet", table)
    words = ["--image-column", "photo", "--label-field", "column:kind", "--class-names", "z,y,x"]
    code, said, _ = _run(capsys, "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *SMALL, *words)
    assert (code, said) == (0, f"prepare: train 12 images of 16² × 3, 3 classes in {tmp_path / 'out'}\n")
    assert record.read(str(tmp_path / "out"))[0].classes == ("z", "y", "x")


def test_already_done_starts_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_make", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(prepare.plans, "is_done", lambda *_: True)
    monkeypatch.setattr(prepare, "_holds", lambda _: "images")
    url = trees.write_folder(tmp_path / "in", trees.folder_files(2))
    assert cli.run_verb(prepare.VERB, ["--source", url, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_bad_input_is_exit_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = trees.write_folder(tmp_path / "good", trees.folder_files(4))
    rotten = trees.write_folder(tmp_path / "rotten", trees.folder_files(40) | {f"cat/x{i}.png": b"x" for i in range(3)})
    text = trees.write_folder(tmp_path / "text", {"a.txt": b"x"})
    (tmp_path / "empty").mkdir()
    hub = trees.write_hub(tmp_path / "hub", {"train": 4})
    cut = trees.write_folder(tmp_path / "cut", {"a.parquet": b"PAR1"})
    evil = trees.write_cifar10(tmp_path / "evil")
    trees.write_folder(tmp_path / "evil", {"test_batch": b"cos\nsystem\n(X\4\0\0\0truetR."})
    stranger = trees.write_folder(tmp_path / "stranger", {"mine.txt": b"x"})
    out = str(tmp_path / "out")
    for words, message in [
        (["--source", str(tmp_path / "none"), "--out", out], "missing or empty"),
        (["--source", str(tmp_path / "empty"), "--out", out], "missing or empty"),
        (["--source", text, "--out", out], "holds no images"),
        (["--source", good, "--out", out, "--resolution", "48"], "resolution is 48"),
        (["--source", good, "--out", out, "--fit", "stretch"], "fit"),
        (["--source", good, "--out", stranger], "not empty"),
        (["--source", good, "--out", "gs://bucket/x"], "neither a local path"),
        (["--source", good], "--out must be given"),
        (["--source", good, "--out", out, "--preset", "fashion"], "fashion-mnist"),
        (["--source", cut, "--out", out], "not a whole Parquet file"),
        (["--source", hub, "--out", out, "--image-column", "nose"], "no column nose of images; it has image"),
        (["--source", hub, "--out", out, "--label-field", "column:nose"], "no column nose of numbers or names"),
        (["--source", evil, "--out", out], "test_batch: asks for os.system, which data has no need of"),
        (["--source", rotten, "--out", str(tmp_path / "rot")], "3 of the 43 images of split train are corrupt"),
    ]:
        code, said, complaint = _run(capsys, *words)
        lines = [
            line
            for line in complaint.splitlines()
            if not line.startswith(("log: ", "prepare: ")) and "INFO" not in line
        ]
        assert (code, said, len(lines)) == (2, "", 1), complaint
        assert message in lines[0]
        assert not Path(out).exists()
    assert not (tmp_path / "rot/dataset.json").exists()
    assert _digests(Path(stranger)).keys() == {"mine.txt"}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
def test_output_that_holds_another_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, out = trees.write_folder(tmp_path / "in", trees.folder_files(4)), str(tmp_path / "out")
    assert _run(capsys, "--source", url, "--out", out, *SMALL)[0] == 0
    before = _digests(tmp_path / "out")
    code, _, complaint = _run(capsys, "--source", url, "--out", out, *SMALL, "--seed", "7")
    assert code == 2
    assert "holds another dataset, its plan differs in config" in complaint
    assert _digests(tmp_path / "out") == before


def _command(source: str, out: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "jobs.prepare", "--source", source, "--out", out, *SMALL, *more]


def _full_disk(folder: Path, command: list[str]) -> list[str]:
    """The command with a real 300 KiB disk mounted at `folder`, in a mount namespace of its own."""
    script = f"mount -t tmpfs -o size=300k tmpfs {shlex.quote(str(folder))} && {shlex.join(command)}; code=$?; "
    script += f"find {shlex.quote(str(folder))} -type f | sed 's/^/left: /'; exit $code"
    return ["unshare", "-rm", "sh", "-c", script]


def test_disk_full_is_exit_2_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    url = trees.write_folder(tmp_path / "in", trees.folder_files(300))
    command = _command(url, str(tmp_path / "disk/out"), "--resolution", "64", "--shard-size", "20")
    if shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0:
        command = _full_disk(tmp_path / "disk", command)
    else:  # no namespaces here: a limit on the size of a file is the same kind of fault
        command = ["sh", "-c", f"ulimit -f 100; exec {shlex.join(command)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    complaints = [line for line in done.stderr.splitlines() if line.startswith("ganymede prepare: ")]
    assert done.returncode == 2, done.stderr
    assert len(complaints) == 1
    assert "disk" in complaints[0]
    assert "Traceback" not in done.stderr
    left = [line.removeprefix("left: ") for line in done.stdout.splitlines() if line.startswith("left: ")]
    assert not [name for name in left if "dataset.json" in name or ".tmp" in name]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kill_and_the_same_command_again_give_the_same_bytes(tmp_path: Path) -> None:
    seed = int(os.environ.get("GANYMEDE_TEST_SEED", "0")) or random.SystemRandom().randrange(10**6)
    print("seed", seed)
    delays = random.Random(seed)
    url = trees.write_folder(tmp_path / "in", trees.folder_files(600) | {"cat/bad.png": b"x"})
    quiet = {"capture_output": True, "timeout": 100, "check": True}
    subprocess.run(_command(url, str(tmp_path / "undisturbed")), **quiet)
    wanted = _digests(tmp_path / "undisturbed")
    out = tmp_path / "killed"
    for _ in range(3):
        started = subprocess.Popen(
            _command(url, str(out)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        shards = len(list(out.glob("train/*.tar")))
        deadline = time.monotonic() + 60
        while started.poll() is None and len(list(out.glob("train/*.tar"))) <= shards and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delays.uniform(0, 0.1))
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert not (out / "dataset.json").exists()
    subprocess.run(_command(url, str(out)), **quiet)
    assert _digests(out) == wanted
