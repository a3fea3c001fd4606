"""Compute outputs of runs' methods by the code of the checkout that it runs in; `eval.probe` compares two of them.

It uses only what checkouts since November 2026 have: a run's description is read by the checkout's own `eval`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A sixteenth of these still holds a sink and a window of 32 tokens at most.
CONTEXT, MORE = 576, 16
# Logits of every sixteenth token of the vocabulary; all of them would be gigabytes.
STRIDE = 16
GRID = (32, 64)
TEXT = " ".join(
    f"Room {number} holds the {thing} of {owner}, and its code is {number * 7919 % 9973}."
    for number in range(1, 61)
    for thing, owner in [(("lamp", "map", "violin", "kettle")[number % 4], ("Ada", "Emil", "Noor")[number % 3])]
)

Output = Tensor | str  # an error's text where the code cannot compute it


def main(source: Path, target: Path) -> None:
    """Read the runs from a JSON file, and write outputs by run and cell."""
    import wildcat_kv

    found = Path(str(wildcat_kv.__file__)).resolve().parents[1]
    if found != Path.cwd().resolve():
        raise SystemExit(f"wildcat_kv is that of {found}, not of {Path.cwd()}")
    torch.set_num_threads(1)
    job = json.loads(source.read_text(encoding="utf-8"))
    outputs = attention_outputs if job["model"] is None else Reader(job["model"]).outputs
    with torch.no_grad():
        torch.save({run: dict(outputs(config)) for run, config in job["runs"].items()}, target)


class Reader:
    """A model that has read a fixed text, for methods that compress it.

    Args:
        folder: folder of the model.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from wildcat_kv import Context

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = self.tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            self.context = Context(self.model, ids[:, :CONTEXT])
        self.more = ids[:, CONTEXT : CONTEXT + MORE]
        self.known: dict[str, Output] = {}

    def outputs(self, config: dict[str, Any]) -> Iterator[tuple[str, Output]]:
        """Give the logits of every method at its first and last budget."""
        from eval.cells import make_cells

        settings = {"seed": config["seed"], **config["settings"]}
        for entry in config["methods"]:
            made = tried(partial(make_cells, [entry], config["ratios"], config["max_tokens"], settings))
            if isinstance(made, str):
                yield str(entry), made
                continue
            for method in dict.fromkeys(cell.method for cell in made):
                own = [cell for cell in made if cell.method == method]
                for cell in own[:1] + own[1:][-1:]:
                    yield " ".join(str(part) for part in cell.key if part is not None), self.output(cell)

    def output(self, cell: Any) -> Output:
        """Compress by a method, and give the logits of the tokens that follow."""
        fields = [field.name for field in dataclasses.fields(cell) if field.name not in ("method", "family")]
        key = json.dumps({name: getattr(cell, name) for name in fields}, sort_keys=True, default=str)
        if key not in self.known:
            self.known[key] = tried(partial(self.logits, cell))
        return self.known[key]

    def logits(self, cell: Any) -> Tensor:
        """Give a part of the logits of the tokens that follow."""
        torch.manual_seed(0)
        cache = cell.compress(self.context, self.tokenizer)
        logits: Tensor = self.model(self.more, past_key_values=cache, use_cache=True).logits
        return logits[..., ::STRIDE].float().clone()


def attention_outputs(config: dict[str, Any]) -> Iterator[tuple[str, Output]]:
    """Give the outputs of every method of attention, with the run's first seed, on fixed random tensors."""
    from eval.attention.methods import Choice

    rows, columns = GRID
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 1 + rows * columns, 64, generator=generator)

    def output(choice: Any) -> Tensor:
        torch.manual_seed(0)
        grid = GRID if "picture" in choice.settings.values() else None
        method = choice.build(key.shape[2], config["seeds"][0], grid)
        result: Tensor = method.for_layer(0)(2 * query, key, value)
        return result.clone()

    for entry in config["methods"]:
        choice = Choice(**entry)
        yield choice.name, tried(partial(output, choice))


def tried(compute: Callable[[], Any]) -> Any:
    """Compute something; an error becomes its text, so that it does not stop the other methods."""
    try:
        return compute()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split()) or "error"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
