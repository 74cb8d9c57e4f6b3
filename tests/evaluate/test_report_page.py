"""The page says the verdict first, shows every number of the report, and takes no name for markup."""

import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.evaluate.report import charts
from pipeline.evaluate.report.gallery import Gallery, Picture
from pipeline.evaluate.report.page import render
from pipeline.evaluate.report.wording import apart, number, shown, with_margin
from tests.evaluate.reports import (
    CLASSES,
    HOSTILE,
    failed_report,
    galleries,
    hostile_report,
    least_report,
    whole_report,
)

_VOID = {"meta", "img", "link", "br", "hr", "input"}


class _Page(HTMLParser):
    """What the tests look for in a page; closing tags are checked on the way."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open += [] if tag in _VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._open[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def numbers_of(found: Any) -> Iterator[tuple[str, float]]:
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, dict | list):
            yield from numbers_of(value)
        elif isinstance(value, int | float):
            yield key, value


def test_the_same_report_gives_the_same_page() -> None:
    assert render(whole_report(), galleries()) == render(whole_report(), galleries())
    assert render(json.loads(json.dumps(whole_report())), galleries()) == render(whole_report(), galleries())


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = _Page(render(whole_report(), galleries()))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,"[: 5 if tag != "img" else None])
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in render(whole_report(), galleries())
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_verdict_comes_first_then_pictures_then_numbers_then_lineage() -> None:
    html = render(whole_report(), galleries())
    order = ["<h1", "Limits that were set", 'id="pictures"', 'id="metrics"', 'id="classes"', 'id="usefulness"']
    places = [html.index(one) for one in [*order, 'id="copies"', 'id="origin"', "Do it again"]]
    assert places == sorted(places)
    titles = [html.index(gallery.title, places[2]) for gallery in galleries()]
    assert titles == sorted(titles)
    assert titles[-1] < places[3]


def test_a_page_of_a_passed_report_says_why() -> None:
    page = _Page(render(whole_report(), []))
    assert page.words.startswith("Passed: trust report of s3://bucket/synthetic-1")
    assert (
        "All 3 limits set for the synthetic images are kept: they teach a classifier 96.5 % of what real images teach "
        "it (at least 50 %); no more of them lie near to training images than held-out ones do (p-value 0.971, "
        "at least 0.001); FID is 8.14 (at most 10)." in page.words
    )
    assert "Usefulness to a classifier 0.965 at least 0.5 ✓ Passed" in page.words
    assert "FID 8.14 at most 10 ✓ Passed" in page.words
    assert "Failed" not in page.words


def test_a_page_of_a_failed_report_says_which_limits_and_by_how_little() -> None:
    page = _Page(render(failed_report(), []))
    assert page.words.startswith("Failed: trust report of")
    assert (
        "2 of 3 limits set for the synthetic images are not kept: they teach a classifier only 49.996 % of what real "
        "images teach it (at least 50 %); FID is 12.3 (at most 10)." in page.words
    )
    assert page.words.count("✗ Failed") == 3
    assert page.words.count("✓ Passed") == 1


def test_without_limits_nothing_has_passed() -> None:
    page = _Page(render(least_report(), []))
    assert "Not judged" in page.words
    assert "Passed" not in page.words


@pytest.mark.parametrize("report", [whole_report(), least_report(), failed_report(), hostile_report()])
def test_every_number_that_was_found_is_on_the_page_in_full(report: dict[str, Any]) -> None:
    page = _Page(render(report, galleries()))
    exact = {one["value"] for one in page.all("data")}
    for key, value in numbers_of(report["found"]):
        if key in ("num_samples", "width"):
            assert f"{value:,}" in page.words
        else:
            assert repr(2 * value if key == "error" else value) in exact or key == "spread"
    for arm in report["found"].get("utility", {"arms": {}})["arms"].values():
        assert repr(2 * arm["spread"]) in exact
    for gate in report["gates"]:
        assert {repr(gate["value"]), repr(gate["limit"])} <= exact


def test_every_word_of_lineage_settings_notices_and_command_is_on_the_page() -> None:
    report = whole_report()
    page = _Page(render(report, []))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for name, one in value.items():
                assert name in page.words
                check(one)
        elif not isinstance(value, list):
            assert str(value) in page.words

    check(report["lineage"])
    check(report["inputs"])
    assert ", ".join(["1000"] * 10) in page.words
    assert report["found"]["notices"][0] in page.words
    assert report["command"] in page.text


def test_names_that_are_markup_are_text() -> None:
    html = render(hostile_report(), [])
    page = _Page(html)
    assert not page.all("script")
    assert page.text.count(HOSTILE) >= 6
    picture = galleries()[0].pictures[0]
    hostile = Picture(caption=HOSTILE, alt=f'" onload="{HOSTILE}', png=picture.png)
    page = _Page(render(whole_report(), [Gallery(title=HOSTILE, text=HOSTILE, pictures=(hostile,))]))
    assert not page.all("script")
    assert [sorted(one) for one in page.all("img")] == [["alt", "class", "height", "src", "width"]]


def test_parts_that_were_not_looked_at_are_absent() -> None:
    page = _Page(render(least_report(), []))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {"metrics", "copies", "origin"} <= ids
    assert not {"pictures", "classes", "usefulness"} & ids
    linked = {str(one["href"])[1:] for one in page.all("a")}
    assert linked <= ids
    assert not {"Keep in mind", "Usefulness", "one class missing"} & set(
        re.findall(r"Keep in mind|Usefulness", page.words)
    )


def test_a_metric_and_an_anchor_that_the_page_does_not_know_are_shown_by_name() -> None:
    report = whole_report()
    report["found"]["metrics"]["vendi"] = {"value": 3.21, "error": 0.1}
    report["found"]["anchors"]["upside down"] = {"vendi": {"value": 1.23, "error": 0.1}}
    words = _Page(render(report, [])).words
    assert "vendi of each set" in words
    assert "Real, upside down" in words


def test_small_pictures_are_enlarged_by_whole_numbers_and_all_say_their_size() -> None:
    images = _Page(render(whole_report(), galleries())).all("img")
    sizes = [(one["width"], one["height"], one.get("class")) for one in images]
    assert sizes == [("596", "116", "enlarged"), *[("448", "224", "enlarged")] * 3, ("1600", "40", None)]
    assert [one["alt"] for one in images][1] == "Grain, 9.1 levels apart"


def test_tables_and_plots_are_named() -> None:
    page = _Page(render(whole_report(), []))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(one.get("scope") in ("row", "col") for one in page.all("th"))
    assert all(one["role"] == "img" and one["aria-label"] for one in page.all("svg"))
    regions = [one for one in page.all("div") if one.get("role") == "region"]
    assert [one["tabindex"] for one in regions] == ["0", "0"]
    assert all(one["aria-label"] for one in regions)
    assert "from 7.75 to 8.52" in [one["aria-label"] for one in page.all("svg")]


def test_worst_classes_come_first() -> None:
    html = render(whole_report(), [])
    by_metric, by_use = html[html.index('id="classes"') :], html[html.index(">By class<") :]
    names = re.findall(r'class="label">(.*?)<', by_metric)[: len(CLASSES)]
    assert names == list(reversed(CLASSES))
    names = re.findall(r'class="label">(.*?)<', by_use)[: len(CLASSES)]
    assert names[0] == "Shirt"
    assert names[-1] == "Dress"  # too little is known of it


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (10_000, "10,000"),
        (-3, "−3"),
        (0.97, "0.97"),
        (0.99996, "1"),
        (12.345, "12.3"),
        (-0.00012, "−0.00012"),
        (1234.5, "1,234"),
        (1.5e-12, "1.5 × 10⁻¹²"),
    ],
)
def test_numbers_as_they_are_written(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (8.137, 0.2, "8.1 ± 0.4"),
        (8.137, 0.06, "8.14 ± 0.12"),
        (-0.00012, 0.00004, "−0.00012 ± 0.00008"),
        (241.3, 17.0, "241 ± 34"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_numbers_are_rounded_to_what_the_error_leaves(value: float, error: float, text: str) -> None:
    one = with_margin(value, error)
    assert f"{one.text}{' ± ' if one.margin else ''}{one.margin}" == text
    assert one.exact == repr(value)


def test_a_number_never_looks_like_the_limit_that_it_misses() -> None:
    assert apart(0.49996, 0.5) == ("0.49996", "0.5")
    assert apart(10.0, 10.0) == ("10", "10")
    assert apart(0.1 + 0.2, 0.3) == ("0.30000000000000004", "0.3")
    assert shown(None).text == "–"


def test_an_axis_has_all_its_numbers_in_their_order() -> None:
    values = [-0.00034, -0.0001, 0.0, 0.0003, 0.0061, 0.07, 0.31, 0.32]
    for axis in (charts.bent([(value - 1e-5, value + 1e-5) for value in values]), charts.even(values)):
        places = [axis.at(value) for value in values]
        assert places == sorted(places)
        assert 0 <= places[0] < places[-1] <= 100
        assert 0.0 in axis.places
        labelled = [tick for tick in axis.ticks if tick.label]
        assert len(labelled) >= 2
        for one, following in itertools.pairwise(labelled):
            assert following.at - one.at >= 3 * (len(one.label) + len(following.label))


def test_an_axis_is_bent_only_where_sizes_differ_by_far() -> None:
    assert charts.bent([(0.4, 0.6), (7.0, 8.0), (240.0, 250.0)]).bend == pytest.approx(0.5)
    assert charts.bent([(5.0, 5.1), (7.0, 8.0)]).bend == 0
    assert charts.bent([(0.0, 0.0)]).bend == 0
    axis = charts.bent([(0.4, 0.6), (7.0, 8.0), (240.0, 250.0)])
    assert axis.places == (0.0, 1.0, 10.0, 100.0)
    assert axis.at(0.5) > 10  # it can be told from 0


def test_even_axes_have_round_ends() -> None:
    assert charts.even((), base=0.0, top=1.0).places == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert charts.even([86.1, 90.4]).places == (86.0, 88.0, 90.0, 92.0)
    assert charts.even([3.0]).low <= 3.0 < charts.even([3.0]).high
    assert charts.even([0, 4], base=0.0, top=1.0).places == (0.0, 1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize("value", [0.0, 0.9, -3.0, 1e12, 5e-324])
def test_numbers_that_are_alike_have_an_axis_too(value: float) -> None:
    for axis in (charts.even([value, value]), charts.even([value, value * (1 + 1e-15)]), charts.bent([(value, value)])):
        assert axis.low <= value <= axis.high
        assert 2 <= len(axis.places) < 12
