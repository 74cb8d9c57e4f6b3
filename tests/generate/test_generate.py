"""Generation: every image exactly once, a pure function of plan and number, whatever is there already."""

import dataclasses
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import images, snapshot, storage
from pipeline.config import ConfigError
from pipeline.dataset import index, record, tar
from pipeline.dataset.record import DatasetError
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.generate import shard_writer
from pipeline.generate.factory import Factory, open_factory, reject_below
from pipeline.generate.plan import GenerateConfig, GeneratePlan
from pipeline.generate.ray_generate import Workers, generate, missing_shards
from pipeline.snapshot import SnapshotConfig, SnapshotError
from tests.small import read_by_webdataset

CLASSES = ("circle", "square", "star")
CPU = torch.device("cpu")


def make_snapshot(run_url: str, classes: tuple[str, ...] = CLASSES, channels: int = 1) -> str:
    shape = ImageShape(resolution=16, channels=channels, num_classes=len(classes))
    network = NetworkConfig(z_dim=8, base_width=8)
    G, D = build(network, shape, seed=0)
    G.layers[-1].weight.data.mul_(30)  # untrained weights give grey images; these have contrast
    config = SnapshotConfig(
        network=network, shape=shape, classes=classes, cur_nimg=64, precision="fp32", lineage={"training_run": "test"}
    )
    return snapshot.save(run_url, config, G, D)


def plan_of(source: snapshot.Snapshot, **settings: object) -> GeneratePlan:
    config = GenerateConfig(**({"num_images": 25, "shard_size": 10, "micro_batch": 4} | settings))  # type: ignore[arg-type]
    shape = source.config.shape
    return GeneratePlan(
        config=config,
        snapshot_digest=source.digest,
        resolution=shape.resolution,
        channels=shape.channels,
        z_dim=source.config.network.z_dim,
        classes=source.config.classes,
    )


@pytest.fixture
def source(tmp_path: Path) -> snapshot.Snapshot:
    return snapshot.load(make_snapshot(str(tmp_path / "run")))


def factory_of(plan: GeneratePlan, source: snapshot.Snapshot, num_encoders: int = 1) -> Factory:
    return open_factory(plan, source.G_ema, source.D, CPU, num_encoders)


def write_all(out: str, plan: GeneratePlan, source: snapshot.Snapshot) -> None:
    for shard in missing_shards(out, plan):
        shard_writer.write_shard(out, factory_of(plan, source), shard)


def stored(url: str) -> dict[str, bytes]:
    return {entry.name: storage.read(storage.join(url, entry.name)) for entry in storage.list_entries(url)}


def test_shards_cover_every_number_once(source: snapshot.Snapshot) -> None:
    plan = plan_of(source)
    assert plan.num_shards == 3
    assert np.concatenate([plan.seeds(shard) for shard in range(3)]).tolist() == list(range(25))
    assert np.bincount(plan.labels(np.arange(24))).tolist() == [8, 8, 8]
    assert plan_of(source, shard_size=100).num_shards == 1


@given(st.lists(st.integers(0, 400), min_size=3, max_size=3).filter(lambda counts: sum(counts) > 0))
def test_classes_are_as_many_as_asked_for_and_well_mixed(counts: list[int]) -> None:
    total = sum(counts)
    config = GenerateConfig(num_images=total, class_counts=tuple(counts))
    plan = GeneratePlan(config=config, snapshot_digest="", resolution=16, channels=1, z_dim=8, classes=CLASSES)
    labels = plan.labels(np.arange(total))
    assert np.bincount(labels, minlength=3).tolist() == counts
    assert np.array_equal(plan.labels(np.arange(total // 2, total)), labels[total // 2 :])
    if total >= 300:  # each tenth has its share, within two standard deviations of independent draws
        for part in np.array_split(labels, 10):
            share = np.bincount(part, minlength=3) - np.array(counts) * len(part) / total
            assert abs(share).max() <= len(part) ** 0.5


def test_a_billion_labels_need_no_table() -> None:
    config = GenerateConfig(num_images=10**9, class_counts=(10**9 - 10, 10, 0))
    plan = GeneratePlan(config=config, snapshot_digest="", resolution=16, channels=1, z_dim=8, classes=CLASSES)
    assert set(plan.labels(np.array([0, 5 * 10**8, 10**9 - 1])).tolist()) <= {0, 1}


def test_truncation_scales_the_noise(source: snapshot.Snapshot) -> None:
    seeds = np.arange(5)
    half = plan_of(source, truncation=0.5).noise(seeds)
    assert half.dtype == np.float32
    assert np.allclose(half, plan_of(source).noise(seeds) / 2)
    assert not plan_of(source, truncation=0.0).noise(seeds).any()


def test_an_image_depends_on_seed_and_number_alone(source: snapshot.Snapshot) -> None:
    plan = plan_of(source)
    assert np.array_equal(plan.noise(np.array([7])), plan.noise(np.arange(10))[7:8])
    other = plan_of(source, seed=1)
    assert not np.array_equal(plan.noise(np.array([7])), other.noise(np.array([7])))


def test_a_part_describes_the_stored_bytes(tmp_path: Path, source: snapshot.Snapshot) -> None:
    out, plan = str(tmp_path / "out"), plan_of(source)
    write_all(out, plan, source)
    rows = pq.read_table(io.BytesIO(storage.read(shard_writer.part_url(out, 2)))).to_pylist()
    assert [(row["key"], row["seed"], row["label"]) for row in rows] == [(f"{i:09d}", i, i % 3) for i in range(20, 25)]
    shard = storage.read(f"{out}/train/shard-000002.tar")
    for row in rows:
        pixels = images.decode(shard[row["offset"] : row["offset"] + row["size"]], channels=1).pixels
        assert pixels.shape == (16, 16, 1)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_scores_are_what_d_says_of_the_stored_images(
    tmp_path: Path, source: snapshot.Snapshot, image_format: str
) -> None:
    out, plan = str(tmp_path / "out"), plan_of(source, score=True, image_format=image_format, quality=30)
    write_all(out, plan, source)
    for number in range(plan.num_shards):
        part = pq.read_table(io.BytesIO(storage.read(shard_writer.part_url(out, number)))).to_pylist()
        shard = storage.read(f"{out}/train/shard-{number:06d}.tar")
        for row in part:
            pixels = images.decode(shard[row["offset"] : row["offset"] + row["size"]], channels=1).pixels
            image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2) / 127.5 - 1
            assert row["score"] == pytest.approx(source.D(image, torch.tensor([row["label"]])).item(), abs=1e-4)
    assert len({round(row["score"], 4) for row in part}) > 1


@given(st.sets(st.integers(0, 24), min_size=1, max_size=4))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_made_again_have_the_bytes_of_their_shards(source: snapshot.Snapshot, numbers: set[int]) -> None:
    plan = plan_of(source)
    keys = [f"{number:09d}" for number in numbers]
    again = dict(shard_writer.make_again(factory_of(plan, source), keys))
    assert sorted(again) == sorted(keys)
    for number, key in zip(numbers, keys, strict=True):
        shard = shard_writer.build_shard(factory_of(plan, source), number // 10)
        (found,) = (one for one in tar.group(tar.scan(shard, "shard"), "shard") if one.key == key)
        for extension, data in again[key].items():
            member = found.members[extension]
            assert shard[member.offset : member.offset + member.size_bytes] == data


@pytest.fixture
def varied(tmp_path: Path) -> snapshot.Snapshot:
    """Without classes, which an untrained D tells apart and little else, and with images that differ."""
    source = snapshot.load(make_snapshot(str(tmp_path / "varied"), classes=()))
    source.G_ema.layers[-1].weight.data.mul_(300)  # type: ignore[union-attr,index]
    return source


def rejecting(source: snapshot.Snapshot, share: float, **settings: object) -> GeneratePlan:
    plan = plan_of(source, reject_share=share, pilot_images=200, score=True, **settings)
    made = list[int]()
    plan = dataclasses.replace(plan, reject_below=reject_below(factory_of(plan, source), made.append))
    assert sum(made) == 200
    return plan


def test_rejection_takes_the_first_attempt_that_d_likes_or_the_best(varied: snapshot.Snapshot) -> None:
    plan = rejecting(varied, 0.6, max_tries=3)
    assert plan.reject_below is not None
    factory, seeds = factory_of(plan, varied), plan.seeds(0)
    labels = plan.labels(seeds)
    tried = [factory.make(plan.noise(seeds, attempt), labels) for attempt in range(3)]
    scores = np.stack([factory.scores(pixels, labels) for pixels in tried])
    good = scores >= plan.reject_below
    wanted = np.where(good.any(axis=0), good.argmax(axis=0), scores.argmax(axis=0))
    assert set(wanted) == {0, 1, 2}  # all of them occur among these ten
    assert not good.any(axis=0).all()  # and one that no attempt makes good
    found = factory.pixels(seeds, labels).astype(int)
    for place, attempt in enumerate(wanted):  # another batch size may round another way
        assert abs(found[place] - tried[attempt][place]).max() <= 1


def test_the_share_that_is_rejected_is_the_share_asked_for(varied: snapshot.Snapshot) -> None:
    plan = rejecting(varied, 0.3, num_images=1000, shard_size=1000)
    factory, seeds = factory_of(plan_of(varied, num_images=1000, shard_size=1000), varied), plan.seeds(0)
    labels = plan.labels(seeds)
    low = factory.scores(factory.pixels(seeds, labels), labels) < plan.reject_below
    assert low.mean() == pytest.approx(0.3, abs=0.11)  # three standard deviations of a pilot of 200
    better = factory_of(plan, varied)
    assert (better.scores(better.pixels(seeds, labels), labels) < plan.reject_below).mean() < 0.02  # 0.3 to the eighth


def test_rejection_is_a_function_of_the_plan(varied: snapshot.Snapshot) -> None:
    plan = rejecting(varied, 0.5)
    assert plan == rejecting(varied, 0.5)
    shards = [shard_writer.build_shard(factory_of(plan, varied, threads), 1) for threads in (1, 3)]
    assert shards[0] == shards[1]
    key = "000000013"
    again = dict(shard_writer.make_again(factory_of(plan, varied), [key]))[key]["png"]
    assert again in shards[0]
    assert shards[0] != shard_writer.build_shard(factory_of(plan_of(varied, score=True), varied), 1)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_shards_do_not_depend_on_how_many_threads_encode(source: snapshot.Snapshot, image_format: str) -> None:
    plan = plan_of(source, image_format=image_format)
    made = [shard_writer.build_shard(factory_of(plan, source, threads), 0) for threads in (1, 2, 3, 7)]
    assert len(set(made)) == 1


def test_two_threads_share_a_factory(source: snapshot.Snapshot) -> None:
    """As the calls of one worker do."""
    plan = plan_of(source, num_images=80)
    factory = factory_of(plan, source)
    alone = [shard_writer.build_shard(factory, shard) for shard in range(8)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda shard: shard_writer.build_shard(factory, shard), range(8))) == alone


@pytest.mark.parametrize("key", ["000000025", "25", "0000000007", "-00000001", "00000000x", ""])
def test_a_key_that_is_not_of_the_plan(source: snapshot.Snapshot, key: str) -> None:
    with pytest.raises(DatasetError, match="keys are 000000000 to 000000024"):
        list(shard_writer.make_again(factory_of(plan_of(source), source), [key]))


def test_a_shard_that_is_there_is_adopted_a_strange_one_refused(tmp_path: Path, source: snapshot.Snapshot) -> None:
    out, plan = str(tmp_path / "out"), plan_of(source)
    other = plan_of(source, quality=50, image_format="jpeg")  # another encoder's bytes for the same keys
    rival = shard_writer.build_shard(factory_of(other, source), 0)
    storage.put_if_absent(f"{out}/train/shard-000000.tar", rival)
    shard_writer.write_shard(out, factory_of(plan, source), 0)
    assert storage.read(f"{out}/train/shard-000000.tar") == rival
    wrong = shard_writer.build_shard(factory_of(plan, source), 0)
    storage.put_if_absent(f"{out}/train/shard-000001.tar", wrong)
    with pytest.raises(DatasetError, match="does not hold the images 000000010 to 000000019"):
        shard_writer.write_shard(out, factory_of(plan, source), 1)


def test_how_a_shard_came_to_be_there_is_told(
    tmp_path: Path, source: snapshot.Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = str(tmp_path / "out"), plan_of(source)
    factory = factory_of(plan, source)
    assert shard_writer.write_shard(out, factory, 0).outcome == "written"
    assert shard_writer.write_shard(out, factory, 0).outcome == "adopted"
    other = factory_of(plan_of(source, quality=50, image_format="jpeg"), source)
    build = shard_writer.build_shard
    for shard, rival, outcome in ((1, factory, "adopted"), (2, other, "conflicted")):

        def late(factory: Factory, shard: int, rival: Factory = rival) -> bytes:
            """While we make ours, a rival stores its own."""
            storage.put_if_absent(f"{out}/train/{index.shard_name(shard)}", build(rival, shard))
            return build(factory, shard)

        monkeypatch.setattr(shard_writer, "build_shard", late)
        assert shard_writer.write_shard(out, factory, shard).outcome == outcome


@pytest.mark.parametrize(
    "lost", [["train/index/part-00001.parquet"], ["train/index/part-00001.parquet", "train/shard-000001.tar"]]
)
def test_what_is_missing_is_made_again_with_the_same_bytes(
    tmp_path: Path, source: snapshot.Snapshot, lost: list[str]
) -> None:
    out, plan = str(tmp_path / "out"), plan_of(source)
    write_all(out, plan, source)
    before = stored(out)
    for name in lost:
        storage.delete(f"{out}/{name}")
    assert missing_shards(out, plan) == [1]
    write_all(out, plan, source)
    assert stored(out) == before


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("store", ["local", "s3"])
def test_the_webdataset_library_reads_what_ray_made(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    source: snapshot.Snapshot,
    store: str,
) -> None:
    out = str(tmp_path / "out") if store == "local" else str(request.getfixturevalue("s3"))
    plan, counts = plan_of(source), list[int]()
    lineage = record.settle_plan(out, plan.to_dict(), {"who": "first"})
    snapshot_url = snapshot.find(str(tmp_path / "run"))

    def run(workers: int, on_progress: Callable[[int], None]) -> record.DatasetRecord:
        return generate(snapshot_url, out, plan, lineage, workers=Workers(count=workers), on_progress=on_progress)

    made = run(2, counts.append)
    assert sorted(counts) == [5, 10, 10]
    assert record.read(out)[0] == made
    assert made.num_samples("train") == 25
    assert run(1, pytest.fail) == made  # nothing is missing: nothing is made

    local = tmp_path / "copy"
    local.mkdir()
    for name in (index.shard_name(shard) for shard in range(3)):
        (local / name).write_bytes(storage.read(f"{out}/train/{name}"))
    samples = read_by_webdataset(sorted(local.iterdir()))
    assert samples == [(f"{i:09d}", i % 3, (16, 16, 3)) for i in range(25)]
    in_process = str(tmp_path / "in-process")
    write_all(in_process, plan, source)
    # One process or many: the same bytes.
    assert stored(f"{in_process}/train") == stored(f"{out}/train")


@pytest.mark.usefixtures("ray_session")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, source: snapshot.Snapshot) -> None:
    plan, url = plan_of(source, num_images=60, score=True), snapshot.find(str(tmp_path / "run"))
    found = []
    for count, num_encoders in ((1, 1), (2, 4), (3, 2)):  # two with four encoders take every CPU of the session's Ray
        out = str(tmp_path / str(count))
        workers = Workers(count=count, num_encoders=num_encoders)
        lineage = record.settle_plan(out, plan.to_dict(), {})
        generate(url, out, plan, lineage, workers=workers, on_progress=lambda _: None)
        found.append(stored(out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6 * 2 + 2 + 3  # shards, parts, plan and record, the card


def test_unconditional_rgb_has_no_labels(tmp_path: Path) -> None:
    source = snapshot.load(make_snapshot(str(tmp_path / "rgb"), classes=(), channels=3))
    out, plan = str(tmp_path / "out"), plan_of(source, image_format="webp", num_images=3)
    write_all(out, plan, source)
    rows = index.rows_of_shard("s", storage.read(f"{out}/train/shard-000000.tar"), 3)
    assert rows["label"].to_pylist() == [None] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_images": 0},
        {"num_images": -3},
        {"shard_size": 0},
        {"quality": 101},
        {"reject_share": 1.0},
        {"reject_share": -0.1},
        {"max_tries": 1},
        {"pilot_images": 0},
    ],
)
def test_counts_that_mean_nothing(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerateConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["G_ema.safetensors", "D.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "altered", "not ours"])
def test_a_snapshot_that_is_damaged_or_not_ours(tmp_path: Path, name: str, damage: str) -> None:
    url = Path(make_snapshot(str(tmp_path)))
    data = (url / name).read_bytes()
    (url / name).unlink()
    replacement = {"cut": data[: len(data) // 2], "altered": bytes([data[0] ^ 255]) + data[1:], "not ours": b'{"a": 1}'}
    if damage in replacement:
        (url / name).write_bytes(replacement[damage])
    with pytest.raises(SnapshotError) as caught:
        snapshot.load(str(url))
    assert str(url) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_furthest_trained_snapshot_of_a_run_is_found(tmp_path: Path, source: snapshot.Snapshot) -> None:
    run_url = str(tmp_path / "run")
    later = snapshot.save(run_url, dataclasses.replace(source.config, cur_nimg=10**6), source.G_ema, source.D)
    assert snapshot.find(run_url) == later == snapshot.find(later)
    with pytest.raises(SnapshotError, match="no snapshot here"):
        snapshot.find(str(tmp_path / "nothing"))


def test_a_snapshot_of_another_format_is_refused(tmp_path: Path) -> None:
    config = Path(make_snapshot(str(tmp_path))) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    with pytest.raises(SnapshotError, match="format 99"):
        snapshot.load(str(config.parent))
