"""Reports as people see them, in a real Chromium: `make browser-test`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import axe, chromium, complaints, emulate, fetched, resize
from make_result import ARMS, make_result
from test_chargeback import PERIOD, a_row
from test_history import a_verdict, write_gate
from test_report_page import material
from test_weekly import write_run

from pipeline.cli.commands import weekly
from pipeline.compare.attribution import Attribution, Effect, Effects, unknown
from pipeline.report import attribution
from pipeline.report.comparing import Side, page_of
from pipeline.report.material import Material
from pipeline.report.page import page
from pipeline.report.run_report import html_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
PAGES = (*sorted(ARMS), "comparison", "weekly", "attribution")
PHONE_PX = 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def attributed() -> str:
    """Return the page of two parts, of which one pays."""

    def effects(hours: Effect) -> Effects:
        quality = Effect(0.001, (-0.004, 0.006))
        return Effects(hours=hours, quality=quality, serving=unknown("not served"), margin=0.01)

    saves, costs = effects(Effect(0.31, (0.28, 0.34))), effects(Effect(-0.12, (-0.2, -0.05)))
    found = Attribution(
        arm="student",
        base="teacher",
        says={"precision": "precision=bf16, not fp32", "int8": "stage int8 (quantize)"},
        left_out={"precision": saves, "int8": costs},
        shapley={"precision": saves, "int8": costs},
        together=effects(Effect(0.22, (0.1, 0.3))),
        lacking=[],
        key="bits_per_byte",
        runs=["run-1"],
        level=0.95,
        seeds=3,
    )
    return page(*attribution.page_of(found, make_result("distill"), "python -m pipeline attribute"))


def a_week(root: Path, empty_store: Path) -> str:
    """Return the page of a period with runs, waste, forecasts and releases."""
    root.mkdir()
    shutil.copy(empty_store, root / "mlflow.db")
    write_run(root, "run-a", [a_row()], budget_h=4.0)
    for n in range(1, 5):
        write_gate(root, a_verdict(n, saving=0.2 + n / 1000))
    out = root / "weekly"
    assert weekly.main([*PERIOD, "--root", str(root), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> dict[str, str]:
    """Return the address of a page of every recipe, and of those of other commands."""
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
    texts["weekly"] = a_week(folder / "store", empty_store)
    texts["attribution"] = attributed()
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
