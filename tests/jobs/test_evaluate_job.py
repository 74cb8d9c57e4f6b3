"""`ganymede evaluate` as a user types it: good images pass, copies and rubbish are refused, bad input is told."""

import dataclasses
import html
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs import cli, evaluate
from jobs.evaluate import EvaluateJob
from pipeline import config, images, snapshot, storage
from pipeline.dataset import index, part, record, tar
from pipeline.dataset.record import DatasetRecord
from pipeline.errors import InputError
from pipeline.evaluate.ray_evaluate import EvaluateConfig
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.images import Pixels
from tests.evaluate.pictures import labelled

FEW = [
    "--classifier-steps",
    "40",
    "--utility-steps",
    "40",
    "--utility-seeds",
    "1",
    "--num-samples",
    "400",
    "--num-workers",
    "2",
]
CLASSES = ("top", "upper", "lower", "bottom")


def store(
    url: str,
    splits: dict[str, tuple[Pixels, NDArray[np.int64]]],
    classes: tuple[str, ...] = CLASSES,
    resolution: int = 32,
) -> None:
    """A dataset of these images, in shards of 250."""
    parts = {}
    for split, (pixels, labels) in splits.items():
        tables = []
        for start in range(0, len(pixels), 250):
            rows = range(start, min(start + 250, len(pixels)))
            data = tar.build(
                (f"{i:09d}", {"png": images.encode(pixels[i], "png", 100), "cls": b"%d" % labels[i]}) for i in rows
            )
            name = index.shard_name(start // 250)
            storage.put_if_absent(f"{url}/{split}/{name}", data)
            tables.append(index.rows_of_shard(name, data, 1))
        listed = part.encode_part(tables)
        storage.put_if_absent(f"{url}/{split}/{index.part_name(0)}", listed)
        parts[split] = (part.describe_part(index.part_name(0), listed),)
    made = DatasetRecord(channels=1, resolution=resolution, image_format="png", classes=classes, splits=parts)
    record.commit(url, made)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("real"))
    store(url, {"train": labelled(1500, seed=0), "test": labelled(500, seed=1)})
    return url


Run = Callable[..., int]


@pytest.fixture
def run(real: str, tmp_path: Path, ray_session: None) -> Run:  # noqa: ARG001 - it has to be there
    def typed(pixels: Pixels, labels: NDArray[np.int64], *words: str) -> int:
        gen = str(tmp_path / "gen")
        if storage.stat(f"{gen}/dataset.json") is None:
            store(gen, {"train": (pixels, labels)})
        command = ["--real", real, "--synthetic", gen, "--out", str(tmp_path / "report"), *FEW, *words]
        return cli.run_verb(evaluate.VERB, command)

    return typed


def test_good_images_pass_and_a_second_run_says_the_same(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*labelled(600, seed=2)) == cli.EXIT_DONE
    first = capsys.readouterr()
    assert "evaluate: passed 2 gates, 400 images a side" in first.out
    assert "warning: no snapshot, so no pictures between latents" in first.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = report["found"]
    assert set(found["anchors"]) == {"real", "blurred", "noisy", "one class missing", "ten images repeated"}
    assert found["metrics"]["fid"]["value"] < 0.5 * found["anchors"]["one class missing"]["fid"]["value"]
    assert 0.8 < found["utility"]["worth"] < 1.2
    assert [gate["name"] for gate in report["gates"]] == ["utility", "copies_p_value"]
    assert report["passed"] is True
    assert set(found["classes"]) == set(CLASSES)
    assert found["notices"] == []
    assert all(of["num_samples"] >= 20 and of["real_fid"]["value"] < 20 for of in found["classes"].values())
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png;base64,") >= len(CLASSES) + 2
    assert report["command"] in html.unescape(page)
    verb, typed = shlex.split(report["command"])[1:2], shlex.split(report["command"])[2:]
    assert verb == ["evaluate"]
    assert cli.run_verb(evaluate.VERB, [*typed, "--dry-run"]) == cli.EXIT_DONE
    resolved = config.from_yaml(EvaluateJob, capsys.readouterr().out)
    assert resolved.evaluate == EvaluateConfig(classifier_steps=40, utility_steps=40, utility_seeds=1, num_samples=400)
    assert cli.typed(evaluate.VERB, resolved) == report["command"]
    assert run(*labelled(600, seed=2)) == cli.EXIT_DONE
    again = capsys.readouterr().out
    assert again.startswith("evaluate: already done")
    assert again.partition("\n")[2] == first.out
    assert run(*labelled(600, seed=2), "--seed", "1") == cli.EXIT_BAD_INPUT
    assert "the report of another evaluation; choose another output URL" in capsys.readouterr().err


def test_a_gate_that_fails_is_in_the_report(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--utility-steps", "0", "--gates.max-fid", "1e-6", "--gates.min-coverage", "0.01"]
    assert run(*labelled(600, seed=2), *words) == cli.EXIT_REFUSED
    told = capsys.readouterr()
    assert "FAILED: fid" in told.out
    assert "failed fid; see" in told.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {
        "fid": False,
        "coverage": True,
        "copies_p_value": True,
    }
    assert report["passed"] is False
    words = ["--utility-steps", "0", "--gates.min-utility", "0.9", "--out", str(tmp_path / "other")]
    assert run(*labelled(600, seed=2), *words) == cli.EXIT_BAD_INPUT
    assert "gates.min_utility is set, and there is no utility here to judge" in capsys.readouterr().err


def test_the_snapshot_that_made_the_images(tmp_path: Path) -> None:
    """Of a run, whichever of its snapshots it is; another one is refused, and so is a guess."""
    network, shape = (
        NetworkConfig(z_dim=8, base_width=8, max_width=8),
        ImageShape(resolution=32, channels=1, num_classes=0),
    )
    urls = []
    for cur_nimg in (8, 16):
        described = snapshot.SnapshotConfig(
            network=network, shape=shape, classes=(), cur_nimg=cur_nimg, precision="fp32", lineage={}
        )
        urls.append(snapshot.save(str(tmp_path), described, *build(network, shape, seed=0)))
    first, last = (snapshot.load(url).digest for url in urls)
    for url in (str(tmp_path), urls[0]):
        assert evaluate._that_made(first, url).digest == first
    assert evaluate._that_made(last, str(tmp_path)).config.cur_nimg == 16
    with pytest.raises(InputError, match=f"made by snapshot {last}, and this is {first}; name that one"):
        evaluate._that_made(last, urls[0])
    with pytest.raises(InputError, match="no snapshot here"):
        evaluate._that_made(last, str(tmp_path / "nothing"))


def test_a_page_that_was_not_committed_gives_way(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "report" / "report.html"
    page.parent.mkdir()
    page.write_text("of a run that was killed")
    assert run(*labelled(100, seed=2), "--utility-steps", "0", "--num-samples", "100") == cli.EXIT_DONE
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_copies_of_training_images_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, labels = labelled(600, seed=2)
    training, training_labels = labelled(1500, seed=0)
    pixels[::20], labels[::20] = training[:600:20], training_labels[:600:20]
    assert run(pixels, labels) == cli.EXIT_REFUSED
    assert "FAILED: copies_p_value" in capsys.readouterr().out


@pytest.mark.slow
def test_images_that_teach_nothing_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, labels = labelled(600, seed=2)
    assert run(pixels, np.random.default_rng(0).permutation(labels)) == cli.EXIT_REFUSED
    assert "FAILED: utility" in capsys.readouterr().out


def test_without_two_classes_there_is_no_utility(tmp_path: Path, ray_session: None) -> None:  # noqa: ARG001
    for name, splits in (
        ("real", {"train": labelled(300, 0), "test": labelled(100, 1)}),
        ("gen", {"train": labelled(100, 2)}),
    ):
        store(str(tmp_path / name), splits, classes=("all",) if name == "real" else ())
    words = ["--real", f"{tmp_path}/real", "--synthetic", f"{tmp_path}/gen", "--out", f"{tmp_path}/report"]
    assert cli.run_verb(evaluate.VERB, [*words, *FEW]) == cli.EXIT_DONE
    found = json.loads((tmp_path / "report" / "report.json").read_text())["found"]
    assert found["num_samples"] == 100
    assert "utility" not in found
    assert "classes" not in found
    assert "one class missing" not in found["anchors"]
    assert found["class_names"] == []
    assert any("100 images a side and 128 features" in notice for notice in found["notices"])


def test_images_of_another_size_are_resized_where_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    pixels, labels = labelled(100, seed=2, side=16)
    store(str(tmp_path / "gen"), {"train": (pixels, labels)}, resolution=16)
    words = ["--utility-steps", "0", "--resize", "crop", "--num-samples", "100"]
    assert run(pixels, labels, *words) == cli.EXIT_DONE
    found = json.loads((tmp_path / "report" / "report.json").read_text())["found"]
    assert "Images that were not 32² grey were brought to that (crop)." in found["notices"]


def test_classes_in_other_shares_and_none_of_one(run: Run, tmp_path: Path) -> None:
    pixels, labels = labelled(600, seed=2)
    kept = (labels != 3) & ((labels != 0) | (np.arange(600) % 2 == 0))
    assert run(pixels[kept], labels[kept], "--utility-steps", "0") == cli.EXIT_DONE
    found = json.loads((tmp_path / "report" / "report.json").read_text())["found"]
    assert any("No synthetic image of bottom was among" in notice for notice in found["notices"])
    assert any("Classes have other shares" in notice for notice in found["notices"])
    assert set(found["classes"]) == set(CLASSES[:3])
    assert any("1 classes have fewer than 20 images on a side" in notice for notice in found["notices"])
    assert found["memorisation"]["num_tested"] < found["num_samples"]


def test_sets_that_cannot_be_compared(
    real: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ray_session: None,  # noqa: ARG001
) -> None:
    words = ["--real", real, "--out", str(tmp_path / "report")]
    store(str(tmp_path / "few"), {"train": labelled(19, seed=2)})
    assert cli.run_verb(evaluate.VERB, [*words, "--synthetic", str(tmp_path / "few")]) == cli.EXIT_BAD_INPUT
    assert "the smallest set has 19 images, and 20 are the fewest" in capsys.readouterr().err
    made, _ = record.read(str(tmp_path / "few"))
    record.commit(str(tmp_path / "large"), dataclasses.replace(made, resolution=64))
    assert cli.run_verb(evaluate.VERB, [*words, "--synthetic", str(tmp_path / "large")]) == cli.EXIT_BAD_INPUT
    assert "brought to the size of the real ones by --resize crop or pad" in capsys.readouterr().err
    assert cli.run_verb(evaluate.VERB, [*words, "--synthetic", real, "--reference-split", "val"]) == cli.EXIT_BAD_INPUT
    assert "no split 'val', it has test, train; prepare the real images with folders train/ and test/" in (
        capsys.readouterr().err
    )
    assert (
        cli.run_verb(evaluate.VERB, [*words, "--synthetic", real, "--reference-split", "train"]) == cli.EXIT_BAD_INPUT
    )
    assert "images that were trained on say nothing" in capsys.readouterr().err
