"""Tasks find what one process finds, and what is said of copies is so."""

import numpy as np
import pytest

from pipeline.evaluate import ray_compare
from pipeline.evaluate.memorisation import findable_share, shrunk, to_training, within
from pipeline.evaluate.metrics import Described, compare, of_classes
from pipeline.evaluate.ray_compare import Subject, compared
from pipeline.evaluate.ray_spread import spread
from tests.evaluate.pictures import pictures

COUNT = 300

pytestmark = pytest.mark.usefixtures("ray_session")


def described(seed: int) -> Described:
    chance = np.random.default_rng(seed)
    features, labels = chance.normal(size=(COUNT, 8)).astype(np.float32), chance.integers(3, size=COUNT)
    return Described(features=features, logits=features[:, :3].copy(), labels=labels)


@pytest.fixture
def subject() -> Subject:
    """With copies among the generated images: an exact one, a mirrored one, and three that are one."""
    gen, held_out, training = (pictures(count, seed) for count, seed in ((COUNT, 2), (COUNT, 1), (1000, 0)))
    gen[10], gen[11] = training[7], training[8, :, ::-1]
    gen[20] = gen[30] = gen[40]
    rows = np.arange(0, COUNT, 2)
    return Subject(
        reference=described(0),
        others={"synthetic": described(1), "real": described(2)},
        num_classes=3,
        gen=gen,
        held_out=held_out,
        training=training,
        training_images=4000,
        alike=(rows, rows),
    )


def test_tasks_find_what_one_process_finds(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_compare, "_ROWS", 128)
    heard: list[tuple[int, int]] = []
    found = compared(subject, lambda *done: heard.append(done))
    assert heard == [(1, 16)] * 16  # 3 parts of either side and 1 within it, 2 sets, 3 classes twice
    for name, other in subject.others.items():
        for metric, one in compare(subject.reference, other).items():
            assert found.others[name][metric].value == pytest.approx(one.value, rel=1e-5, abs=1e-7)
            assert found.others[name][metric].error == pytest.approx(one.error, rel=1e-3, abs=1e-7)
    classes = of_classes([subject.reference, *subject.others.values()], 3)
    assert list(found.classes) == list(classes) == [0, 1, 2]
    reference, gen, real = classes[1]
    assert found.classes[1].num_samples == len(reference.labels) == len(real.labels)
    assert found.classes[1].metrics["fid"].value == pytest.approx(compare(reference, gen)["fid"].value, rel=1e-5)
    assert found.classes[1].real_fid.value == pytest.approx(compare(reference, real)["fid"].value, rel=1e-5)
    near, inside = to_training(shrunk(subject.gen), shrunk(subject.training)), within(shrunk(subject.gen))
    for ours, theirs in ((found.copies.to_training, near), (found.copies.inside, inside)):
        assert np.array_equal(ours.place, theirs.place)
        np.testing.assert_allclose(ours.distance, theirs.distance, atol=1e-4)


def test_what_is_said_of_copies(subject: Subject) -> None:
    copies = compared(subject).copies
    assert copies.to_training.place[[10, 11]].tolist() == [7, 8]
    report = copies.report()
    assert report["exact_in_training"] == 1
    assert report["exact_inside"] == 2
    assert report["repeated"] >= 3
    assert report["repeated_in_reference"] <= 2
    assert report["num_tested"] == COUNT // 2
    assert report["training_samples"] == 1000
    assert report["findable_share"] == pytest.approx(4 * findable_share(COUNT // 2, 1e-3))  # a quarter is looked in
    assert report["near"] == 1 + (copies.to_training.distance[12::2] < copies.test.limit).sum()


def test_arguments_may_be_shared_and_results_come_in_order() -> None:
    heard: list[str] = []
    assert list(spread({"b": (max, 1, 2), "a": (min, 1, 2)}, heard.append).items()) == [("b", 2), ("a", 1)]
    assert sorted(heard) == ["a", "b"]
