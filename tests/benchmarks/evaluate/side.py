"""One side of the comparison, alone in its process: prints seconds, peak memory beyond its input, and what it found."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Found = Mapping[str, float]


def features(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Like those of a network: correlated, positive, of a spectrum that falls."""
    chance = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(width, width)) * np.arange(1, width + 1) ** -0.5
    rows = chance.normal(size=(count, width)).astype(np.float32) @ mixing.T.astype(np.float32)
    return np.maximum(rows + 0.1 * seed, 0)


def prdc_ours(real: NDArray[np.float32], gen: NDArray[np.float32]) -> Callable[[], Found]:
    from pipeline.evaluate.neighbours import neighbourhood

    def measure() -> Found:
        found = neighbourhood(real, gen)
        return {
            "precision": float(found.precise.mean()),
            "recall": float(found.recalled.mean()),
            "density": float(found.density.mean()),
            "coverage": float(found.covered.mean()),
        }

    return measure


def prdc_package(real: NDArray[np.float32], gen: NDArray[np.float32]) -> Callable[[], Found]:
    from prdc import compute_prdc

    return lambda: {name: float(value) for name, value in compute_prdc(real, gen, nearest_k=5).items()}


def fid_ours(real: NDArray[np.float32], gen: NDArray[np.float32]) -> Callable[[], Found]:
    from pipeline.evaluate.moments import fid, moments

    of_real, of_gen = moments(real), moments(gen)
    return lambda: {"fid": fid(of_real, of_gen)}


def fid_scipy(real: NDArray[np.float32], gen: NDArray[np.float32]) -> Callable[[], Found]:
    """As the scripts of the known evaluators take it from means and covariances."""
    from scipy.linalg import sqrtm

    means = [side.astype(np.float64).mean(axis=0) for side in (real, gen)]
    covariances = [np.cov(side.astype(np.float64), rowvar=False) for side in (real, gen)]

    def measure() -> Found:
        apart, root = means[0] - means[1], sqrtm(covariances[0] @ covariances[1])
        return {"fid": float(apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root.real))}

    return measure


SIDES = {side.__name__: side for side in (prdc_ours, prdc_package, fid_ours, fid_scipy)}


def memory_bytes(what: str) -> int:
    """`VmRSS`, the memory in use, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main(arguments: list[str]) -> int:
    """Run it once on a few rows, so that libraries are loaded, then for the clock."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    options = parser.parse_args(arguments)
    real, gen = (features(options.count, options.width, seed) for seed in (1, 2))
    few = 2 * options.width if options.side.startswith("fid") else 20
    SIDES[options.side](real[:few], gen[:few])()
    measure = SIDES[options.side](real, gen)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: making the input had one of its own
    before, started = memory_bytes("VmRSS"), time.perf_counter()
    found = measure()
    result = {"sec": time.perf_counter() - started, "peak_bytes": memory_bytes("VmHWM") - before, "found": found}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
