"""The harness of `make bench-generate`: a quick run of all of it, and when it says that a must is missed."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import images, snapshot
from pipeline.gan.sample import sample
from tests.benchmarks.generate import ours
from tests.benchmarks.generate.__main__ import MUSTS, _missed
from tests.benchmarks.generate.network import make_snapshot


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_quick_run_prints_its_ratios() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.generate", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bench"] == "generate"
    assert set(found["ratios"]) == {"png32_vs_ceiling", "png32_vs_known_way", "png32_encoder_vs_pillow"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    assert found["first_part_sec"] > 0


def test_missed_musts_are_named() -> None:
    assert _missed(MUSTS, 15.0) == []
    assert _missed({**MUSTS, "png256_vs_known_way": 5.9}, 1.0) == ["png256_vs_known_way is 5.9, must be 6.0"]
    assert _missed({}, 15.1) == ["first_part_sec is 15.1, must be at most 15.0"]


def test_a_rate_counts_from_the_first_receipt_to_the_last() -> None:
    assert ours._rate([(10.0, 999), (11.0, 50), (14.0, 150)]) == 50.0


def test_the_generator_is_fixed_and_its_images_are_like_photographs(tmp_path: Path) -> None:
    """The energy of an octave is as in photographs that of the one below, or down to half of it; so are PNG sizes."""
    url = make_snapshot(str(tmp_path), 256)
    assert make_snapshot(str(tmp_path), 256) == url
    z = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    pixels = sample(snapshot.load(url).G_ema, z, torch.zeros(4, dtype=torch.int64), precision="fp32").numpy()
    sizes = [len(images.encode(image, "png", 100)) / 1024 for image in pixels]
    assert 90 < min(sizes) < max(sizes) < 160
    energy = np.abs(np.fft.fft2(pixels.mean(axis=3) - pixels.mean())).mean(axis=0) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256, 1 / 256), np.fft.fftfreq(256, 1 / 256)))
    octaves = [energy[(radius >= low) & (radius < 2 * low)].sum() for low in (2, 4, 8, 16, 32)]
    falls = [high / low for low, high in itertools.pairwise(octaves)]
    assert 0.35 < min(falls) < max(falls) < 1  # white noise: 4; a smooth surface: near 0
