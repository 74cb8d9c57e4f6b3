"""Write requirements.lock (runtime) and requirements-dev.lock (what only development adds): `make lock`.

torch and the CUDA libraries of its wheel are left out: PyPI and the CPU index offer different files as one version, so
no set of hashes fits both. pyproject.toml pins torch's version; the wheel pins its CUDA libraries.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
LEFT_OUT = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
_HEADER = "# {}; by `make lock`, do not edit. torch and its CUDA libraries: see infra/lock.py.\n"


def resolve(uv: str, *extra: str) -> list[str]:
    """Pins of pyproject.toml for every platform and Python of the project, each with its hashes.

    Versions in the lock files stay where they still fit. Raises CalledProcessError where there is no solution.
    """
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", *extra]
    for name in (LOCK, DEV_LOCK):
        if (ROOT / name).exists():
            command += ["--constraint", name]
    done = subprocess.run([*command, "pyproject.toml"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    pins = re.findall(r"^[a-z0-9][\s\S]*?(?=^[a-z0-9]|\Z)", done.stdout, re.MULTILINE)
    return [pin for pin in pins if not LEFT_OUT.match(pin)]


def main(uv: str) -> None:
    """Write both lock files; a pin stands in one of them."""
    runtime = resolve(uv)
    (ROOT / LOCK).write_text(_HEADER.format("What the project needs to run") + "".join(runtime))
    names = {pin.split("==")[0] for pin in runtime}
    dev = [pin for pin in resolve(uv, "--extra", "dev") if pin.split("==")[0] not in names]
    (ROOT / DEV_LOCK).write_text(_HEADER.format("What development needs beside requirements.lock") + "".join(dev))


if __name__ == "__main__":
    main(sys.argv[1])
