"""Recorded positions of a run that started several times."""

from pathlib import Path

import pyarrow as pa

from pipeline.train import log


def test_the_latest_start_of_each_position_counts(tmp_path: Path) -> None:
    """One that lay within a tick, as after word of preemption, leaves the tick's beginning to the start before it."""
    url = str(tmp_path)

    def tell(started_nimg: int, cur_nimg: int, first: int, sample: int, world: tuple[int, int] = (0, 1)) -> None:
        positions = range(first + world[0], cur_nimg, world[1])
        taken = pa.table({"position": positions, "sample": [sample] * len(positions)})
        log.put_positions(url, started_nimg, cur_nimg, world, taken)

    for rank in range(2):
        tell(0, 80, 0, 0, (rank, 2))
        tell(0, 160, 80, 0, (rank, 2))
        tell(0, 240, 160, 0, (rank, 2))
    tell(120, 160, 120, 1)
    tell(120, 240, 160, 1)
    tell(200, 240, 200, 2, (0, 2))  # its other rank has told nothing
    found = log.read_positions(url).sort_by("position")
    assert found["position"].to_pylist() == list(range(240))
    assert found["sample"].to_pylist() == [0] * 120 + [1] * 120
