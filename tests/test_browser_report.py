"""Reports as people see them, in a real Chromium: `make browser-test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import axe, chromium, complaints, emulate, fetched, resize
from make_result import ARMS
from test_report_page import material

from pipeline.report.comparing import Side, page_of
from pipeline.report.material import Material
from pipeline.report.page import page
from pipeline.report.run_report import html_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
PAGES = (*sorted(ARMS), "comparison")
PHONE_PX = 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the address of a page of every recipe, and of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {recipe: html_report(material(recipe)) for recipe in ARMS}
    sides = [
        Side(
            Material(material(recipe).result, None, material(recipe).curves, name=recipe),
            {"training.steps": steps},
        )
        for recipe, steps in (("distill", 200), ("quantize", 300))
    ]
    texts["comparison"] = page(*page_of(sides, "python -m pipeline compare a b"))
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture(autouse=True)
def plain(browser: Any) -> None:
    emulate(browser, prefers_color_scheme="light")
    resize(browser, 1200)
    complaints(browser)
    fetched(browser)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_by_itself(browser: Any, pages: dict[str, str], name: str) -> None:
    browser.get(pages[name])
    assert browser.title
    assert complaints(browser) == []
    assert {each for each in fetched(browser) if not each.startswith("data:")} == {pages[name]}
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.chart svg')].map(e => {"
        " const box = e.getBoundingClientRect();"
        " return [box.width, box.height, e.querySelectorAll('path, use').length]; })"
    )
    assert sizes
    assert all(width > 300 and height > 60 and marks > 5 for width, height, marks in sizes)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_a_reader_out(
    browser: Any, pages: dict[str, str], name: str, scheme: str
) -> None:
    emulate(browser, prefers_color_scheme=scheme)
    browser.get(pages[name])
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert axe(browser) == []
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_down_alone(browser: Any, pages: dict[str, str], name: str) -> None:
    resize(browser, PHONE_PX)
    browser.get(pages[name])
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE_PX


def test_a_table_sorts_by_size(browser: Any, pages: dict[str, str]) -> None:
    browser.get(pages["distill"])
    heading = browser.find_element("xpath", "//section[@aria-labelledby='arms']/div//th[3]/button")
    column = "//section[@aria-labelledby='arms']/div//tbody/tr/*[3]"
    read = lambda: [each.text for each in browser.find_elements("xpath", column)]
    assert read() == ["32.0 min", "22.0 min", "11.0 min", "14.0 min"]
    heading.click()
    assert read() == ["11.0 min", "14.0 min", "22.0 min", "32.0 min"]
    heading.click()
    assert read() == ["32.0 min", "22.0 min", "14.0 min", "11.0 min"]
    parent = heading.find_element("xpath", "..")
    assert parent.get_attribute("aria-sort") == "descending"


def test_keys_reach_everything(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.get(pages["distill"])
    press = lambda *keys: ActionChains(browser).send_keys(*keys).perform()
    press(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the report"
    press(Keys.ENTER, Keys.TAB)
    assert browser.switch_to.active_element.tag_name == "summary"
    press(Keys.ENTER)
    assert browser.find_element("css selector", "details").get_attribute("open") is not None


def test_paper_has_the_data_of_every_chart(
    browser: Any, pages: dict[str, str], tmp_path: Path
) -> None:
    emulate(browser, media="print", prefers_color_scheme="dark")
    browser.get(pages["distill"])
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    shut = browser.execute_script("return document.querySelectorAll('details:not([open])').length")
    assert shut == 0
    ink = browser.execute_script("return getComputedStyle(document.body).color")
    assert ink == "rgb(28, 33, 39)"  # dark on paper, whatever the screen is
