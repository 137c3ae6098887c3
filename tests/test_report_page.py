"""report.html, read back by an HTML parser that is none of ours."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from functools import cache
from typing import Any

import pytest
from lxml import etree, html
from make_result import (
    ARMS,
    make_pair,
    make_quality,
    make_result,
    make_row,
    make_saving,
    make_unfinished,
    null,
    value,
)
from matplotlib import image

from pipeline.ledger.numbers import duration, percent, significant
from pipeline.report import drawing, page
from pipeline.report.blocks import Bars, Curves, Figure, Interval, Intervals, Scatter, Table
from pipeline.report.card import SIZE_PX, card_markdown, card_picture
from pipeline.report.formats import WRITERS, files_of
from pipeline.report.headline import badge_of, number_of
from pipeline.report.material import Curve, Material, Stretch
from pipeline.report.run_report import html_report, markdown_report, pictures
from pipeline.report.sections import sections_of

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><b>x",
    "{{ 7 * 7 }}",
    "$x^2$ \\frac{",
    "\x1b[31mred\x1b[0m\x00",
    "a\u202eb",
    "x" * 400,
]


def material(recipe: str = "distill", **changes: Any) -> Material:
    """Return a run with curves, as if its stages had taken the times of its rows."""
    result: Any = make_result(recipe, **changes)
    curves = [
        Curve("teacher", 0, {"loss": [(0.1, 3.0), (0.2, 2.5)], "validation": [(0.2, 2.4)]}),
        Curve("student", 0, {"loss": [(0.1, 3.5), (0.2, 2.9)]}),
    ]
    at = [("work", "teacher", 0.05, 0.55), ("assess", "teacher", 0.55, 0.6)]
    at += [("work", "student", 0.6, 0.9)]
    stretches = [Stretch(kind, arm, 0, start, end) for kind, arm, start, end in at]
    return Material(result, None, curves, stretches)


@cache
def shown() -> str:
    """Return its page."""
    return html_report(material())


def dom(text: str) -> Any:
    return html.document_fromstring(text)


def text_of(element: Any) -> str:
    return " ".join(element.text_content().split())


def table_of(root: Any, section: str, number: int = 0) -> list[list[str]]:
    """Return a table of a section that is no chart's, cell by cell."""
    tables = root.xpath(f"//section[@aria-labelledby='{section}']/div[@class='wide']/table")
    return [[text_of(cell) for cell in row.xpath("./*")] for row in tables[number].xpath(".//tr")]


def data_of(root: Any, figure: str) -> list[list[str]]:
    """Return the table of a chart."""
    (table,) = root.xpath(f"//figure[@id='figure-{figure}']//table")
    return [[text_of(cell) for cell in row.xpath("./*")] for row in table.xpath(".//tr")]


# -- figures --------------------------------------------------------------------------------------


def test_the_page_answers_in_the_order_of_questions() -> None:
    root = dom(shown())
    assert [text_of(each) for each in root.xpath("//h2")] == [
        "Comparisons",
        "Arms",
        "Quality against cost",
        "Where the time went",
        "Waste by cause",
        "While it trained",
        "When it pays back",
        "Memory and energy",
        "What would change this answer",
        "What else used the machine",
        "Why a figure is missing",
        "Device and environment",
        "What the figures mean",
        "How to reproduce",
    ]
    assert [each.get("id") for each in root.xpath("//figure")] == [
        "figure-intervals-quality",
        "figure-intervals-savings",
        "figure-arms",
        "figure-quality-hours",
        "figure-quality-serving",
        "figure-hours",
        "figure-curve-validation",
        "figure-curve-loss",
        "figure-payback-0",
        "figure-memory",
    ]
    links = [each.get("href") for each in root.xpath("//nav//a")]
    assert links == [f"#{each.get('id')}" for each in root.xpath("//h2")]


@pytest.mark.parametrize("recipe", sorted(ARMS))
def test_every_figure_of_the_arms_is_the_results(recipe: str) -> None:
    result: Any = make_result(recipe)
    root = dom(html_report(Material(result, charts=False)))
    rows = {row[0]: row for row in table_of(root, "arms")[1:]}
    assert list(rows) == [row["arm"] for row in result["rows"]]
    for row in result["rows"]:
        quality = row["quality"]["bits_per_byte"]
        ends = ", ".join(significant(each, 4) for each in quality["ci"])
        assert rows[row["arm"]][2] == duration(
            3600 * row["ledger"]["device_hours"]["attached"]["value"]
        )
        assert rows[row["arm"]][4] == f"{significant(quality['value'], 4)} [{ends}]"
        served = row["serving"]["device_s_per_1k_units"]["value"]
        assert rows[row["arm"]][5] == significant(served)


def test_every_figure_of_the_comparisons_is_the_results() -> None:
    result: Any = make_result("distill")
    root = dom(html_report(Material(result, charts=False)))
    shown = {row[0]: row for row in data_of(root, "intervals-quality")[1:]}
    for pair in result["comparisons"]:
        quality = pair["quality"]["bits_per_byte"]
        row = shown[f"{pair['arm']} against {pair['base']}"]
        assert row[1] == percent(quality["value"], sign=True)
        ends = [percent(each, sign=True) for each in quality["ci"]]
        assert row[2] == " to ".join(ends)
        assert row[3] == percent(-quality["margin"], sign=True)
        assert row[4] == quality["answer"]
    shown = {row[0]: row for row in data_of(root, "intervals-savings")[1:]}
    for pair in result["comparisons"]:
        for measure in {"training", "serving"} & {*pair["on"]}:
            row = shown[f"{pair['arm']} against {pair['base']}, {measure}"]
            saving = pair[measure]
            known = saving["value"] is not None
            said = percent(saving["value"], sign=True) if known else saving["why_missing"]
            assert row[1].removeprefix("not known: ") == said


def test_the_hours_of_the_phases_add_up() -> None:
    (block,) = (
        block
        for section in sections_of(material())
        for block in section.blocks
        if isinstance(block, Figure) and isinstance(block.chart, Bars)
    )
    assert isinstance(block.chart, Bars)
    for at, row in enumerate(make_result("distill")["rows"]):
        total = sum(part.sizes[at] for part in block.chart.parts)
        assert total == pytest.approx(row["ledger"]["device_hours"]["attached"]["value"], rel=1e-9)
    wasted = {part.name: part.sizes for part in block.chart.parts if part.kind == "wasted"}
    assert set(wasted) == {"data_wait"}
    assert wasted["data_wait"][0] == pytest.approx(0.05 * (30 + 2) / 60)


def test_hours_lost_whole_are_waste_of_their_own() -> None:
    row = make_row("student")
    hours = row["ledger"]["device_hours"]
    lost = 0.5 * hours["attached"]["value"]
    hours["wasted_by"]["rollback"] = value(lost)
    parts = next(
        block.chart.parts
        for section in sections_of(Material(make_result("distill", rows=[row])))  # type: ignore
        for block in section.blocks
        if isinstance(block, Figure) and isinstance(block.chart, Bars)
    )
    assert {part.name: part.sizes[0] for part in parts}["rollback"] == lost
    assert sum(part.sizes[0] for part in parts) == pytest.approx(hours["attached"]["value"])


def test_points_are_unbeaten_where_no_other_is_better_in_both() -> None:
    rows = [make_row("fp32"), make_row("bf16"), make_row("fp16"), make_row("tf32")]
    bits = (2.0, 2.1, 2.0, 1.9)
    served = (1.0, 0.5, 0.9, 2.0)
    for row, quality, cost in zip(rows, bits, served, strict=True):
        row["quality"]["bits_per_byte"]["value"] = quality
        row["serving"]["device_s_per_1k_units"] = value(cost)
    pair = make_pair("fp16", "fp32", quality=make_quality(0.0, "undecided"))
    result: Any = make_result("mixed_precision", rows=rows, comparisons=[pair])
    root = dom(html_report(Material(result, charts=False)))
    found = {row[0]: row[3:] for row in data_of(root, "quality-serving")[1:]}
    assert found == {
        "fp32": ["", "fp16"],
        "bf16": ["yes", ""],
        "fp16": ["yes", "fp32"],
        "tf32": ["yes", ""],
    }


def test_the_payback_band_crosses_zero_where_the_result_says() -> None:
    chart = next(
        block.chart
        for section in sections_of(material())
        for block in section.blocks
        if isinstance(block, Figure) and block.name == "payback-0"
    )
    assert isinstance(chart, Curves)
    (band,) = chart.series
    pair = next(p for p in make_result("distill")["comparisons"] if p["payback"])
    units = pair["payback"]["value"]
    assert band.low is not None
    assert band.high is not None
    assert band.y[len(band.y) // 2] == pytest.approx(0.0, abs=1e-12)
    assert band.x[len(band.x) // 2] == pytest.approx(units)
    # C_opt of the worked example: 20 minutes
    spent = pair["training"]["c_opt"]["value"] if pair["training"] else 20 / 60
    assert band.y[0] == pytest.approx(spent * (0.01 - 1), rel=1e-6)
    assert all(low <= y <= high for low, y, high in zip(band.low, band.y, band.high, strict=True))


# -- what is not known ----------------------------------------------------------------------------


def test_a_run_without_anything_is_a_page() -> None:
    result: Any = make_result("distill", rows=[], comparisons=[], status="FAILED", why="no data")
    root = dom(html_report(Material(result, charts=False)))
    assert text_of(root.xpath("//h1/span")[0]) == "FAILED"
    assert "No stage was measured" in root.text_content()
    assert root.xpath("//figure") == []


def test_what_is_not_known_leaves_no_mark_and_says_so() -> None:
    rows = [make_row("reference"), make_unfinished("int8", "FAILED", "out of memory")]
    pairs = [make_pair("int8", "reference", quality=make_quality(0.0, "equal"), training=None)]
    pairs[0]["on"] = ["quality", "training"]
    pairs[0]["quality"] = {"bits_per_byte": null("no items", ci=None, n=0, margin=0.01)}
    result: Any = make_result("quantize", rows=rows, comparisons=pairs)
    root = dom(html_report(Material(result, charts=False)))
    (row,) = data_of(root, "intervals-quality")[1:]
    assert row[1] == "not known: no items"
    (row,) = data_of(root, "intervals-savings")[1:]
    assert row[1].startswith("not known: int8 FAILED: out of memory")


# -- other people's text --------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_others_text_is_text(name: str) -> None:
    plain = dom(shown())
    rows = [make_row("fp32"), make_row(name), make_unfinished(f"{name}2", "FAILED", name)]
    pair = make_pair(
        name, "fp32", quality=make_quality(0.02, "better"), training=null(name, ci=None)
    )
    result: Any = make_result("mixed_precision", rows=rows, comparisons=[pair]) | {
        "question": name,
        "recipe": name,
        "run_id": name,
        "device": {"kind": "cuda", "name": name, "count": 1},
        "environment": {"torch": name, "command": name, "notes": [name]},
    }
    curve = Curve(name, 0, {"loss": [(0.1, 1.0), (0.2, 0.5)]})
    found = Material(result, None, [curve], charts=False)
    text = html_report(found)
    root = dom(text)
    kinds = {each.tag for each in plain.iter() if isinstance(each.tag, str)}
    assert {each.tag for each in root.iter() if isinstance(each.tag, str)} <= kinds | {"code"}
    assert len(root.xpath("//script")) == 1
    assert root.xpath("//@onerror") == []
    assert not re.search(r"[\x00\x1b\u202e]", text)
    assert "49" not in text_of(root.xpath("//h1")[0])
    assert name.partition("\x1b")[0][:20].replace("\u202e", "").strip() in root.text_content()
    assert [why for _, why in _files(found)] == []


def test_others_text_is_text_in_charts_too() -> None:
    rows = [Interval(label=each, value=0.1, ends=(0.0, 0.2), shown="x") for each in HOSTILE]
    figure = Figure(
        name="x", title="x", says="x", chart=Intervals(axis="x", rows=rows), table=Table((), ())
    )
    root = etree.fromstring(drawing.as_svg(figure))
    kinds = {each.tag for each in root.iter() if isinstance(each.tag, str)}
    assert kinds <= {"svg", "g", "defs", "path", "use", "text", "clipPath", "rect"}
    texts = [each.text for each in root.iter("text")]
    assert all(any(part in text for text in texts if text) for part in ("<script>", "$x^2$"))
    assert drawing.as_png(figure).startswith(b"\x89PNG")


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone() -> None:
    text = shown()
    root = dom(text)
    (script,) = root.xpath("//script/text()")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert all(each.startswith(("#", "data:")) for each in root.xpath("//@href"))
    assert root.xpath("//@src") == []
    assert "url(" not in text.replace("url(#", "")


# -- charts ---------------------------------------------------------------------------------------


def test_every_chart_has_marks_a_name_and_a_table() -> None:
    root = dom(shown())
    figures = root.xpath("//figure")
    assert len(figures) == 10
    for each in figures:
        assert len(each.xpath(".//svg//*[local-name()='path' or local-name()='use']")) > 5
        assert each.xpath("./div[@role='img']/@aria-label")[0]
        assert len(each.xpath(".//table//tr")) > 1
    ids = [each for each in root.xpath("//@id") if each]
    assert len(ids) == len(set(ids))


def test_a_pages_charts_take_the_pages_colours() -> None:
    text = shown()
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in charts
    assert not re.search(r"#0a0b0|#0c0d0|#010203|#040506|#070809", charts)
    for palette in (drawing.LIGHT, drawing.DARK):
        for name, color in palette.named().items():
            assert f"{name}: {color}" in text


@pytest.mark.parametrize(("palette", "paper"), [(drawing.LIGHT, 255), (drawing.DARK, 0x16)])
def test_text_and_marks_stand_out(palette: drawing.Palette, paper: int) -> None:
    """Source: WCAG 2.2, success criterion 1.4.3: relative luminance and contrast ratio."""

    def luminance(channels: tuple[int, ...]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (each / 255 for each in channels)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    behind = luminance((paper,) * 3)
    for name, color in palette.named().items():
        front = luminance(tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)))
        contrast = (max(front, behind) + 0.05) / (min(front, behind) + 0.05)
        assert contrast >= (1.1 if name == "--grid" else 4.5), (name, contrast)


def test_a_chart_that_cannot_be_drawn_leaves_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Figure) -> str:
        raise RuntimeError("no font")

    monkeypatch.setattr(page, "as_svg", fails)
    root = dom(html_report(material()))
    said = [text_of(each) for each in root.xpath("//p[@class='missing']")]
    assert set(said) == {"The chart was not drawn (RuntimeError: no font). Its data:"}
    assert len(said) == len(root.xpath("//figure//details[@open]//table")) == 10


def test_without_charts_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Material(make_result("distill"), charts=False)  # type: ignore
    monkeypatch.setattr(page, "as_svg", lambda _: pytest.fail("drawn"))
    names = {name for name, _ in files_of(found, pytest.fail)}
    assert names == {"report.html", "report.md", "card.md"}
    assert "![" not in markdown_report(found)


def test_pictures_are_those_that_the_markdown_shows() -> None:
    found = material()
    drawn = dict(pictures(found, pytest.fail))
    named = re.findall(r"^!\[.*\]\((.*)\)$", markdown_report(found), re.MULTILINE)
    assert named == list(drawn)
    assert len(named) == 5
    for content in drawn.values():
        shape = image.imread(io.BytesIO(content)).shape
        assert shape[1] == 777
        assert len(content) < 100_000


def test_the_card_has_the_number_with_its_interval() -> None:
    found = material()
    content = card_picture(found)
    assert content is not None
    assert image.imread(io.BytesIO(content)).shape[:2] == SIZE_PX[::-1]
    text = card_markdown(found)
    assert text.count("\n") <= 10
    saving = next(p for p in found.result["comparisons"] if p["base"] == "teacher")["serving"]
    assert saving is not None
    assert saving["value"] is not None
    assert text.startswith(f"**{percent(saving['value'], sign=True)}** (90% interval ")


def test_a_file_that_cannot_be_made_keeps_no_other_from_being_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: Material) -> str:
        raise ValueError("broken")

    monkeypatch.setitem(WRITERS, "report.md", fails)
    said: list[str] = []
    names = [name for name, _ in files_of(material(), said.append)]
    assert said == ["report.md could not be written (ValueError: broken)"]
    assert "report.html" in names
    assert "card.png" in names


# -- the answer in a word -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "serving", "badge"),
    [
        ((0.0, "equal"), 0.3, "PAYS"),
        ((0.05, "better"), 0.3, "PAYS"),
        ((-0.05, "worse"), 0.3, "CHEAPER, AND WORSE"),
        ((0.0, "undecided"), 0.3, "CHEAPER, QUALITY UNDECIDED"),
        ((0.0, "equal"), -0.3, "DOES NOT PAY"),
        ((0.0, "equal"), 0.01, "UNDECIDED"),
    ],
)
def test_the_badge_follows_from_cost_and_quality(
    quality: tuple[float, str], serving: float, badge: str
) -> None:
    pair = make_pair(
        "int8", "reference", quality=make_quality(*quality), serving=make_saving(serving)
    )
    result: Any = make_result("quantize", comparisons=[pair])
    assert badge_of(result)[0] == badge
    assert number_of(result)[0] == percent(serving, sign=True)


def test_a_saving_that_plain_training_has_too_is_no_gain() -> None:
    result: Any = make_result("distill")
    for pair in result["comparisons"]:
        is_control = pair["base"] == "control_compute"
        pair["quality"] = make_quality(0.0, "equal") if is_control else make_quality(0.05, "better")
    assert badge_of(result) == ("NO GAIN OVER PLAIN TRAINING", "bad")


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_did_not_end_has_no_answer(status: str) -> None:
    assert badge_of(make_result("distill", status=status, why="x")) == (status, "bad")  # type: ignore


def _files(found: Material) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    for _ in files_of(found, lambda why: said.append(("", why))):
        pass
    return said


def test_chart_kinds_are_all_shown() -> None:
    kinds = {
        type(block.chart)
        for section in sections_of(material())
        for block in section.blocks
        if isinstance(block, Figure)
    }
    assert kinds == {Intervals, Scatter, Bars, Curves}
