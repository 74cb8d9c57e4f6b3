"""A gate fails on the wrong side of its limit, and one without a limit or without a number does not exist."""

import pytest

from pipeline.config import ConfigError
from pipeline.evaluate.gates import Gate, GateConfig, judge


def test_limits() -> None:
    config = GateConfig(max_fid=10.0, min_recall=0.3, min_utility=0.0, min_copies_p_value=0.001)
    judged = judge(config, {"fid": 10.0, "recall": 0.29, "kid": 1.0, "utility": 0.1, "copies_p_value": 0.0009})
    assert judged == (
        Gate(name="fid", value=10.0, limit=10.0, at="most", passed=True),
        Gate(name="recall", value=0.29, limit=0.3, at="least", passed=False),
        Gate(name="copies_p_value", value=0.0009, limit=0.001, at="least", passed=False),
    )


def test_a_limit_that_was_set_and_cannot_be_judged() -> None:
    assert judge(GateConfig(), {}) == ()
    with pytest.raises(ConfigError, match=r"gates\.min_utility is set, and there is no utility here to judge"):
        judge(GateConfig(min_utility=0.9), {})


def test_a_limit_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_fid must be at least 0, not -1"):
        GateConfig(max_fid=-1.0)
