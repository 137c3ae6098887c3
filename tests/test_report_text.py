"""Strings that others chose: what a terminal and a Markdown reader make of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.errors import one_line
from pipeline.report.text import bullet, columns, markdown_text, pad, shorten, wrap

HOSTILE = [
    "a|b",
    "two\nlines",
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "`code`",
    "<script>x</script>",
    "[x](http://y)",
    "**bold**",
    "__init__",
    "control_compute",
    "a\\|b",
    "&lt;",
    "~~gone~~",
    "\u202eright",
    "![i](j)",
]


def _shown(markdown: str) -> str:
    """Return the text that a CommonMark reader (with tables and strikethrough) shows for the first
    table cell.
    """
    source = f"| {markdown} | end |\n| --- | --- |\n"
    inline = next(
        t
        for t in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source)
        if t.children
    )
    assert all(child.type == "text" for child in inline.children or []), inline
    return "".join(child.content for child in inline.children or [])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_literally_in_a_markdown_table(text: str) -> None:
    assert _shown(markdown_text(text)) == one_line(text)


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=40).filter(lambda text: one_line(text) != ""))
def test_any_text_is_shown_literally_in_a_markdown_table(text: str) -> None:
    assert _shown(markdown_text(text)) == one_line(text)


@pytest.mark.parametrize(
    "text", [*HOSTILE, "# head", "- item", "1. one", "12) two", "---", "===", "+ plus", "-10%"]
)
def test_a_bullet_holds_its_text_literally(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"{bullet(text)}\n- next\n")
    assert [t.type for t in tokens].count("list_item_open") == 2
    assert not {"heading_open", "hr", "ordered_list_open"} & {t.type for t in tokens}
    shown = next("".join(child.content for child in t.children) for t in tokens if t.children)
    assert shown == one_line(text)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("two\n\n lines\t", "two lines"),
        ("\x9b31mred", "red"),
        ("be\x07ll\x00", "bell"),
        ("\u202eabc", "abc"),
        ("\x1b]0;title\x07x", "x"),
        ("\ud800x", "x"),
    ],
)
def test_one_line_drops_what_moves_the_cursor_or_hides(text: str, plain: str) -> None:
    assert one_line(text) == plain


@given(st.text(max_size=60))
def test_one_line_is_one_printable_line(text: str) -> None:
    line = one_line(text, 20)
    assert len(line) <= 20
    assert len(line.splitlines()) <= 1
    assert "\x1b" not in line


def test_wide_characters_take_two_columns() -> None:
    assert [columns("abc"), columns("模型"), columns("e\N{COMBINING ACUTE ACCENT}")] == [3, 4, 1]
    assert pad("模", 4) == "模  "
    assert pad("ab", 4, right=True) == "  ab"


def test_names_are_cut_in_the_middle_and_stay_apart() -> None:
    assert shorten(["control_compute", "student"], 11) == ["contr..pute", "student"]
    alike = [f"ablation_{number}_of_the_same_stage" for number in range(12)]
    short = shorten(alike, 10)
    assert len(set(short)) == 12
    assert all(columns(name) <= 10 for name in short)


@given(
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30), max_size=8),
    st.integers(8, 20),
)
def test_shortened_names_fit_and_differ(names: list[str], width: int) -> None:
    short = shorten(names, width)
    assert all(columns(name) <= width for name in short)
    assert len(set(short)) == len(names)


def test_lines_are_wrapped_to_columns_not_characters() -> None:
    assert all(columns(line) <= 20 for line in wrap("模型 " * 30 + "x" * 50, 20, "  "))
    assert wrap("work\N{NO-BREAK SPACE}1.0 + retry\N{NO-BREAK SPACE}2.0", 12) == [
        "work 1.0 +",
        "retry 2.0",
    ]
