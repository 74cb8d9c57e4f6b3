import dataclasses
import json
import pickle
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config as config_module
from pipeline.config import (
    ConfigError,
    MissingFieldsError,
    digest,
    field_docs,
    from_dict,
    from_yaml,
    leaves,
    nest,
    override,
    parse_value,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    lr: float = 2e-4
    """Step size,
    per update."""
    betas: tuple[float, ...] = (0.0, 0.99)
    warmup_kimg: int | None = None
    """Thousand images; none for no warm-up."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ConfigError("lr must not be negative")


@dataclass(frozen=True, kw_only=True)
class Train:
    total_kimg: int = 100
    mode: Literal["fast", "exact"] = "fast"
    mirror: bool = False
    size: tuple[int, int] = (32, 32)
    G_opt: Optimiser = Optimiser(lr=1e-3)
    D_opt: Optimiser


@dataclass(frozen=True, kw_only=True)
class Job:
    out: str
    """Where to write: a URL."""
    note: str | None = None
    train: Train


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
OPTIMISERS = st.builds(
    Optimiser,
    lr=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    betas=st.lists(FLOATS, max_size=3).map(tuple),
    warmup_kimg=st.none() | st.integers(),
)
TRAINS = st.builds(
    Train,
    total_kimg=st.integers(),
    mode=st.sampled_from(["fast", "exact"]),
    mirror=st.booleans(),
    size=st.tuples(st.integers(), st.integers()),
    G_opt=OPTIMISERS,
    D_opt=OPTIMISERS,
)
# Texts that YAML would take for something else are what a round trip gets wrong.
HARD_TEXTS = [
    "2e-4",
    "1e5",
    "null",
    "true",
    "no",
    "1:30",
    "010",
    "~",
    "",
    " x ",
    "- a",
    "{a",
    "#",
    "\x85",
    "a\u2028b",
    "\ufeff",
]
TEXTS = st.text() | st.sampled_from(HARD_TEXTS)
JOBS = st.builds(Job, out=TEXTS, note=st.none() | TEXTS, train=TRAINS)
DEFAULT = Job(out="x", train=Train(D_opt=Optimiser()))


@given(JOBS)
def test_dict_and_yaml_bring_an_equal_config_back(job: Job) -> None:
    through_dict = from_dict(Job, json.loads(json.dumps(to_dict(job))))
    assert through_dict == job
    assert from_yaml(Job, to_yaml(through_dict)) == job


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_texts_that_yaml_would_take_for_something_else(text: str) -> None:
    job = dataclasses.replace(DEFAULT, out=text, note=text)
    assert from_yaml(Job, to_yaml(job)) == job


def reversed_keys(value: Any) -> Any:
    return {k: reversed_keys(value[k]) for k in reversed(value)} if isinstance(value, dict) else value


@given(JOBS)
def test_digest_does_not_depend_on_key_order(job: Job) -> None:
    assert digest(reversed_keys(to_dict(job))) == digest(job)
    assert digest(from_dict(Job, reversed_keys(to_dict(job)))) == digest(job)


def test_digest_is_pinned() -> None:
    # It goes into plans and checkpoints: another value would refuse every run that exists.
    assert digest({"b": [1, 2.5], "a": None}) == "e57f5d37865437a82e1108bafb4e5213dfe7e9085f5c253341ebbab30cac5faf"
    assert config_module.canonical_json({"b": [1, 2e-4], "a": "é"}) == b'{"a":"\\u00e9","b":[1,0.0002]}'


def test_digest_tells_configs_apart_but_not_an_int_given_for_a_float() -> None:
    assert digest(Optimiser(lr=1)) == digest(Optimiser(lr=1.0))
    assert digest(Optimiser(lr=1.0)) != digest(Optimiser(lr=2.0))


def replaced(config: Any, dotted: str, value: Any) -> Any:
    name, _, rest = dotted.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


def value_at(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


LEAF_NAMES = [leaf.name for leaf in leaves(Job)]


@given(JOBS, JOBS, st.sampled_from(LEAF_NAMES))
def test_override_is_replace(job: Job, other: Job, name: str) -> None:
    value = value_at(other, name)
    # A text is parsed by the field's type, and "none" for an optional text means none.
    if name == "note" and isinstance(value, str) and value.strip().lower() in ("none", "null"):
        value = None
    assert override(job, {name: value}) == replaced(job, name, value)


def test_override_parses_texts_and_later_ones_win() -> None:
    job = override(
        DEFAULT,
        {"train.G_opt.lr": "3e-4", "train.mirror": "1", "train.size": "8, 16", "train.G_opt.betas": "", "note": "none"},
    )
    assert (job.train.G_opt.lr, job.train.mirror, job.train.size) == (3e-4, True, (8, 16))
    assert (job.train.G_opt.betas, job.note) == ((), None)
    section = Optimiser(lr=7.0, warmup_kimg=3)
    job = override(DEFAULT, {"train.D_opt": section, "train.D_opt.lr": 8.0})
    assert job.train.D_opt == Optimiser(lr=8.0, warmup_kimg=3)


def test_a_section_given_in_part_keeps_its_parents_default() -> None:
    train = from_dict(Train, {"G_opt": {"warmup_kimg": 5}})
    assert train.G_opt == Optimiser(lr=1e-3, warmup_kimg=5)
    assert train.D_opt == Optimiser()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"outt": "x"}, "unknown key 'outt' (did you mean 'out'?)"),
        ({"out": "x", "train": {"totl_kimg": 1}}, "train: unknown key 'totl_kimg' (did you mean 'total_kimg'?)"),
        ({"out": 3}, "out: wants a text (str), got 3"),
        ({"out": "x", "train": {"total_kimg": True}}, "train.total_kimg: wants a whole number (int), got True"),
        ({"out": "x", "train": {"total_kimg": 1.0}}, "train.total_kimg: wants a whole number (int), got 1.0"),
        ({"out": "x", "train": {"mirror": 1}}, "train.mirror: wants true or false (bool), got 1"),
        (
            {"out": "x", "train": {"mode": "fas"}},
            "train.mode: wants one of fast, exact; got 'fas' (did you mean 'fast'?)",
        ),
        ({"out": "x", "train": {"size": [1]}}, "train.size: wants 2 values, got 1"),
        ({"out": "x", "train": {"size": 1}}, "train.size: wants a list of (a whole number, a whole number), got 1"),
        (
            {"out": "x", "train": {"G_opt": {"betas": [0, "a"]}}},
            "train.G_opt.betas[1]: wants a number (float), got 'a'",
        ),
        ({"out": "x", "train": {"G_opt": {"lr": float("nan")}}}, "train.G_opt.lr: wants a finite number, got nan"),
        ({"out": "x", "train": {"G_opt": {"lr": -1}}}, "train.G_opt: lr must not be negative"),
        ({"out": "x", "train": 3}, "train: wants a mapping of fields, got 3"),
        ({}, "these fields have no default and must be given: out"),
    ],
)
def test_bad_mappings_say_what_and_where(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Job, mapping)
    assert str(caught.value) == message


def test_bad_overrides_say_what_and_where() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'train.totl_kimg' \(did you mean 'train.total_kimg'\?\)"):
        override(DEFAULT, {"train.totl_kimg": 1})
    with pytest.raises(ConfigError, match=r"unknown key 'out.x'"):
        override(DEFAULT, {"out.x": 1})
    with pytest.raises(ConfigError, match=r"train.D_opt: lr must not be negative"):
        override(DEFAULT, {"train.D_opt.lr": "-1"})


@pytest.mark.parametrize(
    ("tp", "text", "value"),
    [
        (bool, "TRUE", True),
        (bool, "0", False),
        (int, "10_000", 10_000),
        (float, "2e-4", 2e-4),
        (float, "3", 3.0),
        (int | None, "None", None),
        (int | None, "4", 4),
        (str, "none", "none"),
        (tuple[int, ...], "", ()),
        (tuple[str, ...], "a, b", ("a", "b")),
        (tuple[int, int] | None, "none", None),
        (Literal["a", 1], "1", 1),
    ],
)
def test_parse_value(tp: Any, text: str, value: Any) -> None:
    parsed = parse_value(tp, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("tp", "text"),
    [
        (bool, "yes"),
        (int, "2e3"),
        (int, ""),
        (float, "inf"),
        (float, "x"),
        (tuple[int, ...], "1,,2"),
        (Literal["a"], "b"),
    ],
)
def test_parse_value_refuses(tp: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--flag: wants "):
        parse_value(tp, text, "--flag")


@pytest.mark.parametrize("text", ["2e-4", "2E-04", "+0.2e-3", ".2e-3"])
def test_scientific_floats_in_yaml(text: str) -> None:
    assert from_yaml(Optimiser, f"lr: {text}").lr == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f.yaml: is not YAML: "),
        ("lr: 1\nlr: 2", "f.yaml: is not YAML: key 'lr' is given twice"),
        ("- lr", "f.yaml: wants a mapping of fields"),
        ("0", "f.yaml: wants a mapping of fields"),
        ("lr: !!python/object/apply:os.system ['true']", "f.yaml: is not YAML: could not determine a constructor"),
        ("lrr: 1", "f.yaml: unknown key 'lrr'"),
    ],
)
def test_bad_yaml_says_what_and_where(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(Optimiser, text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_empty_yaml_is_all_defaults() -> None:
    assert from_yaml(Optimiser, "# nothing\n") == Optimiser()


def test_yaml_keeps_the_order_of_the_fields_and_lists_on_one_line() -> None:
    assert to_yaml(Optimiser()) == "lr: 0.0002\nbetas: [0.0, 0.99]\nwarmup_kimg: null\n"


def test_docs_and_leaves() -> None:
    assert field_docs(Optimiser) == {
        "lr": "Step size, per update.",
        "warmup_kimg": "Thousand images; none for no warm-up.",
    }
    by_name = {leaf.name: leaf for leaf in leaves(Job)}
    assert list(by_name)[:3] == ["out", "note", "train.total_kimg"]
    assert by_name["out"].default is MISSING
    assert by_name["out"].doc == "Where to write: a URL."
    assert by_name["train.G_opt.lr"].default == 1e-3, "the parent's default, not the section's own"
    assert by_name["train.D_opt.lr"].default == 2e-4
    assert by_name["train.size"].type == tuple[int, int]


def test_inherited_fields_have_docs() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fancy(Optimiser):
        extra: int = 1
        """More."""

    assert list(field_docs(Fancy)) == ["lr", "warmup_kimg", "extra"]


def test_errors_survive_pickling() -> None:
    # Ray sends what a task raises through pickle.
    error = pickle.loads(pickle.dumps(MissingFieldsError(["a", "b.c"])))
    assert error.names == ["a", "b.c"]
    assert str(error) == "these fields have no default and must be given: a, b.c"


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["train.total_kimg", "train.G_opt.lr", "note"]), st.integers(0, 9).map(str)))
def test_nest_and_from_dict_is_override(overrides: dict[str, str]) -> None:
    nested = config_module.merge(to_dict(DEFAULT), nest(Job, overrides))
    assert from_dict(Job, nested) == override(DEFAULT, overrides)
