"""How much of the test split the figures rest on, and what stands apart from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.ledger.numbers import percent, significant
from pipeline.ledger.shapes import Result


def reading_lines(result: Result) -> list[str]:
    """Return what was read of the test split, where it was not all, and what unknown tokens and
    ends took.

    Arms for which the same is true share a line.
    """
    by_text: dict[str, list[str]] = {}
    for row in result["rows"]:
        for text in _of_row(row["quality"]):
            by_text.setdefault(text, []).append(row["arm"])
    finished = {row["arm"] for row in result["rows"] if row["quality"]}
    return [
        text if set(arms) == finished else f"{', '.join(dict.fromkeys(arms))}: {text}"
        for text, arms in by_text.items()
    ]


def _of_row(quality: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    value = lambda name: quality.get(name, {}).get("value")
    documents, cut = value("read_documents"), value("cut_documents")
    if documents is not None and documents < 1:
        said.append(f"{percent(documents)} of the test documents were read (quality.max_documents)")
    for name, what, limit in (
        ("read_bytes", "bytes", "quality.max_bytes_per_document"),
        ("read_tokens", "tokens", "sequence_length"),
    ):
        share = value(name)
        if share is not None and share < 1:
            read = f"{percent(share)} of the {what} of the test documents were read"
            said.append(f"{read}: {limit} cut {percent(cut)} of the documents")
    unknown = value("unknown_bytes")
    if unknown:
        said.append(
            f"{significant(100 * unknown, 2)}% of the test bytes stand under unknown tokens"
        )
    ends = value("end_token_bits")
    if ends is not None:
        said.append(
            f"the token that ends a text costs {significant(ends, 3)} bits on test, which no other"
            " figure counts"
        )
    return said
