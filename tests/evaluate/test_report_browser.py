"""The page in a real browser: it loads nothing, fits a phone, can be read in light and dark, and used by keyboard."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipeline.evaluate.report.page import render
from tests.evaluate.reports import failed_report, galleries, hostile_report, least_report, whole_report

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SIZES = ((390, 844), (1280, 800))
_PAGES = {
    "whole": lambda: render(whole_report(), galleries()),
    "least": lambda: render(least_report(), []),
    "failed": lambda: render(failed_report(), galleries()),
    "hostile": lambda: render(hostile_report(), galleries()),
}
_CONTRASTS = """() => {
  const parts = color => color.match(/[0-9.]+/g).map(Number);
  const light = color => parts(color).slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const under = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((parts(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const said = [...document.body.querySelectorAll("*")]
    .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  return said.map(one => {
    const style = getComputedStyle(one);
    const pair = [light(one.closest("svg") ? style.fill : style.color), light(under(one))].sort((a, b) => a - b);
    return [(pair[1] + 0.05) / (pair[0] + 0.05), one.tagName + ": " + one.textContent.trim().slice(0, 40)];
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"no browser: install one of {', '.join(names)} (Debian: apt-get install chromium)", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


class _Opened:
    """A page, and what it asked for and complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))


def opened(browser: Browser, folder: Path, name: str, size: tuple[int, int], scheme: Any = "light") -> _Opened:
    """One of the pages, from a file."""
    path = folder / "report.html"
    path.write_text(_PAGES[name](), encoding="utf-8")
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    one = _Opened(page)
    page.goto(path.as_uri(), wait_until="load")
    return one


@pytest.mark.parametrize("name", _PAGES)
def test_a_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, tmp_path: Path, name: str) -> None:
    one = opened(browser, tmp_path, name, _SIZES[0])
    one.page.wait_for_load_state("networkidle")
    assert [url for url in one.asked if not url.startswith("data:image/png;")] == [one.page.url]
    assert one.page.url.startswith("file://")
    assert one.complaints == []
    one.page.close()


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("name", _PAGES)
def test_nothing_is_wider_than_the_screen(browser: Browser, tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    page = opened(browser, tmp_path, name, size).page
    assert page.evaluate("document.scrollingElement.scrollWidth") <= size[0]
    page.evaluate("scrollTo(10000, 0)")
    assert page.evaluate("scrollX") == 0
    wider = """() => [...document.querySelectorAll("main *")].filter(one => !one.closest(".scroll"))
      .filter(one => one.getBoundingClientRect().right > innerWidth).map(one => one.outerHTML)"""
    assert page.evaluate(wider) == []  # nor cut off
    page.close()


@pytest.mark.parametrize("name", _PAGES)
def test_text_stands_out_in_light_and_dark(browser: Browser, tmp_path: Path, name: str) -> None:
    behind = {}
    for scheme in ("light", "dark"):
        page = opened(browser, tmp_path, name, _SIZES[0], scheme).page
        behind[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        contrasts = page.evaluate(_CONTRASTS)
        assert len(contrasts) > 50
        assert [text for ratio, text in contrasts if ratio < 4.5] == []
        page.close()
    assert behind["light"] != behind["dark"]


def test_every_picture_is_there_and_described(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, "whole", _SIZES[0]).page
    images = page.evaluate("[...document.images].map(one => [one.complete && one.naturalWidth, one.alt])")
    assert [width for width, _ in images] == [298, 56, 56, 56, 1600]
    assert all(alt for _, alt in images)
    page.close()


@pytest.mark.parametrize("name", _PAGES)
def test_headings_are_in_order(browser: Browser, tmp_path: Path, name: str) -> None:
    page = opened(browser, tmp_path, name, _SIZES[0]).page
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(one => Number(one.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(after - before for before, after in itertools.pairwise(levels)) <= 1
    for landmark in ("header", "main", "nav", "footer"):
        assert page.locator(landmark).count() == 1
    assert page.title()
    assert page.locator("html").get_attribute("lang")
    page.close()


def test_the_keyboard_reaches_the_skip_link_first_and_then_all_that_scrolls(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, "whole", _SIZES[0]).page
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("""() => {
              const one = document.activeElement, box = one.getBoundingClientRect();
              const seen = box.right > 0 && box.bottom > 0 && box.left < innerWidth && box.top < innerHeight;
              return [one.getAttribute("aria-label") ?? one.textContent, seen && getComputedStyle(one).outlineStyle];
            }""")
        )
        if reached[-1][0] == reached[0][0] and len(reached) > 1:
            break
    assert reached[0][0] == "Skip to the verdict"
    stops = [name for name, outline in reached if outline == "solid"]
    regions = page.locator("[role=region]")
    assert regions.count() == 2
    for region in regions.all():
        assert region.get_attribute("aria-label") in stops
        assert region.evaluate("one => one.scrollWidth > one.clientWidth")  # else there would be no need to reach it
    page.keyboard.press("Escape")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "verdict"
    page.close()


def test_a_scrolled_table_keeps_its_names_in_sight(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, "hostile", _SIZES[0]).page
    region = page.locator("[role=region]").first
    region.focus()
    page.keyboard.press("ArrowRight")
    moved = """one => new Promise(done => {
      const look = () => one.scrollLeft > 0 ? done(true) : requestAnimationFrame(look);
      setTimeout(() => done(false), 20000);
      look();
    })"""  # not wait_for_function, whose eval the page's own policy forbids
    assert region.evaluate(moved)
    region.evaluate("one => one.scrollTo(400, 400)")
    inside = """one => {
      const name = one.querySelector("tbody tr:nth-child(20) th").getBoundingClientRect();
      const head = one.querySelector("thead th:nth-child(3)").getBoundingClientRect();
      const box = one.getBoundingClientRect();
      return [name.left - box.left, head.top - box.top, name.width / box.width];
    }"""
    left, top, share = region.evaluate(inside)
    assert 0 <= left <= 2
    assert 0 <= top <= 2
    assert share < 0.5
    page.close()


def test_a_name_that_is_a_script_does_not_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(_PAGES["hostile"](), encoding="utf-8")
    page = browser.new_page()
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    assert alerts == []
    assert page.locator("script").count() == 0
    assert page.get_by_text("<script>alert(1)</script>").count() > 3
    page.close()
