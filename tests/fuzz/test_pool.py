"""The pool catches what would take the tests themselves down, and names the case."""

from tests.fuzz import bad_cases, pool


def test_every_kind_of_failure_is_caught_and_named() -> None:
    report = pool.run("tests.fuzz.bad_cases", len(bad_cases.CASES), processes=1, seed=7)
    assert report.cases == len(bad_cases.CASES)
    assert report.verdicts() == {"done": 2}
    expected = {
        "crash": "Segmentation fault",
        "exception": "KeyError: 'missing'",
        "warning": "UserWarning: escaped",
        "noise": "wrote to stderr: from C",
        "flood": "memory grew to",
        "exhaust": "MemoryError",
        "hang": "Timeout",
    }
    numbers = {name: number for number, name in enumerate(bad_cases.CASES)}
    assert len(report.failures) == len(expected)
    for failure, (name, said) in zip(report.failures, expected.items(), strict=True):
        assert failure.startswith(f"tests.fuzz.bad_cases seed 7 case {numbers[name]}: ")
        assert said in failure


def test_the_report_counts() -> None:
    report = pool.run("tests.fuzz.bad_cases", 1, processes=1, seed=7)
    assert report.failures == []
    assert "tests.fuzz.bad_cases: 1 cases, GANYMEDE_FUZZ_SEED=7" in report.table()
    assert report.peak_bytes > 0
