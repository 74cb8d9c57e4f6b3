"""infra/README.md and infra/sizing.md: what they name exists, and what they compute follows from what was measured."""

import math
import re
from pathlib import Path

import pytest

from tests.infra import commands
from tests.infra.rendering import INFRA, ROOT

README, SIZING, MAIN = (
    (path / name).read_text() for path, name in ((INFRA, "README.md"), (INFRA, "sizing.md"), (ROOT, "README.md"))
)
KIB_256_PNG = 122


def _number(text: str) -> float:
    return float(text.replace(",", "").removesuffix(" M")) * (1e6 if text.endswith(" M") else 1)


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its two head lines."""
    section = SIZING.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_file_that_the_readme_names_exists() -> None:
    named = {*re.findall(r"\binfra/[\w./-]+[\w]", README), *re.findall(r"tests/[\w./]+\w", README)}
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path
    table = [
        name for row in re.findall(r"^\| (.+?) \|", README, re.MULTILINE) for name in re.findall(r"`([\w./-]+)`", row)
    ]
    listed = {path for path in table if (INFRA / path).exists()}
    assert listed == set(table)
    files = {str(path.relative_to(INFRA)) for path in INFRA.iterdir() if path.is_file()}
    assert files - {"README.md", "Dockerfile.dockerignore", "sizing.md"} == {
        name for name in listed if (INFRA / name).is_file()
    } - {"sizing.md"}


def test_every_folder_to_apply_is_one() -> None:
    applied = re.findall(r"kubectl apply -k (\S+)", README)
    assert len(applied) > 5
    for folder in applied:
        assert (ROOT / folder / "kustomization.yaml").is_file()
    for file in re.findall(r"(?:kubectl apply -f|ray (?:up|down|attach)) (infra/\S+)", README):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("path", [INFRA / "README.md"], ids=["README"])
def test_every_command_of_a_verb_is_understood(path: Path) -> None:
    found = commands.in_text(path.read_text())
    assert len(found) >= 2
    for command in found:
        commands.resolved(command)


def test_measured_numbers_stand_in_the_projects_readme() -> None:
    rates = [row[1] for row in _rows("Generating")] + [row[3] for row in _rows("Training")]
    for number in [*rates, "1,609", "5,829", "31,792", "5,473", f"{KIB_256_PNG} KiB", "0.59 GFLOP"]:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", MAIN), f"{number} is not in README.md's benchmarks"
        assert number in SIZING


def test_nodes_for_images_follow_from_the_rates() -> None:
    rows = _rows("Generating")
    assert len(rows) == 4
    for row in rows:
        core = _number(row[1]) / 2
        assert _number(row[2]) == core
        for images, hours, nodes in zip((1e6, 1e8, 1e9), row[3:6], row[6:9], strict=True):
            core_hours = images / core / 3600
            assert hours == (f"{core_hours:.1f}" if images == 1e6 else f"{core_hours:,.0f}")
            assert int(nodes) == math.ceil(core_hours / (8 * 24))


def test_hours_of_training_follow_from_the_rates_and_presets() -> None:
    from pipeline.gan.presets import RECIPES

    rows = _rows("Training")
    assert len(rows) == 7
    for row in rows:
        (preset,) = re.findall(r"`([\w-]+)`", row[0])
        images, rate = _number(row[1]), _number(row[3])
        assert images == RECIPES[preset].total_kimg * 1000
        assert row[4] == f"{images / rate / 3600:.1f}"
        assert row[5] == f"{images / rate / 8 / 3600:.1f}"
    unmeasured = re.findall(
        r"`([\w-]+)`", SIZING.partition("under Ray Train |")[2].partition("have not been measured")[0]
    )
    shown = {re.findall(r"`([\w-]+)`", row[0])[0] for row in rows} | {
        "r3gan-imagenet64" if n == "-64" else n for n in unmeasured
    }
    assert shown == set(RECIPES)


def test_bytes_cores_and_costs_follow_from_their_formulae() -> None:
    gib = [f"{images * KIB_256_PNG / 2**20:,.0f} GiB" for images in (1e6, 1e8, 1e9)]
    flat = " ".join(SIZING.split())
    assert f"1 M are {gib[0]}, 100 M are {gib[1]}, 1 B are {gib[2]}" in flat
    assert f"{5829 / 2:,} (" not in flat
    assert "so 2,914.5 and 15,896 a core" in flat
    assert (5829 / 2, 31792 / 2) == (2914.5, 15896)
    assert f"take {8 * 62.5 / 2914.5:.1f} core" in flat
    assert f"compiled {8 * 776 / 15896:.1f}" in flat
    (core_hours,) = re.findall(r"\| 256² PNG \| 219 \| [\d.]+ \| [\d.]+ \| (\d+) \|", SIZING)  # of 100 M images
    for formula, value in (
        (f"{core_hours} / 8 × 0.40", int(core_hours) / 8 * 0.40),
        ("11,635 × 0.02 × 1 month", 11635 * 0.02),
        ("200,000 / 1000 × 0.005", 200 * 0.005),
        ("55.6 × 8 × 1.20 × (1 + 0.05)", 55.6 * 8 * 1.20 * 1.05),
    ):
        assert f"{formula} | {value:.2f} |" in flat
    assert f"{(0.5 / 2 + 0.05) / 6:.2f}" == "0.05"
