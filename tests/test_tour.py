"""The notebook docs/tour.ipynb runs, and prints what it shows."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def read():
    return json.loads(TOUR.read_text(encoding="utf-8"))


def run(cells):
    """Run the cells that have code, one after the other, and yield each with what it printed."""
    names = {"__name__": "tour"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{TOUR.name}, cell {number}", "exec"), names)
            yield cell, out.getvalue()


def shown(cell):
    """Join the output that the notebook shows under a cell."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


@pytest.mark.real
def test_the_tour_prints_what_it_shows():
    for cell, printed in run(read()["cells"]):
        assert printed == shown(cell), "".join(cell["source"])


def test_the_tour_is_short_and_its_answers_are_right():
    cells = read()["cells"]
    assert len(cells) <= 20
    answers = "".join(shown(cell) for cell in cells if cell["cell_type"] == "code")
    for answer in ("Swordfish", "Maria Lund", "40 crates of oranges"):
        assert answers.count(answer) >= 2, answer


def main():
    """Write what the cells print into the notebook: python -m tests.test_tour."""
    notebook = read()
    torch.set_num_threads(1)
    for count, (cell, printed) in enumerate(run(notebook["cells"]), start=1):
        text = printed.splitlines(keepends=True)
        cell["execution_count"] = count
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
