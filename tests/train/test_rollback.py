"""A run that goes back to an older checkpoint and takes another way from there: other noise, the same data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.gan.step import StepConfig
from pipeline.stream.chunk import ChunkReader
from pipeline.train import checkpoint, log, loop
from pipeline.train.checkpoint import DamagedCheckpointError
from pipeline.train.loop import Outlets
from pipeline.train.spec import RunSpec
from tests.train.test_loop import WORLD, assert_bit_equal, batches_from, final_state, reader, spec_of, train

__all__ = ["reader"]


def spec_to(run_url: str, reader: ChunkReader, total_kimg: float, **settings: Any) -> RunSpec:
    """A tick each 40 images, a checkpoint each 80; a gamma and rates of learning to change."""
    step = StepConfig(precision="fp32", penalty="r1", gamma=(0.5,), g_lr=(4e-4,), d_lr=(2e-4,))
    spec = spec_of(run_url, reader, total_kimg=total_kimg, record_positions=True, **settings)
    return dataclasses.replace(spec, step=step)


def clocks(run_url: str) -> list[float]:
    return [stats["cur_nimg"] for stats in log.read_stats(run_url)]


def test_a_run_goes_on_from_an_older_state_with_other_noise(tmp_path: Path, reader: ChunkReader) -> None:
    url, straight = str(tmp_path / "run"), str(tmp_path / "straight")
    train(spec_to(straight, reader, 0.16), reader)
    train(spec_to(url, reader, 0.24), reader)
    before = log.read_stats(url)
    assert checkpoint.rollback(url, 1, 1, {}) == 4
    train(spec_to(url, reader, 0.16), reader)  # shorter than the first attempt was
    cur_nimg, tensors = final_state(url)
    assert cur_nimg == 160
    assert not torch.equal(*(next(iter(one["G"].values())) for one in (tensors, final_state(straight)[1])))
    # The order of the data knows no attempt: the same samples again.
    taken = log.read_positions(url).sort_by("position")
    assert taken["position"].to_pylist()[:160] == list(range(160))
    planned = np.concatenate([reader.plan.batch(step) for step in range(160 // 8)])
    assert np.array_equal(taken["sample"].to_numpy()[:160], planned)
    # Of the first attempt counts what was before the point to which the run went back, and none of what came later.
    after = log.read_stats(url)
    assert clocks(url) == [40, 80, 120, 160]
    assert after[:2] == before[:2]
    assert all(new["d_loss"] != old["d_loss"] for new, old in zip(after[2:], before[2:], strict=False))


def test_factors_change_what_is_learnt_and_outlive_a_restart(tmp_path: Path, reader: ChunkReader) -> None:
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    for url in (whole, parts):
        train(spec_to(url, reader, 0.16), reader)
        checkpoint.rollback(url, 1, 1, {"lr_factor": 0.5, "gamma_factor": 3.0})
    train(spec_to(whole, reader, 0.32), reader)
    for total_kimg in (0.16, 0.32):
        train(spec_to(parts, reader, total_kimg), reader)
    assert_bit_equal(final_state(whole)[1], final_state(parts)[1])
    stats = log.read_stats(whole)
    assert [(one["g_lr"], one["d_lr"], one["gamma"]) for one in stats] == [(4e-4, 2e-4, 0.5)] * 2 + [
        (2e-4, 1e-4, 1.5)
    ] * 6
    assert final_state(whole)[1]["G_opt"]["param_groups"][0]["lr"] == 2e-4
    last = checkpoint.latest_valid(parts, pytest.fail)
    assert last is not None
    control = checkpoint.json_state(parts, last.number, "control")
    assert (control["attempt"], control["lr_factor"], control["gamma_factor"]) == (2, 0.5, 3.0)


def test_ticks_of_every_way_that_was_left_are_left_out(tmp_path: Path, reader: ChunkReader) -> None:
    """Two rollbacks, the second behind the first, and between them ticks of another length."""
    url = str(tmp_path / "run")
    keep_all = {"num_to_keep": 20}
    train(spec_to(url, reader, 0.24, **keep_all), reader)  # checkpoints 1, 2, 3 at 80, 160, 240
    assert checkpoint.rollback(url, 2, 1, {}) == 4
    train(spec_to(url, reader, 0.32, tick_kimg=0.016, **keep_all), reader)
    assert clocks(url) == [40, 80, 120, 160, *range(176, 321, 16)]
    assert checkpoint.rollback(url, 1, 1, {}) > 4
    train(spec_to(url, reader, 0.096, tick_kimg=0.016, **keep_all), reader)
    assert clocks(url) == [40, 80, 96]


def test_a_second_attempt_that_is_lost_leaves_the_ticks_of_the_first(tmp_path: Path, reader: ChunkReader) -> None:
    url = str(tmp_path / "run")
    train(spec_to(url, reader, 0.16), reader)
    first = log.read_stats(url)
    assert checkpoint.rollback(url, 1, 1, {}) == 3
    train(spec_to(url, reader, 0.12), reader)
    assert clocks(url) == [40, 80, 120]
    for number in (3, 4):
        (tmp_path / "run" / "checkpoints" / f"{number:06d}" / checkpoint.COMMIT).unlink()
    train(spec_to(url, reader, 0.2), reader)
    assert clocks(url) == [40, 80, 120, 160, 200]
    assert log.read_stats(url)[:4] == first


def test_a_run_falls_back_from_a_damaged_checkpoint_and_does_not_keep_it_for_a_good_one(
    tmp_path: Path, reader: ChunkReader
) -> None:
    """Altered after it was looked at, so that a rank finds it; the next start is told, and passes it over."""
    url, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    train(spec_to(whole, reader, 0.16), reader)
    train(spec_to(url, reader, 0.16), reader)
    spec, outlets = spec_to(url, reader, 0.16, num_to_keep=2), Outlets(progress=lambda *_: None, report=lambda _: None)
    last = checkpoint.latest_valid(url, pytest.fail)
    assert last is not None
    path = tmp_path / "run" / "checkpoints" / "000002" / "D.pt"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedCheckpointError, match=r"000002/D\.pt was altered"):
        loop.run(spec, WORLD, last, batches_from(reader, 20), outlets)
    start = checkpoint.latest_valid(url, lambda _: None, {last.number})
    assert start is not None
    loop.run(spec, WORLD, start, batches_from(reader, spec.data_step(start.cur_nimg)), outlets)
    assert_bit_equal(final_state(url)[1], final_state(whole)[1])
    kept = sorted(path.parent.name for path in tmp_path.glob("run/checkpoints/*/COMMIT.json"))
    assert kept == ["000001", "000002", "000003"]  # two good ones
