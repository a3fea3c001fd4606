"""The README's Python runs, from the first line to the last."""

import re
from pathlib import Path

import pytest


@pytest.mark.real
def test_readme_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 7
    names = {}
    for block in blocks:
        exec(block, names)
    assert "WildCatCache(ratio=0.25" in capsys.readouterr().out
    assert names["cache"].stored_length() <= 512 and names["output"].shape == (8, 1, 64)
