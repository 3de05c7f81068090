"""Completions as text with coloured tokens."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SHADES = 6
"""Steps of colour, a factor of ten in predicted shift each, the darkest from 1e-1 nats."""


def completion_html(row: Mapping[str, Any]) -> str:
    """Return a completion as HTML: the prompt in grey, then each token shaded by its predicted shift.

    A rejected token is struck through; the shift shows as a tooltip. A token that was not looked at has no shade. The
    styles are inline, so that the text stands in any page.

    Args:
        row: ``prompt`` and ``tokens``, with or without ``shift`` (nats, None where unknown) and ``rejected``.
    """
    tokens: Sequence[Any] = row.get("tokens") or []
    shifts: Sequence[Any] = row.get("shift") or [None] * len(tokens)
    rejected: Sequence[Any] = row.get("rejected") or [False] * len(tokens)
    parts = [_token(str(token), shift, bool(out)) for token, shift, out in zip(tokens, shifts, rejected, strict=False)]
    prompt = escape(str(row.get("prompt", "")))
    return f'<span class="prompt" style="opacity:.65">{prompt}</span>{"".join(parts)}'


def _token(text: str, shift: Any, rejected: bool) -> str:
    known = isinstance(shift, int | float) and math.isfinite(shift)
    shade = 0
    if known and shift > 0:
        shade = min(SHADES, max(0, SHADES + 1 + math.floor(math.log10(shift))))
    style = f"background:rgba(213,94,0,{0.12 * shade:.2f});" if shade else ""
    if rejected:
        style += "text-decoration:line-through 2px;outline:1px solid rgb(213,94,0);"
    title = f"predicted shift {shift:.2e} nats" if known else "no shift predicted"
    title += ", rejected" if rejected else ""
    return f'<span style="{style}" title="{title}">{escape(text) or "&#9633;"}</span>'
