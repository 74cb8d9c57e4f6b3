"""Labels of foreign samples: where they are read, what is refused, how they are numbered."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import label, tar
from pipeline.dataset.label import LabelError


def _sample(key: str, **members: bytes) -> tuple[tar.Sample, Callable[[tar.Member], bytes]]:
    """A sample of a real tar, and how its members are read."""
    data = tar.build([(key, {"png": b"x", **members})])
    (sample,) = tar.group(tar.scan(data, "a.tar"), "a.tar")
    return sample, lambda member: data[member.offset : member.offset + member.size_bytes]


@pytest.mark.parametrize(
    ("members", "field", "wanted"),
    [
        ({"cls": b"7"}, "cls", 7),
        ({"cls": b" 7\n"}, "cls", 7),
        ({"cls": b"tabby cat\n"}, "cls", "tabby cat"),
        ({"cls": b"-1"}, "cls", "-1"),
        ({}, "cls", None),
        ({"json": b'{"kind": "dog", "id": 3}'}, "json:kind", "dog"),
        ({"json": b'{"kind": "dog", "id": 3}'}, "json:id", 3),
        ({"json": b'{"id": "03"}'}, "json:id", 3),
        ({"json": b'{"kind": null}'}, "json:kind", None),
        ({"json": b"{}"}, "json:kind", None),
        ({"cls": b"7"}, "json:kind", None),
        ({"cls": b"7"}, "folder", "tabby"),
        ({"cls": b"7"}, "column:label", None),
    ],
)
def test_where_a_label_is_read(members: dict[str, bytes], field: str, wanted: int | str | None) -> None:
    sample, read = _sample("cats/tabby/1", **members)
    assert label.sample_label(sample, read, field, "a.tar") == wanted


def test_a_sample_without_folder_has_none() -> None:
    sample, read = _sample("1")
    assert label.sample_label(sample, read, "folder", "a.tar") is None


@pytest.mark.parametrize(
    ("members", "field", "message"),
    [
        ({"cls": b"\xff"}, "cls", "the .cls of s1 cannot be read"),
        ({"json": b"{"}, "json:kind", "the .json of s1 cannot be read"),
        ({"json": b"[1]"}, "json:kind", "the .json of s1 cannot be read"),
        ({"json": b'{"kind":' + b"[" * 50_000}, "json:kind", "the .json of s1 cannot be read"),
        ({"json": b'{"kind": 1.5}'}, "json:kind", "the label of s1 is 1.5, neither"),
        ({"json": b'{"kind": true}'}, "json:kind", "is True, neither a number nor a name"),
        ({"json": b'{"kind": [1]}'}, "json:kind", "neither a number nor a name"),
        ({"json": rb'{"kind": "\ud800"}'}, "json:kind", "neither a number nor a name"),
    ],
)
def test_what_is_no_label(members: dict[str, bytes], field: str, message: str) -> None:
    sample, read = _sample("s1", **members)
    with pytest.raises(LabelError, match=message) as caught:
        label.sample_label(sample, read, field, "a.tar")
    assert str(caught.value).startswith("a.tar: ")
    assert "\n" not in str(caught.value)


def test_only_the_member_that_is_asked_for_is_read() -> None:
    sample, read = _sample("s1", cls=b"4", json=b"{}")
    asked: list[str] = []
    label.sample_label(sample, lambda m: asked.append(m.name) or read(m), "cls", "a.tar")
    label.sample_label(sample, lambda m: asked.append(m.name) or read(m), "folder", "a.tar")
    assert asked == ["s1.cls"]


@given(st.text(), st.integers())
def test_json_values_come_back(name: str, number: int) -> None:
    for value in (name, number):
        sample, read = _sample("s1", json=json.dumps({"k": value}).encode())
        found = label.sample_label(sample, read, "json:k", "a.tar")
        assert found == value or (isinstance(found, int) and found == int(name))


@given(st.lists(st.integers(0, 500) | st.none()))
def test_numbers_stay_themselves(labels: list[int | None]) -> None:
    number, classes = label.number_classes(labels, (), "source x")
    present = [one for one in labels if one is not None]
    assert [number(one) for one in present] == present
    assert classes == tuple(map(str, range(max(present, default=-1) + 1)))


@given(st.lists(st.text(st.characters(categories=["L"]), min_size=1) | st.none()), st.randoms())
def test_names_are_numbered_once_each(labels: list[str | None], random: object) -> None:
    distinct = sorted({one for one in labels if one is not None})
    number, classes = label.number_classes(labels, (), "source x")
    assert classes == tuple(distinct)
    assert [number(name) for name in classes] == list(range(len(classes)))
    order = list(distinct)
    random.shuffle(order)  # type: ignore[attr-defined]
    number, classes = label.number_classes(labels, order, "source x")
    assert classes == tuple(order)
    assert [number(name) for name in order] == list(range(len(order)))
    assert label.number_classes(distinct, (), "source x")[1] == tuple(distinct)


def test_numbers_beside_names_are_names() -> None:
    number, classes = label.number_classes(["b", 10, "a", 9], (), "source x")
    assert classes == ("9", "10", "a", "b")
    assert number(10) == 1


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], ("only",), "source x has labels 0 … 1, and 1 class names are allowed for; see --class-names"),
        ([-1, 1], (), "source x has labels -1 … 1"),
        ([100_000], (), "100000 class names"),
        (["a", "b"], ("a", "c"), "source x has classes a, b; --class-names must hold the same names"),
        (["a"], ("a", "b"), "source x has classes a"),
    ],
)
def test_classes_that_do_not_fit_their_names(labels: list[int | str], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        label.number_classes(labels, names, "source x")
