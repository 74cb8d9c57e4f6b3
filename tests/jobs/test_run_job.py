"""`ganymede run` as a user types it: done is skipped, changed is done again, and what fails is not published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli, stages, train
from jobs import run as run_job
from jobs.run import VERB, RunJob, _of_period, _shares, _tell_missed, _todo
from jobs.terminal import Terminal
from pipeline import images, published, storage
from pipeline.config import ConfigError
from pipeline.dataset import record
from pipeline.generate.plan import GenerateConfig
from pipeline.train.ownership import Ownership
from tests.evaluate.pictures import labelled
from tests.small import make_dataset

CLASSES = ("bottom", "lower", "top", "upper")
FLAGS = (
    "--prepare.resolution 16 --prepare.channels 1 --network.z-dim 8 --network.base-width 8 --train.total-kimg 0.1 "
    "--train.batch-size 16 --train.num-lanes 2 --train.tick-kimg 0.05 --generate.num-images 60 "
    "--generate.shard-size 30 --evaluate.num-samples 40 --evaluate.classifier-steps 5 --evaluate.utility-steps 0 "
    "--gates.min-utility 0 --gates.min-copies-p-value 0"
)
WORDS = FLAGS.split()
STAGES = ["prepare", "train", "generate", "verify", "evaluate"]

Run = Callable[..., int]

pytestmark = pytest.mark.timeout(400)  # loops, several in a test


def make_source(folder: Path) -> None:
    """Images of four classes in folders of train/ and test/."""
    for split, count, seed in (("train", 120, 0), ("test", 60, 1)):
        for number, (pixels, label) in enumerate(zip(*labelled(count, seed, side=16), strict=True)):
            path = folder / split / CLASSES[label] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.encode(pixels, "png", 100))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:  # noqa: ARG001 - it has to be there
    """A source and a loop over it that ran once."""
    folder = tmp_path_factory.mktemp("loop")
    make_source(folder / "source")
    words = ["--source", str(folder / "source"), "--out", str(folder / "out"), *WORDS]
    assert cli.run_verb(VERB, words) == cli.EXIT_DONE
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of those."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same command with more words; what came before is no longer in `capsys`."""

    def typed(*more: str) -> int:
        capsys.readouterr()
        return cli.run_verb(VERB, ["--source", str(folder / "source"), "--out", str(folder / "out"), *WORDS, *more])

    return typed


def done_anew(folder: Path) -> list[str]:
    """The stages that the last run had to work for."""
    last = max((folder / "out" / "summary").iterdir())
    return [stage["name"] for stage in json.loads(last.read_text())["stages"] if not stage["done_before"]]


def shown(folder: Path) -> list[tuple[int, str]]:
    """Number and period of all that is published."""
    return [(entry.number, entry.added.period) for entry in published.series(str(folder / "out"))]


def made_in(period: str) -> published.Publication:
    """What a period could have led to."""
    return published.Publication(
        period=period, dataset=f"d/{period}", dataset_digest="d", report="r", snapshot="s", snapshot_digest="s"
    )


def test_what_is_published_is_whole_and_says_where_it_comes_from(folder: Path) -> None:
    (entry,) = published.series(str(folder / "out"))
    dataset, digest = record.read(str(folder / "out" / entry.current.dataset))
    assert dataset.num_samples("train") == 60
    assert digest == entry.current.dataset_digest
    assert dataset.lineage["snapshot_digest"] == entry.current.snapshot_digest
    assert (folder / "out" / entry.current.snapshot / "config.json").exists()
    report = json.loads((folder / "out" / entry.current.report / "report.json").read_text())
    assert report["inputs"]["synthetic"] == digest
    assert done_anew(folder) == STAGES
    assert len(list((folder / "out" / "pictures").iterdir())) == 1


def test_the_same_again_does_nothing(folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    assert run() == cli.EXIT_DONE
    assert capsys.readouterr().out.count("already done") == len(STAGES)
    assert done_anew(folder) == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")} == before
    assert shown(folder) == [(1, "")]


def test_only_what_depends_on_a_change_is_done_again(folder: Path, run: Run) -> None:
    assert run("--gates.max-fid", "1e9") == cli.EXIT_DONE
    assert done_anew(folder) == ["evaluate"]
    assert run("--generate.seed", "1") == cli.EXIT_DONE
    assert done_anew(folder) == ["generate", "verify", "evaluate"]
    assert run() == cli.EXIT_DONE
    assert done_anew(folder) == []
    # The report is part of what is published; and what was published first is current again.
    series = published.series(str(folder / "out"))
    assert [entry.number for entry in series] == [1, 2, 3, 4]
    assert series[-1].current == series[0].current


@pytest.mark.long
def test_changed_images_are_prepared_and_learnt_with_the_published_weights(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    top = folder / "source" / "train" / "top"
    shutil.copy(next(top.iterdir()), top / "new.png")
    before = published.series(str(folder / "out"))[-1].current
    assert run("--begin-with", "published") == cli.EXIT_DONE
    assert done_anew(folder) == STAGES
    assert [len(list((folder / "out" / name).iterdir())) for name in ("images", "training", "synthetic")] == [2, 2, 2]
    added = published.series(str(folder / "out"))[-1].added
    lineage = record.read(str(folder / "out" / added.dataset))[0].lineage
    assert lineage["training"]["init_from"] == before.snapshot_digest
    # It goes on, as it began, though another snapshot is published now.
    assert run("--begin-with", "published", "--train.total-kimg", "0.2") == cli.EXIT_DONE
    assert "train: goes on from checkpoint" in capsys.readouterr().out
    assert done_anew(folder) == ["train", "generate", "verify", "evaluate"]
    assert len(list((folder / "out" / "training").iterdir())) == 2
    # Though that training has gone on, the command as it was finds what it made.
    assert run("--begin-with", "published") == cli.EXIT_DONE
    assert done_anew(folder) == []
    assert published.series(str(folder / "out"))[-1].current == added


def test_a_failed_gate_leaves_the_last_one_standing_and_spares_the_many(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    made = set((folder / "out" / "synthetic").iterdir())
    words = ["--period", "2026-11-20", "--trial-images", "25", "--gates.max-fid", "1e-9"]
    assert run(*words) == cli.EXIT_REFUSED
    assert [path.name for path in (folder / "out" / "refused").iterdir()] == ["2026-11-20"]
    assert "nothing is published" in capsys.readouterr().out
    assert shown(folder) == [(1, "")]
    assert set((folder / "out" / "synthetic").iterdir()) == made
    assert done_anew(folder) == ["generate trial"]
    assert run(*words, "--gates.max-fid", "1e9") == cli.EXIT_DONE
    assert done_anew(folder) == ["evaluate trial", "generate", "verify", "evaluate"]


def test_what_is_left_of_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def todo(period: str, catch_up: bool = False) -> list[str]:
        job = RunJob(source="s", out=str(tmp_path), period=period, catch_up=catch_up)
        entries = published.series(str(tmp_path))
        _tell_missed(job, entries, Terminal("run"))
        return _todo(job, entries)

    assert todo("") == [""]
    assert todo("2026-11-20") == ["2026-11-20"]
    for day in ("2026-11-20", "2026-11-23"):
        published.publish(str(tmp_path), made_in(day))
    published.note_refused(str(tmp_path), "2026-11-21", "report/abc")
    assert todo("2026-11-24") == ["2026-11-24"]
    assert "1 periods were missed: 2026-11-22; --catch-up does them first" in capsys.readouterr().err
    assert todo("2026-11-24", catch_up=True) == ["2026-11-22", "2026-11-24"]
    assert todo("2026-11-23", catch_up=True) == ["2026-11-22"]
    assert todo("2026-11-23") == []
    job = RunJob(source="s", out=str(tmp_path), period="2026-11-23")
    assert run_job.run(job, Terminal("run")) == cli.EXIT_DONE
    assert "already done, 2026-11-23 was published as number 2" in capsys.readouterr().out


ADAPTIVE = ("--step.augment.mode", "adaptive")


@pytest.mark.parametrize(
    ("before", "more", "same"),
    [
        ((), ("--train.total-kimg", "7"), True),
        ((), ("--train.tick-kimg", "7"), True),
        (ADAPTIVE, ("--train.tick-kimg", "7"), False),
        ((), ("--workers.num-workers", "3"), True),
        ((), ("--train.seed", "7"), False),
        ((), ("--train.batch-size", "128"), False),
        ((), ("--step.gamma", "7"), False),
        ((), ("--network.z-dim", "7"), False),
        ((), ("--feed.flip", "true"), False),
    ],
)
def test_what_makes_another_training(before: tuple[str, ...], more: tuple[str, ...], same: bool) -> None:
    needed = ("--dataset", "d", "--out", "o", *before)
    jobs = [cli.configuration(train.VERB, words) for words in (needed, (*needed, *more))]
    assert jobs[0] != jobs[1]
    found = [stages.trained_by(job) for job in jobs]
    assert (found[0] == found[1]) is same


@pytest.mark.parametrize("refused", ["2026-11-21", "2026-11-22"])
def test_any_refused_period_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    published.publish(str(tmp_path), made_in("2026-11-20"))
    monkeypatch.setattr(run_job, "_once", lambda job, *_: cli.EXIT_REFUSED if job.period == refused else cli.EXIT_DONE)
    job = RunJob(source="s", out=str(tmp_path), period="2026-11-22", catch_up=True)
    assert run_job.run(job, Terminal("run")) == cli.EXIT_REFUSED


def test_what_another_driver_has_published_meanwhile_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def owned_after_another(out: str) -> Ownership:
        published.publish(out, made_in("2026-11-22"))
        return Ownership(out)

    monkeypatch.setattr(run_job, "Ownership", owned_after_another)
    monkeypatch.setattr(run_job, "_once", lambda *_: pytest.fail("done again"))
    job = RunJob(source="s", out=str(tmp_path), period="2026-11-22")
    assert run_job.run(job, Terminal("run")) == cli.EXIT_DONE
    assert "already done, 2026-11-22 was published as number 1" in capsys.readouterr().out


def test_while_one_drives_another_is_told_so(folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with Ownership(str(folder / "out")):
        assert run("--period", "2026-11-20") == cli.EXIT_FAILED
        assert "drives this run" in capsys.readouterr().err
    assert run() == cli.EXIT_DONE


def test_gates_without_images_to_judge_by_are_refused(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "source/test")
    assert run() == cli.EXIT_BAD_INPUT
    assert "has no folder test/ to judge by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--period", "yesterday"], "write an hour as 2026-11-22T05"),
        (["--period", "2999-01-01"], "has not begun"),
        (["--catch-up"], "catch_up is set and no period"),
        (["--begin-with", "published", "--train.init-from", "run"], "both say what a training begins with"),
        (["--trial-images", "-1"], "trial_images must be at least 0"),
    ],
)
def test_bad_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert cli.run_verb(VERB, ["--source", "s", "--out", str(tmp_path / "out"), *words]) == cli.EXIT_BAD_INPUT
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_what_has_no_classes_has_a_picture_beside_what_has(tmp_path: Path, classes: tuple[str, ...]) -> None:
    """As when a network that ignores labels learns from images that have some."""
    real, made = (str(tmp_path / name) for name in ("real", "made"))
    make_dataset(real, classes=("x", "y", "z"))
    make_dataset(made, classes=classes)
    found = images.decode(storage.read(stages.picture(str(tmp_path), real, made)), channels=1).pixels
    assert found.shape == (3 * 16, 2 * 10 * 16 + 16, 1)
    left, right = found[:, : 10 * 16], found[:, -10 * 16 :]
    assert left[:16].any()
    assert bool(right[16:].any()) == bool(classes)


def test_each_period_has_a_seed_that_anyone_can_work_out_again() -> None:
    def seed(period: str, base: int = 0) -> int:
        return _of_period(RunJob(source="s", out="o", period=period, generate=GenerateConfig(seed=base))).seed

    assert seed("", 7) == 7
    days = [f"2026-11-{day:02d}" for day in range(1, 21)]
    assert len({seed(day, base) for day in days for base in range(5)}) == 100
    assert seed("2026-11-20") == 35619744181170


def test_a_trial_has_the_classes_of_the_whole() -> None:
    assert _shares((), 10) == ()
    assert _shares((300, 100, 0), 40) == (30, 10, 0)
    assert _shares((1, 1, 1), 10) == (4, 3, 3)
    assert sum(_shares((7, 11, 13, 17), 9)) == 9


def test_the_record_of_a_run_is_beside_its_output(folder: Path) -> None:
    with pytest.raises(ConfigError):
        RunJob(source="s", out="o", trial_images=-1)
    assert storage.stat(str(folder / "out" / "config" / "000001.yaml")) is not None
