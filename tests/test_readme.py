"""What the README shows runs, from the first line to the last: its Python, and its commands on files."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from wildcat_kv import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# Those of these subcommands need minutes, or files that are nowhere; they have tests of their own.
ELSEWHERE = ("demo", "generate", "lm-eval", "check")
COMMANDS = [
    line for line in re.findall(r"^    wildcat-kv (.*)$", README, flags=re.M) if line.split()[0] not in ELSEWHERE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of it runs, one after the other."""
    path = tmp_path_factory.mktemp("readme")
    (path / "report.txt").write_text("The code word is swordfish. " + "The sun rises in the east. " * 20)
    return path


@pytest.mark.real
def test_readme_examples_run(capsys, folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 11
    names = {}
    for block in blocks:
        exec(block, names)
    out = capsys.readouterr().out
    assert "WildCatCache(ratio=0.25" in out and "ratio=0.25 max_tokens=None" in out and "CompressedContext(" in out
    assert names["text"].startswith("The code word") and len(names["answers"]) == 2
    assert names["cache"].stored_length() <= 512 and names["output"].shape == (8, 1, 64)
    assert "generate" not in vars(names["model"])


@pytest.mark.real
@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run(capsys, folder, monkeypatch, command):
    """In the folder that the examples have left."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["wildcat-kv", *shlex.split(command)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the code word?\n/quit\n"))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_.value.code and captured.out, captured.err


def test_all_five_ways_are_there():
    assert re.findall(r"^\*\*(\d)\.", README, flags=re.M) == ["1", "2", "3", "4", "5"]
    assert {"patch", "chat", "inspect", "presets"} <= {command.split()[0] for command in COMMANDS}
