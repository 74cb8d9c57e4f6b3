"""What a snapshot says of the dataset that it was trained on."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import snapshot
from pipeline.config import ConfigError
from pipeline.snapshot import SnapshotError
from tests.generate.test_generate import make_snapshot


def test_it_carries_the_class_counts(tmp_path: Path) -> None:
    plain = snapshot.load(make_snapshot(str(tmp_path)))
    assert plain.config.class_counts == ()
    config = dataclasses.replace(plain.config, class_counts=(6, 3, 0))
    url = snapshot.save(str(tmp_path), config, plain.G_ema, plain.D)
    assert snapshot.load(url).config == config
    assert snapshot.load(url).digest != plain.digest


def test_one_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    config = Path(make_snapshot(str(tmp_path))) / "config.json"
    body = json.loads(config.read_text())
    del body["class_counts"]
    config.write_text(json.dumps(body))
    assert snapshot.load(str(config.parent)).config.class_counts == ()


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, -1], ["many", 1, 2], None, 7])
def test_counts_that_are_no_counts(tmp_path: Path, counts: object) -> None:
    config = Path(make_snapshot(str(tmp_path))) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_counts": counts}))
    with pytest.raises(SnapshotError, match=r"config\.json is not a snapshot's of ganymede"):
        snapshot.load(str(config.parent))


def test_counts_of_other_classes_are_not_written(tmp_path: Path) -> None:
    config = snapshot.load(make_snapshot(str(tmp_path))).config
    with pytest.raises(ConfigError, match="must be 3 numbers, one a class"):
        dataclasses.replace(config, class_counts=(1, 2))
