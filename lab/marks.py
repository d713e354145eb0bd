"""Pages whose middle is made from results, and whose rest is written by hand."""

from __future__ import annotations


def between(text: str, begin: str, end: str, body: str) -> str:
    """``text`` with ``body`` in place of what stands between the two marks.

    Raises ``ValueError`` for a page without them.
    """
    start = text.index(begin) + len(begin)
    stop = text.index(end, start)
    return f"{text[:start]}\n{body}\n{text[stop:]}"
