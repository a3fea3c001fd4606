"""The demo's tables, without a model: a line an answer, however long, and a line a cache."""

from rich.console import Console

from wildcat_kv.cli.demo import _FACTS, _answer, _figures, _Run


def shown(*parts):
    console = Console(width=88, no_color=True)
    with console.capture() as captured:
        for part in parts:
            console.print(part, no_wrap=True, overflow="ellipsis")
    return captured.get().splitlines()


def test_a_long_answer_is_one_line_that_keeps_its_mark_and_name():
    answers = ["The captain is Maria Lund. " + "She sails [on]. " * 9, "The captain is you."]
    first, second = shown(*(_answer(_FACTS[1], "default", 13, answer) for answer in answers))
    assert first.startswith("  ✓ default       The captain is Maria Lund. She sails [on].") and first.endswith("…")
    assert second.rstrip() == "  ✗ default       The captain is you."


def test_figures_take_a_line_a_cache():
    exact = _Run(["blue lantern", "Maria Lund", "barley"], "all tokens", 45 * 2**20, 4.4, 7.4)
    small = _Run(["blue lantern", "you", "barley"], "half of the tokens, 4 bits", 5 * 2**20, 14.5, 7.6)
    lines = shown(_figures(_FACTS, {"exact": exact, "all in 4 bits": small}))
    assert len(lines) == 3
    assert lines[2].split("  ")[0] == "all in 4 bits" and "11 %" in lines[2] and "2 of 3" in lines[2]
