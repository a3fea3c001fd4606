"""What compressing costs while a prompt is read, as a share of reading it.

    python -m benchmarks.prefill --tokens 4096 --runs 5

Exact and compressed prefills take turns on the same prompt. The share is the time inside the folds over the
rest of the same prefill; the ratio of the whole times is printed beside it, with what noise there is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv import WildCatCache, WildCatConfig
from wildcat_kv.cache import WildCatLayer
from wildcat_kv.haystack import build_context
from wildcat_kv.models import load_model


class FoldClock:
    """Adds up the seconds that layers spend folding, while it is entered."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __enter__(self) -> FoldClock:
        """Put the clock around every fold."""
        self._fold = WildCatLayer.after_attention

        def timed(layer: WildCatLayer, query: torch.Tensor, scale: float) -> None:
            start = now(self._device)
            self._fold(layer, query, scale)
            self.seconds += now(self._device) - start

        setattr(WildCatLayer, "after_attention", timed)  # noqa: B010
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        setattr(WildCatLayer, "after_attention", self._fold)  # noqa: B010


def now(device: torch.device) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def prefill_seconds(model: Any, ids: torch.Tensor, cache: Cache) -> float:
    """Seconds to read `ids` (1, n) into an empty cache."""
    start = now(model.device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return now(model.device) - start


def measure(model: Any, ids: torch.Tensor, settings: WildCatConfig, runs: int) -> list[tuple[float, float, float]]:
    """Seconds of the exact prefill, of the compressed one, and of the folds in it, `runs` times in turn."""
    figures = []
    for run in track(range(runs + 1), description="prefill", console=Console(stderr=True)):
        clock = FoldClock(model.device)
        with clock:
            exact = prefill_seconds(model, ids, DynamicCache(config=model.config))
            ours = prefill_seconds(model, ids, WildCatCache(model.config, settings))
        if run:  # the first one warms up
            figures.append((exact, ours, clock.seconds))
    return figures


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median, and the smallest and largest in brackets."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="prompt length, repeatable")] = None,
    runs: Annotated[int, typer.Option(min=1, help="turns to count")] = 5,
    ratio: Annotated[float, typer.Option(help="share of the tokens to keep")] = 0.25,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    model: Annotated[
        str | None, typer.Option(help="hub id, folder or GGUF file; the default model if left out")
    ] = None,
) -> None:
    """Print compression time as a share of prefill time."""
    loaded, tokenizer = load_model(model, getattr(torch, dtype), "cuda" if torch.cuda.is_available() else None)
    settings = WildCatConfig(ratio=ratio)
    table = Table(title=f"Prefill, {dtype}, {ratio:.0%} kept, {runs} runs: median (least to most)")
    for column in ("tokens", "exact, s", "WildCat, s", "WildCat / exact", "folding, s", "folding / rest"):
        table.add_column(column, justify="right")
    for count in tokens or [4096]:
        text = build_context(tokenizer, count, [], seed=0)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(loaded.device)
        exact, ours, folding = zip(*measure(loaded, ids, settings, runs), strict=True)
        table.add_row(
            str(ids.shape[1]),
            spread(exact),
            spread(ours),
            spread([b / a for a, b in zip(exact, ours, strict=True)]),
            spread(folding),
            spread([100 * fold / (all_ - fold) for all_, fold in zip(ours, folding, strict=True)], " %"),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
