"""Language models: every token of a text, or of a chat's answers, is predicted from those before.

Quality is read in bits per byte of text, which holds across tokenizers. Serving generates, and
counts tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.tasks.kind import Kind
from pipeline.tasks.quality import (
    Columns,
    PlainRatio,
    PowerOfRatio,
    Quality,
    Ratio,
    RatioWhereAny,
    agreement,
    drift,
)

UNKNOWN_SHARE = 1e-3
"""Of bytes under unknown tokens, above which bits per byte says nothing: what is not told costs no
bits.
"""


def why_unknown(columns: Columns) -> str | None:
    """Return why bits per byte of these documents are not known; None where too little stands under
    unknown tokens.
    """
    if "unknown_bytes" not in columns or not columns["bytes"].sum():
        return None
    share = float(columns["unknown_bytes"].sum() / columns["bytes"].sum())
    if share <= UNKNOWN_SHARE:
        return None
    return f"{share:.1%} of the bytes stand under unknown tokens, which tell nothing of them"


class CausalLm(Kind):
    """The task `causal_lm`."""

    word = "language model"
    remedy = "give a causal language model"
    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    labelled, is_language = False, True
    embedded = "stdlib"
    validation_documents = 32
    rows = "windows"
    unit = "token"
    primary, stands_in = "bits_per_byte", "next_token_accuracy"
    recorded = ("bits", "bytes", "tokens", "correct")
    known_by, finite = "bytes", "bits"
    qualities = (
        Quality(
            key="bits_per_byte",
            words="bits per byte",
            heading="bits/byte",
            meaning="bits of the text's tokens / UTF-8 bytes of the text that they stand for, over"
            " test documents; ends apart",
            measure=Ratio("bits", "bytes"),
            direction=-1,
            unit="bit/B",
            counted=True,
            relative=True,
            same="bytes",
            why_unknown=why_unknown,
        ),
        Quality(
            key="end_token_bits",
            meaning="bits of an end (of a text or turn), mean over those read",
            measure=RatioWhereAny("end_bits", "ends"),
            direction=-1,
            unit="bit",
        ),
        Quality(
            key="unknown_bytes",
            meaning="share of the bytes under unknown tokens; not there where 0",
            measure=PlainRatio("unknown_bytes", "bytes"),
            direction=-1,
        ),
        # A power of the bits per token: bits per byte say the same, across tokenizers too, and are
        # what arms are compared on.
        Quality(
            key="perplexity",
            words="perplexity",
            meaning="exp of the mean token loss; comparable within one tokenizer only",
            measure=PowerOfRatio("bits", "tokens"),
            direction=-1,
            relative=True,
        ),
        Quality(
            key="next_token_accuracy",
            words="next-token accuracy",
            meaning="share of test tokens predicted first",
            measure=Ratio("correct", "tokens"),
            direction=1,
            same="tokens",
        ),
        agreement(Ratio("agree", "tokens"), same="tokens"),
        *drift(kl=Ratio("kl", "tokens"), flips=Ratio("flips", "tokens")),
    )

    def why_wrong(self, row: Mapping[str, Any]) -> str | None:
        """Refuse counts that no text has."""
        below = next((name for name in self.recorded if row.get(name, 0) < 0), None)
        if below is not None:
            return f"{below} is below 0"
        empty = next((name for name in ("bytes", "tokens") if row.get(name, 1) == 0), None)
        if empty is not None:
            return f"{empty} is 0: such a document says nothing"
        if row.get("correct", 0) > row.get("tokens", math.inf):
            return "more tokens are correct than there are"
        return None
