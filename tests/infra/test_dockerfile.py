"""infra/Dockerfile: the project's own versions, an unprivileged user, and all that the wheel must hold."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

from tests.infra.rendering import INFRA, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def _stages() -> dict[str, list[str]]:
    """Instructions of each stage, continued lines joined."""
    stages: dict[str, list[str]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", " ", DOCKERFILE).splitlines():
        if found := re.fullmatch(r"FROM \S+ AS (\w+)", line):
            name = found[1]
        if line and not line.startswith("#"):
            stages.setdefault(name, []).append(line)
    return stages


def test_torch_is_the_version_that_the_project_pins() -> None:
    (torch,) = [requirement for requirement in NEEDED if requirement.name == "torch"]
    named = re.findall(r'"torch==([\w.]+?)(?:\+cpu)?"', DOCKERFILE)
    assert [f"=={version}" for version in named] == [str(torch.specifier)] * 2


def test_everything_else_comes_from_the_lock_and_fits_together() -> None:
    stages = _stages()
    lock = "pip install --no-cache-dir --no-deps --require-hashes --requirement /opt/ganymede/requirements.lock"
    assert f"RUN {lock}" in stages["base"]
    for target in ("cpu", "gpu"):
        torch, wheel = [line for line in stages[target] if "pip install" in line]
        assert re.fullmatch(r'RUN pip install --no-cache-dir (--index-url \S+ )?"torch==[^"]+"', torch)
        assert wheel.endswith("pip install --no-cache-dir --no-deps /wheels/*.whl && pip check")
    assert any("pip wheel --no-cache-dir --no-deps --no-build-isolation" in line for line in stages["wheel"])


def test_both_images_end_as_an_unprivileged_user_with_a_command_in_exec_form() -> None:
    stages = _stages()
    for target in ("cpu", "gpu"):
        assert [line for line in stages[target] if line.startswith("USER ")] == ["USER 1000:1000"]
        last = [line.split()[0] for line in stages[target]].index("USER")
        assert not any(line.startswith("RUN ") for line in stages[target][last:])
        assert stages[target][-1] == 'CMD ["ganymede", "--help"]'
    assert any("useradd --uid 1000" in line for line in stages["base"])


def test_nothing_is_installed_unpinned_or_left_over() -> None:
    instructions = [line for lines in _stages().values() for line in lines]
    assert not any(line.startswith("ADD ") or ":latest" in line for line in instructions)
    for line in instructions:
        if "pip install" in line:
            assert "--no-cache-dir" in line
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists/*" in line
    assert 'ARG APT_PACKAGES=""' in instructions
    assert instructions[0] == "ARG PYTHON_IMAGE=python:3.11-slim-bookworm"
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignore = [line for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line]
    assert ignore[0] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source
        for lines in _stages().values()
        for line in lines
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists()


def test_the_wheel_holds_every_file_of_the_packages() -> None:
    data = PYPROJECT["tool"]["setuptools"].get("package-data", {})
    for package in ("pipeline", "jobs"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert _packaged(path, data), f"pyproject.toml's package-data leaves {path} out of the wheel"


def _packaged(path: Path, data: dict[str, list[str]]) -> bool:
    for package, patterns in data.items():
        folder = ROOT / PurePosixPath(package.replace(".", "/")) if package != "*" else path.parent
        if folder in path.parents and any(fnmatch(str(path.relative_to(folder)), pattern) for pattern in patterns):
            return True
    return False
