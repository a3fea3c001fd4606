"""Markdown as GitHub reads it."""

from __future__ import annotations

from collections.abc import Sequence


def escape_markdown(text: str) -> str:
    """Escape text so that it can neither end a cell or a line, nor be HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def markdown_table(
    title: str, notes: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[bool]
) -> str:
    """Write a table below its heading and notes.

    pandas' `to_markdown` does not escape cells, and pads them to the width of the longest.

    Args:
        title: text of the heading.
        notes: text between heading and table.
        header: text of each column's head.
        rows: cells, escaped already, since they may hold Markdown.
        right: True for each column whose cells stand on the right.
    """
    rule = ["---:" if on_right else "---" for on_right in right]
    lines = [[escape_markdown(name) for name in header], rule, *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {escape_markdown(title)}\n\n{escape_markdown(notes)}\n\n{body}\n"
