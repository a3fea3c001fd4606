"""README and pages run: each block does what the page shows, and prints what stands under it."""

import contextlib
import io
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers

from wildcat_kv import cli
from wildcat_kv.models import default_model

ROOT = Path(__file__).parents[1]
# In an order in which the pages of one kind are together; each page is a story of its own.
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "index",
            "quick-start",
            "use",
            "budget",
            "integrations",
            "serving",
            "encoders",
            "near-wildcat",
            "method",
            "guarantee",
            "adding-a-method",
        )
    ),
]
FENCE = re.compile(r"^```(python|bash|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HUB = "AutoModelForCausalLM.from_pretrained(name)"


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Args:
        kind: "python" or "bash".
        code: the lines between the fences.
        printed: the text block under it; None if the page shows none.
        line: number of the first line of code.
    """

    kind: str
    code: str
    printed: str | None
    line: int


def blocks(page):
    """Find the blocks of a page that run, each with what it prints."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    result = []
    for i, match in enumerate(found):
        if match[1] == "text":
            continue
        after = found[i + 1] if i + 1 < len(found) else None
        follows = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        line = text.count("\n", 0, match.start()) + 2
        result.append(Block(match[1], match[2], after[2] if follows else None, line))
    return result


def run_command(command, monkeypatch):
    """Run one command line in this process, as the terminal would."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the code word?\n/quit\n"))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code, command


def run(page, monkeypatch):
    """Run a page and yield each block with what it printed."""
    model, tokenizer = default_model()

    def fetched(original, value):
        return lambda name, **options: original(name, **options) if Path(name).is_dir() else value

    for kind, value in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        monkeypatch.setattr(kind, "from_pretrained", fetched(kind.from_pretrained, value))
    names = {"__name__": page}
    for block in blocks(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if block.kind == "python":
                exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
            else:
                for command in block.code.splitlines():
                    run_command(command, monkeypatch)
        yield block, out.getvalue()


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES)
def test_pages_print_what_they_show(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, printed in run(page, monkeypatch):
        if block.printed is not None:
            assert printed.strip() == block.printed.strip(), f"{page}:{block.line}"
        elif block.kind == "python":
            assert not printed.strip(), f"{page}:{block.line} prints, and the page does not show it"


def test_every_block_that_prints_shows_it():
    """So that a page cannot quietly lose its answers."""
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "python" and "print(" in block.code:
                assert block.printed, f"{page}:{block.line}"


def test_facts_of_the_examples_are_compressed():
    """A fact in the first or last 32 tokens would be exact with every method, and prove nothing."""
    _, tokenizer = default_model()
    for page in PAGES:
        code = "\n".join(block.code for block in blocks(page) if block.kind == "python")
        facts = re.findall(r'"(The (?:code word|captain)[^"?]*\.)"', code)
        if not facts:
            continue
        names = {}
        lines = re.search(r"^days = .*\n(?:facts = .*\n)?(?:text|report) = .*\n", code, flags=re.MULTILINE)
        exec(lines[0], names)
        text = names.get("text") or names["report"]
        for fact in facts:
            before, after = text.split(fact)
            assert len(tokenizer(before).input_ids) > 32 < len(tokenizer(after).input_ids), (page, fact)


def test_readme_is_short_and_begins_with_the_hub():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = blocks("README.md")[0]
    assert HUB in first.code and "SmolLM2-135M-Instruct" in first.code
    assert "4-bit" in text and "how well large models answer was not measured" in text.lower()


def test_commands_that_pages_name_exist(capsys, monkeypatch):
    run_command("wildcat-kv --help", monkeypatch)
    listed = set(re.findall(r"[a-z]+(?:-[a-z]+)*", capsys.readouterr().out))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:^|^    |`)wildcat-kv ([a-z][a-z-]*)", text, flags=re.MULTILINE)
        assert set(named) <= listed, page


def main():
    """Write what the blocks print into the pages: python -m tests.test_readme [PAGE ...]."""
    for page in sys.argv[1:] or PAGES:
        path = ROOT / page
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
            monkeypatch.chdir(folder)
            done = list(run(page, monkeypatch))
        text = path.read_text(encoding="utf-8")
        for block, printed in done:
            fenced = f"```{block.kind}\n{block.code}```\n"
            shown = f"\n```text\n{block.printed}```\n" if block.printed is not None else ""
            wanted = f"\n```text\n{printed.strip()}\n```\n" if printed.strip() and block.kind == "python" else ""
            assert text.count(fenced + shown) == 1, (page, block.line)
            text = text.replace(fenced + shown, fenced + wanted)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
