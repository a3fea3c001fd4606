"""Runs to keep for good: packed samples, the summary, and nothing that can be drawn anew."""

from __future__ import annotations

import re
from pathlib import Path

from eval.records import Folder
from eval.report import REPORT, SUMMARY

_PLOT = re.compile(r"^!\[[^]]*\]\(([^/)]+\.png)\)\n\n?", re.MULTILINE)  # as the summary shows it


def archive_run(path: Path) -> int:
    """Pack a run's samples; remove its report, its plots, and the summary's lines that show them.

    Args:
        path: folder of a finished run.

    Returns:
        Bytes of all files that are left in the folder.

    Raises:
        ValueError: there is no run, or it has not finished.
    """
    Folder(path).pack()
    (path / REPORT).unlink(missing_ok=True)
    summary = path / SUMMARY
    if summary.is_file():
        text = summary.read_text(encoding="utf-8")
        for name in _PLOT.findall(text):
            (path / name).unlink(missing_ok=True)
        summary.write_text(_PLOT.sub("", text), encoding="utf-8")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
