"""What a group of workers hears, as it starts, of the one before."""

import pytest

from pipeline.train.checkpoint import Checkpoint
from pipeline.train.ray_board import Board


def checkpoint_at(number: int, cur_nimg: int) -> Checkpoint:
    return Checkpoint(number=number, cur_nimg=cur_nimg, attempt=1, objects={})


def test_the_first_group_of_a_run_was_not_restarted() -> None:
    assert Board(cur_nimg=0).begin(None) == (0, 0, "")


@pytest.mark.parametrize(("reached", "reason"), [(500, "the driver before ended"), (400, "")])
def test_the_next_driver_hears_what_the_last_one_lost(reached: int, reason: str) -> None:
    assert Board(cur_nimg=reached).begin(checkpoint_at(4, 400)) == (reached - 400, 0, reason)


def test_each_restart_has_its_own_reason() -> None:
    board, start = Board(cur_nimg=0), checkpoint_at(1, 100)
    board.begin(None)
    board.tell(120, {})
    board.failed("worker 1: killed")
    assert board.begin(start) == (20, 1, "worker 1: killed")
    assert board.begin(start) == (0, 1, "the cluster changed")  # right after a checkpoint: nothing is lost
    board.tell(130, {})
    assert board.begin(start) == (30, 1, "the cluster changed")


def test_failures_are_forgiven_by_a_checkpoint() -> None:
    board = Board(cur_nimg=0)
    board.begin(None)
    for _ in range(3):
        board.failed("worker 0: killed")
    assert board.begin(None)[1] == 3
    board.failed("worker 0: killed")
    assert board.begin(checkpoint_at(1, 100))[1] == 1
