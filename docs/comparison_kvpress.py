"""Write the tables of the comparison with kvpress into its page: python -m docs.comparison_kvpress."""

from pathlib import Path

from eval.kvpress.table import tables
from eval.records import Folder

RECORDS = Path("results/comparison/kvpress")
PAGE = Path("docs/comparison-kvpress.md")
START, END = "<!-- measured -->", "<!-- /measured -->"
UNFINISHED = "**This run has not finished**: both sides run, and so few texts decide nothing."


def section(folder: Path) -> str:
    """Write the tables of one model."""
    run = Folder(folder)
    facts = [f"Record: `{folder}`.", *([] if run.manifest["finished"] else [UNFINISHED])]
    return "\n\n".join([f"### {run.manifest['model']['name']}", *facts, tables(run.records()).replace("### ", "#### ")])


def main() -> None:
    """Put the tables of every model between the markers of the page."""
    parts = [section(path.parent) for path in sorted(RECORDS.glob("*/run.json"))]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n\n" + "\n".join(parts) + f"\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
