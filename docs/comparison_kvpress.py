"""Write the tables of the comparison with kvpress into its page: python -m docs.comparison_kvpress."""

from pathlib import Path

from eval.kvpress.table import tables
from eval.records import Folder

RECORDS = Path("results/comparison/kvpress")
PAGE = Path("docs/comparison-kvpress.md")
START, END = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Put the tables of every model between the markers of the page."""
    parts = []
    for folder in sorted(path.parent for path in RECORDS.glob("*/run.json")):
        run = Folder(folder)
        model = run.manifest["model"]["name"]
        parts.append(f"### {model}\n\nRecord: `{folder}`.\n\n{tables(run.records()).replace('### ', '#### ')}")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n\n" + "\n".join(parts) + f"\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
