"""A run that begins with a snapshot's weights: what it takes over, what it makes anew, what it refuses."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline import snapshot
from pipeline.errors import InputError
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.gan.step import Networks
from pipeline.snapshot import Snapshot, SnapshotConfig, SnapshotError
from pipeline.stream.chunk import ChunkReader
from pipeline.train import finetune, log
from pipeline.train.finetune import Inherited
from pipeline.train.ranks import networks
from pipeline.train.spec import RunSpec
from tests.train.test_loop import WORLD, assert_bit_equal, final_state, reader, spec_of, train

__all__ = ["reader"]

NETWORKS = {
    "dcgan": NetworkConfig(z_dim=8, base_width=4),
    "sngan": NetworkConfig(name="sngan", z_dim=8, base_width=4, max_width=8),
    "r3gan": NetworkConfig(name="r3gan", z_dim=8, base_width=16, max_width=16, depth=1, g_embed_dim=4),
}
CLASSES = ("circle", "square", "star")
each_network = pytest.mark.parametrize("name", NETWORKS)


def make_donor(url: str, network: NetworkConfig, classes: tuple[str, ...], **shape: int) -> Snapshot:
    """A snapshot in which no value is one that a new network has."""
    config = SnapshotConfig(
        network=network,
        shape=ImageShape(**{"resolution": 16, "channels": 1} | shape, num_classes=len(classes)),
        classes=classes,
        cur_nimg=1000,
        precision="fp32",
        lineage={},
    )
    G, D = build(network, config.shape, 1)
    generator = torch.Generator().manual_seed(2)
    for tensor in [*G.state_dict().values(), *D.state_dict().values()]:
        tensor.add_((torch.rand(tensor.shape, generator=generator) / 5 + 0.02).to(tensor))
    improve_norms(D)
    return snapshot.load(snapshot.save(url, config, G, D))


def improve_norms(network: nn.Module) -> None:
    for module in filter(parametrize.is_parametrized, network.modules()):
        for _ in range(50):
            _ = module.weight


def begun(
    tmp_path: Path, reader: ChunkReader, donor: Snapshot, classes: tuple[str, ...], network: NetworkConfig | None = None
) -> tuple[Networks, Networks, Inherited]:
    """A new run's networks, the same after they have begun with the donor's weights, and what is said of that."""
    spec = dataclasses.replace(
        spec_of(str(tmp_path / "run"), reader),
        network=network or donor.config.network,
        shape=ImageShape(resolution=16, channels=1, num_classes=len(classes)),
        classes=classes,
        init_from=str(tmp_path / "donor"),
        lineage={"init_from": donor.digest},
    )
    nets = networks(spec, WORLD)
    return networks(spec, WORLD), nets, finetune.begin(nets, spec)


@each_network
@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_with_the_same_classes_all_is_taken_over(
    tmp_path: Path, reader: ChunkReader, name: str, classes: tuple[str, ...]
) -> None:
    donor = make_donor(str(tmp_path / "donor"), NETWORKS[name], classes)
    _, nets, said = begun(tmp_path, reader, donor, classes)
    assert said == Inherited(snapshot=donor.digest, remade=(), new_classes=())
    for network, given in ((nets.G, donor.G_ema), (nets.G_ema, donor.G_ema), (nets.D, donor.D)):
        assert_bit_equal(network.state_dict(), given.state_dict())
    for trained, optimiser in ((nets.G, nets.G_opt), (nets.D, nets.D_opt)):
        assert not optimiser.state
        assert optimiser.param_groups[0]["params"] == list(trained.parameters())
        assert trained.training
        assert all(parameter.requires_grad for parameter in trained.parameters())


NORM = "D.embed.parametrizations.weight.0.u"
BY_CLASS = {
    "dcgan": {"G.embed.weight", "D.plane.weight"},
    "r3gan": {"G.embed.weight", "D.embed.weight"},
    "sngan": {
        *(f"G.blocks.{b}.norms.{n}.{entry}.weight" for b in (0, 1) for n in (0, 1) for entry in ("gain", "bias")),
        "D.embed.parametrizations.weight.original",
        NORM,
    },
}
OF_FORM = {
    "dcgan": {"G.layers.0.weight", "D.layers.0.weight"},
    "r3gan": {"G.scale.weight", "D.head.weight"},
    "sngan": {f"G.blocks.{b}.norms.{n}.norm.{entry}" for b in (0, 1) for n in (0, 1) for entry in ("weight", "bias")},
}
"""What a network with classes has in another shape than one without, or has not."""


@each_network
@pytest.mark.parametrize("classes", [("square", "circle", "star"), ("star", "heart", "circle"), ("square", "heart")])
def test_a_class_is_known_by_its_name(tmp_path: Path, reader: ChunkReader, name: str, classes: tuple[str, ...]) -> None:
    """In another order, with others, or fewer: the class is drawn as it was, and a new one as in a new run."""
    donor = make_donor(str(tmp_path / "donor"), NETWORKS[name], CLASSES)
    new, nets, said = begun(tmp_path, reader, donor, classes)
    unknown = tuple(one for one in classes if one not in CLASSES)
    assert said.new_classes == unknown
    assert set(said.remade) == (BY_CLASS[name] if unknown else set())
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for label, one in enumerate(classes):
        ours, image = torch.full((4,), label), nets.G_ema(z, torch.full((4,), label))
        if one in CLASSES:
            theirs = torch.full((4,), CLASSES.index(one))
            assert torch.equal(image, donor.G_ema(z, theirs))
            if name != "sngan":  # whose table is divided by a norm that all rows share
                assert torch.equal(nets.D.eval()(image, ours), donor.D(image, theirs))
        else:
            for part, _, entry in (full.partition(".") for full in BY_CLASS[name] - {NORM}):
                row, initial = (getattr(each, part).state_dict()[entry][label] for each in (nets, new))
                assert torch.equal(row, initial)


def test_the_norm_of_a_table_with_other_rows_is_found_anew(tmp_path: Path, reader: ChunkReader) -> None:
    """Divided by a wrong one, new logits would be wrong by any factor."""
    classes = tuple(f"class {number}" for number in range(20))
    donor = make_donor(str(tmp_path / "donor"), NETWORKS["sngan"], classes)
    _, nets, _ = begun(tmp_path, reader, donor, ("new", *reversed(classes[5:])))
    weight = nets.D.get_submodule("embed").eval().weight
    assert isinstance(weight, torch.Tensor)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.02)


@each_network
@pytest.mark.parametrize("had", [True, False])
def test_between_with_and_without_classes(tmp_path: Path, reader: ChunkReader, name: str, had: bool) -> None:
    before, after = (CLASSES, ()) if had else ((), CLASSES)
    donor = make_donor(str(tmp_path / "donor"), NETWORKS[name], before)
    new, nets, said = begun(tmp_path, reader, donor, after)
    expected = OF_FORM[name] if name != "sngan" or had else set()
    if not had:
        expected = expected | BY_CLASS[name]
        expected |= {"D.embed.parametrizations.weight.0.v"} if name == "sngan" else set()
    assert set(said.remade) == expected
    assert said.new_classes == after
    for part, network, given, initial in (("G", nets.G, donor.G_ema, new.G), ("D", nets.D, donor.D, new.D)):
        for entry, tensor in network.state_dict().items():
            origin = initial if f"{part}.{entry}" in said.remade else given
            if not entry.startswith("embed.parametrizations.weight.0"):
                assert torch.equal(tensor, origin.state_dict()[entry]), entry
    assert_bit_equal(nets.G.state_dict(), nets.G_ema.state_dict())
    image = nets.G_ema(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64))
    assert nets.D(image, torch.zeros(2, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("donor", "shape", "why"),
    [
        ({"base_width": 8}, {}, r"network\.base_width is 8 there and 4 here; set --network\.base-width 8"),
        ({"name": "sngan"}, {}, r"network\.name is sngan there and dcgan here; set --network\.name sngan"),
        ({}, {"resolution": 32}, r"resolution is 32 there and 16 here; use images made with --prepare\.resolution 32"),
        ({}, {"channels": 3}, r"channels is 3 there and 1 here; use images made with --prepare\.channels 3"),
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, reader: ChunkReader, donor: dict[str, Any], shape: dict[str, int], why: str
) -> None:
    made = make_donor(str(tmp_path / "donor"), dataclasses.replace(NETWORKS["dcgan"], **donor), CLASSES, **shape)
    with pytest.raises(InputError, match=why):
        begun(tmp_path, reader, made, CLASSES, NETWORKS["dcgan"])


def test_settings_that_weights_do_not_depend_on_may_differ(tmp_path: Path, reader: ChunkReader) -> None:
    donor = make_donor(str(tmp_path / "donor"), NETWORKS["r3gan"], CLASSES)
    other = dataclasses.replace(NETWORKS["r3gan"], resolution=16, labels="required", bf16_stages=1)
    assert begun(tmp_path, reader, donor, CLASSES, other)[2].remade == ()


def cut(url: Path) -> None:
    os.truncate(url / "D.safetensors", 1000)


def train_further(url: Path) -> None:
    source = snapshot.load(str(url))
    snapshot.save(str(url.parent.parent), dataclasses.replace(source.config, cur_nimg=2000), source.G_ema, source.D)


@pytest.mark.parametrize(
    ("change", "why"),
    [(cut, r"D\.safetensors: truncated or altered"), (shutil.rmtree, "no snapshot"), (train_further, "is no longer")],
)
def test_a_snapshot_that_is_not_what_it_was(
    tmp_path: Path, reader: ChunkReader, change: Callable[[Path], None], why: str
) -> None:
    donor = make_donor(str(tmp_path / "donor"), NETWORKS["dcgan"], CLASSES)
    change(Path(snapshot.find(str(tmp_path / "donor"))))
    with pytest.raises(InputError, match=why):
        begun(tmp_path, reader, donor, CLASSES)


def test_a_run_begins_with_the_weights_and_never_reads_them_again(tmp_path: Path, reader: ChunkReader) -> None:
    """Cut in two, with the snapshot gone in between, it ends with the bits and the snapshot of one that was not."""
    donor = str(tmp_path / "donor")
    train(spec_of(donor, reader, total_kimg=0.08), reader)
    source = snapshot.load(snapshot.find(donor))

    def tuned(name: str, **settings: Any) -> RunSpec:
        lineage = {"training_run": "test", "init_from": source.digest}
        return dataclasses.replace(
            spec_of(str(tmp_path / name), reader, seed=7, **settings), init_from=donor, lineage=lineage
        )

    whole, other = tuned("whole"), dataclasses.replace(tuned("other"), init_from="", lineage={})
    for spec in (whole, other, tuned("parts", total_kimg=0.08)):
        train(spec, reader)
    shutil.rmtree(f"{donor}/snapshots")
    train(tuned("parts"), reader)
    events = list(log.read_events(str(tmp_path / "parts")))
    assert [event["event"] for event in events if event["event"] in ("initialised", "resumed")] == [
        "initialised",
        "resumed",
    ]
    said = next(event for event in events if event["event"] == "initialised")
    assert (said["snapshot"], said["remade"], said["cur_nimg"]) == (source.digest, [], 0)
    assert final_state(str(tmp_path / "parts"))[0] == 160
    assert_bit_equal(final_state(str(tmp_path / "parts"))[1], final_state(whole.run_url)[1])
    assert Path(snapshot.find(str(tmp_path / "parts"))).name == Path(snapshot.find(whole.run_url)).name
    ends = [final_state(run)[1]["G_ema"]["layers.0.weight"] for run in (whole.run_url, other.run_url)]
    assert not torch.equal(*ends)
    with pytest.raises(SnapshotError, match="no snapshot here"):
        train(tuned("late"), reader)
