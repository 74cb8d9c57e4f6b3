"""The loop of one rank, without Ray: the clock, ticks, and a resume that changes nothing."""

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import images, snapshot, storage
from pipeline.config import ConfigError
from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError
from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks.build import ImageShape, NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.batches import Batch, rank_batches
from pipeline.stream.chunk import ChunkReader, Decoder
from pipeline.stream.order import OrderPlan
from pipeline.train import checkpoint, log, loop
from pipeline.train.checkpoint import CheckpointError
from pipeline.train.loop import Outlets
from pipeline.train.ownership import OwnershipError
from pipeline.train.ranks import World
from pipeline.train.spec import RunSpec, TrainConfig
from tests.small import CLASSES, make_dataset
from tests.stream.readers import block

TRAIN = TrainConfig(
    total_kimg=0.16, batch_size=8, num_lanes=4, tick_kimg=0.04, checkpoint_kimg=0.08, deterministic=True
)
WORLD = World(rank=0, size=1, device=torch.device("cpu"), wrap=lambda network: network)


@pytest.fixture
def reader(tmp_path: Path) -> ChunkReader:
    made = make_dataset(str(tmp_path / "data"), num_samples=50)
    plan = OrderPlan(num_samples=50, seed=0, batch_size=8, num_lanes=4, steps_per_group=3)
    index = IndexReader(str(tmp_path / "data" / "train"), made.splits["train"])
    return ChunkReader(index=index, plan=plan, decoder=Decoder(resolution=16, channels=1), in_tasks=True)


def spec_of(run_url: str, reader: ChunkReader, **train: Any) -> RunSpec:
    return RunSpec(
        run_url=run_url,
        owner=1,
        plan=reader.plan,
        dataset_digest="d" * 64,
        shape=ImageShape(resolution=16, channels=1, num_classes=2),
        classes=CLASSES,
        network=NetworkConfig(z_dim=8, base_width=4),
        step=StepConfig(precision="fp32"),
        train=dataclasses.replace(TRAIN, **train),
        lineage={"training_run": "test"},
    )


def batches_from(reader: ChunkReader, first_step: int) -> Iterator[Batch]:
    first = reader.plan.first_chunk(first_step)
    return rank_batches((block(reader, n) for n in range(first, 10**6)), reader, first_step, 0, 1, 1)


def train(spec: RunSpec, reader: ChunkReader) -> list[Mapping[str, float]]:
    """Run to the end from the last checkpoint; returns what was reported."""
    torch.set_num_threads(1)
    reports: list[Mapping[str, float]] = []
    start = checkpoint.latest_valid(spec.run_url, pytest.fail)
    first = spec.data_step(start.cur_nimg if start else 0)
    outlets = Outlets(progress=lambda *_: None, report=reports.append)
    loop.run(spec, WORLD, start, batches_from(reader, first), outlets)
    return reports


def final_state(run_url: str) -> tuple[int, dict[str, Any]]:
    last = checkpoint.latest_valid(run_url, pytest.fail)
    assert last is not None
    return last.cur_nimg, dict(checkpoint.load(run_url, last).tensors)


def assert_bit_equal(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            assert_bit_equal(a[key], b[key])
    else:
        assert a == b


def test_a_run_leaves_what_it_promises(tmp_path: Path, reader: ChunkReader) -> None:
    url = str(tmp_path / "run")
    reports = train(spec_of(url, reader), reader)
    assert [report["cur_nimg"] for report in reports] == [40, 80, 120, 160]
    assert [stats["cur_nimg"] for stats in log.read_stats(url)] == [40, 80, 120, 160]
    assert [event["cur_nimg"] for event in log.read_events(url) if event["event"] == "checkpoint"] == [80, 160]
    grids = [entry.name for entry in storage.list_entries(f"{url}/samples")]
    assert grids == [f"0001-{nimg:012d}.png" for nimg in (40, 80, 120, 160)]
    assert images.decode(storage.read(f"{url}/samples/{grids[0]}"), channels=1).pixels.shape == (2 * 16, 10 * 16, 1)
    assert len(list(storage.list_entries(f"{url}/tensorboard"))) == 4
    taken = snapshot.load(snapshot.find(url))
    assert taken.config.cur_nimg == 160
    assert taken.config.classes == CLASSES
    assert_bit_equal(taken.G_ema.state_dict(), final_state(url)[1]["G_ema"])


@pytest.mark.parametrize("cut_nimg", [80, 120])
def test_resumed_equals_undisturbed(tmp_path: Path, reader: ChunkReader, cut_nimg: int) -> None:
    """The second cut lies after a checkpoint and inside a group: the work since then is done again, to the bit."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train(spec_of(whole, reader), reader)

    def die(cur_nimg: int, _: Mapping[str, Any]) -> None:
        if cur_nimg == cut_nimg:
            raise KeyboardInterrupt

    outlets, cut = Outlets(progress=die, report=lambda _: None), spec_of(parts, reader)
    with pytest.raises(KeyboardInterrupt):
        loop.run(cut, WORLD, None, batches_from(reader, 0), outlets)
    first = final_state(parts)[0] if cut_nimg > 80 else 0
    assert first == (80 if cut_nimg > 80 else 0)
    train(spec_of(parts, reader), reader)
    assert final_state(parts)[0] == final_state(whole)[0] == 160
    assert_bit_equal(final_state(parts)[1], final_state(whole)[1])
    resumed = [event for event in log.read_events(parts) if event["event"] == "resumed"]
    assert [event["cur_nimg"] for event in resumed] == ([80] if cut_nimg > 80 else [])


def test_a_finished_run_is_extended_not_repeated(tmp_path: Path, reader: ChunkReader) -> None:
    longer, whole = str(tmp_path / "longer"), str(tmp_path / "whole")
    train(spec_of(longer, reader, total_kimg=0.08), reader)
    train(spec_of(longer, reader), reader)
    train(spec_of(whole, reader), reader)
    assert_bit_equal(final_state(longer)[1], final_state(whole)[1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"plan": {"batch_size": 16}}, {"dataset_digest": "e" * 64}])
def test_resuming_with_other_settings_is_refused(tmp_path: Path, reader: ChunkReader, change: dict[str, Any]) -> None:
    url = str(tmp_path / "run")
    train(spec_of(url, reader, total_kimg=0.08), reader)
    other = spec_of(url, reader, **{name: value for name, value in change.items() if name == "seed"})
    if "plan" in change:
        other = dataclasses.replace(other, plan=dataclasses.replace(reader.plan, **change["plan"]))
    if "dataset_digest" in change:
        other = dataclasses.replace(other, dataset_digest=change["dataset_digest"])
    with pytest.raises(CheckpointError, match="cannot resume with other settings"):
        train(other, reader)


@pytest.mark.parametrize("d_steps", [1, 3])
def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path, reader: ChunkReader, d_steps: int) -> None:
    """One in eight of those that were read, however many batches an iteration takes."""
    step = StepConfig(precision="fp32", d_steps=d_steps)
    bad = (dataclasses.replace(batch, replaced=("why",)) for batch in batches_from(reader, 0))
    outlets = Outlets(progress=lambda *_: None, report=lambda _: None)
    spec = dataclasses.replace(spec_of(str(tmp_path / "run"), reader), step=step)
    with pytest.raises(InputError, match=r"12\.5% of the samples"):
        loop.run(spec, WORLD, None, bad, outlets)


def test_an_iteration_takes_the_batches_its_step_wants(tmp_path: Path, reader: ChunkReader) -> None:
    """R real batches, two D steps and G's own: the cursor is R · cur_nimg / B, and a resume finds its place."""
    step = StepConfig(precision="fp32", loss="relativistic", d_steps=2, penalty="r1_r2", gamma=(0.1,))
    whole, parts = (
        dataclasses.replace(spec_of(str(tmp_path / name), reader, record_positions=True), step=step)
        for name in ("whole", "parts")
    )
    assert whole.data_step(80) == 30
    train(whole, reader)
    train(dataclasses.replace(parts, train=dataclasses.replace(parts.train, total_kimg=0.08)), reader)
    train(parts, reader)
    assert_bit_equal(final_state(parts.run_url)[1], final_state(whole.run_url)[1])
    assert sorted(log.read_positions(whole.run_url)["position"].to_pylist()) == list(range(3 * 160))


def test_ada_follows_the_sign_and_survives_a_resume(tmp_path: Path, reader: ChunkReader) -> None:
    ada = AugmentConfig(mode="adaptive", p=(0.1,), target=-0.999, ramp_kimg=1.0)  # D is always surer than that
    step = StepConfig(precision="fp32", augment=ada)
    whole, parts = (
        dataclasses.replace(spec_of(str(tmp_path / name), reader), step=step) for name in ("whole", "parts")
    )
    reports = train(whole, reader)
    assert [report["augment_p"] for report in reports] == pytest.approx([0.1, 0.14, 0.18, 0.22])
    train(dataclasses.replace(parts, train=dataclasses.replace(parts.train, total_kimg=0.08)), reader)
    train(parts, reader)
    assert_bit_equal(final_state(parts.run_url)[1], final_state(whole.run_url)[1])
    last = checkpoint.latest_valid(whole.run_url, pytest.fail)
    assert last is not None
    assert checkpoint.json_state(whole.run_url, last.number, "control")["augment_p"] == pytest.approx(0.26)


def test_without_bf16_in_hardware_it_is_float32_and_says_so(
    tmp_path: Path, reader: ChunkReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    spec = dataclasses.replace(spec_of(str(tmp_path), reader, total_kimg=0.04), step=StepConfig(precision="bf16"))
    train(spec, reader)
    told = [event for event in log.read_events(str(tmp_path)) if event["event"] == "precision"]
    assert [(event["wanted"], event["used"]) for event in told] == [("bf16", "fp32")]
    assert snapshot.load(snapshot.find(str(tmp_path))).config.precision == "fp32"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"batch_size": 10, "num_lanes": 4}, "not a multiple"),
        ({"total_kimg": 0.0}, "total_kimg must be above 0"),
        ({"num_to_keep": 0}, "num_to_keep"),
        ({"snapshot_kimg": -1.0}, "snapshot_kimg must be at least 0"),
        ({"fid_samples": 1}, "fid_samples 0 or at least 2"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        TrainConfig(**settings)


def test_a_former_owner_stops_at_a_tick(tmp_path: Path, reader: ChunkReader) -> None:
    """Long before its next checkpoint, which would be refused."""
    url = str(tmp_path / "run")
    storage.put_if_absent(f"{url}/owners/000002.json", b"{}")
    with pytest.raises(OwnershipError, match="owner 2 has taken over from owner 1"):
        train(spec_of(url, reader, total_kimg=16.0, checkpoint_kimg=16.0), reader)
    assert log.read_stats(url)[-1]["cur_nimg"] < 8000


def test_snapshots_at_intervals_change_nothing_else(tmp_path: Path, reader: ChunkReader) -> None:
    """Rounded up to whole ticks; the end's comes besides."""
    plain, url = str(tmp_path / "plain"), str(tmp_path / "run")
    train(spec_of(plain, reader), reader)
    train(spec_of(url, reader, snapshot_kimg=0.05, checkpoint_kimg=0.04), reader)
    assert_bit_equal(final_state(url)[1], final_state(plain)[1])
    events = {kind: list(events_of(url, kind)) for kind in ("snapshot", "finished")}
    assert {kind: [event["cur_nimg"] for event in told] for kind, told in events.items()} == {
        "snapshot": [80],
        "finished": [160],
    }
    taken = snapshot.load(events["snapshot"][0]["snapshot"])
    assert taken.config.cur_nimg == 80
    earlier = checkpoint.latest_valid(url, lambda _: None, damaged={3, 4})
    assert earlier is not None
    assert earlier.cur_nimg == 80
    assert_bit_equal(taken.G_ema.state_dict(), checkpoint.load(url, earlier).tensors["G_ema"])
    assert snapshot.find(url) == events["finished"][0]["snapshot"]


def events_of(url: str, kind: str) -> Iterator[Mapping[str, Any]]:
    return (event for event in log.read_events(url) if event["event"] == kind)


def test_a_resumed_run_takes_no_snapshot_twice(tmp_path: Path, reader: ChunkReader) -> None:
    """Not even one that has been removed since; one that was missed is no error."""
    url = str(tmp_path)
    spec = spec_of(url, reader, snapshot_kimg=0.04, checkpoint_kimg=0.16)

    def die(cur_nimg: int, _: Mapping[str, Any]) -> None:
        if cur_nimg == 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(spec, WORLD, None, batches_from(reader, 0), Outlets(progress=die, report=lambda _: None))
    assert [event["cur_nimg"] for event in events_of(url, "snapshot")] == [40, 80]
    first, second = (taken.url(url) for taken in snapshot.without_fid(url))
    storage.delete(f"{first}/config.json")
    storage.delete(f"{url}/snapshots/taken/0001-000000000080.json")
    train(spec, reader)
    assert [event["cur_nimg"] for event in events_of(url, "snapshot")] == [40, 80, 80, 120]
    assert not snapshot.exists(url, 40)
    assert [taken.url(url) for taken in snapshot.without_fid(url)][1] == second  # the same weights
    assert [entry.name for entry in storage.list_entries(f"{url}/snapshots/ends")] == ["0001-000000000160.json"]


def test_a_snapshot_is_written_beside_training(
    tmp_path: Path, reader: ChunkReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is over before the first is written, and others are left out meanwhile, but for the end's."""
    url, reached, save = str(tmp_path), threading.Event(), snapshot.save_states

    def slow(*arguments: Any) -> str:
        assert reached.wait(30)
        return save(*arguments)

    def progress(cur_nimg: int, _: Mapping[str, Any]) -> None:
        if cur_nimg == 160:
            reached.set()

    monkeypatch.setattr(snapshot, "save_states", slow)
    spec = spec_of(url, reader, snapshot_kimg=0.04, checkpoint_kimg=0.16, deterministic=False)
    loop.run(spec, WORLD, None, batches_from(reader, 0), Outlets(progress=progress, report=lambda _: None))
    assert [event["cur_nimg"] for event in events_of(url, "snapshot")] == [40]
    assert [event["cur_nimg"] for event in events_of(url, "snapshot_left_out")] == [80, 120]
    assert [event["cur_nimg"] for event in events_of(url, "finished")] == [160]


def test_a_former_owner_takes_no_snapshot(tmp_path: Path, reader: ChunkReader) -> None:
    url = str(tmp_path)
    storage.put_if_absent(f"{url}/owners/000002.json", b"{}")
    with pytest.raises(OwnershipError):
        train(spec_of(url, reader, snapshot_kimg=0.04), reader)
    assert list(storage.list_entries(f"{url}/snapshots")) == []


def test_what_a_preempted_run_took_is_recorded_up_to_its_checkpoint(tmp_path: Path, reader: ChunkReader) -> None:
    """Its checkpoint lies within a tick, whose end does not come: the machine is gone before."""
    settings = {"total_kimg": 0.4, "tick_kimg": 0.4, "checkpoint_kimg": 0.4, "record_positions": True}
    spec = spec_of(str(tmp_path), reader, **settings)

    def until_it_goes() -> Iterator[Batch]:
        for number, batch in enumerate(batches_from(reader, 0)):
            if number == 30:
                raise KeyboardInterrupt
            yield batch

    outlets = Outlets(progress=lambda *_: None, report=lambda _: None, preempted=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        loop.run(spec, WORLD, None, until_it_goes(), outlets)
    kept = final_state(str(tmp_path))[0]
    assert 0 < kept < 240
    train(spec, reader)
    assert log.read_positions(str(tmp_path)).sort_by("position")["position"].to_pylist() == list(range(400))
