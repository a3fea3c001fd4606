"""Strategies of merging a full coreset with the tokens that expire, under `max_tokens`.

    python -m benchmarks merging --max-tokens 256 --max-tokens 1024 --output merging.json

Decoding is replayed on keys, values and queries of the default model. Every strategy stores at most `max_tokens`
entries of a layer between two tokens: the sink, its coreset, and the newest tokens. The error of a query is
|output - exact| / |exact|, with exact attention over the whole past; it is taken at every ~500th token, from
as many queries as the largest block has tokens, so that coresets that were just folded and free room that
has just filled up count alike for all of them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from wildcat_kv import Coreset, compress_kv, weighted_attention
from wildcat_kv.data.haystack import build_context
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import load_model

SINK, WINDOW, BIN_RANK = 32, 32, 12
BLOCK = 4 * BIN_RANK  # new tokens between two folds, what wildcat_kv.budget sets aside
PROMPT = 1024
CYCLE = 96  # a multiple of every block: after it, all strategies have just folded
CYCLES_A_CHECKPOINT = 5
BASELINE = "all_at_once"


@dataclass(frozen=True)
class Layer:
    """One layer's view of one text: keys and values (kv_heads, n, d), rotated queries (heads, n, d)."""

    keys: Tensor
    values: Tensor
    queries: Tensor

    def tokens(self, start: int, stop: int) -> Coreset:
        """Take exact tokens as entries of weight 1."""
        keys, values = self.keys[:, start:stop], self.values[:, start:stop]
        ones = torch.ones(keys.shape[:-1])
        return Coreset(keys, values, ones, ones > 0)


class AllAtOnce:
    """Bins and compresses slots and expired tokens together at every fold, as the cache does.

    `full_bins` leaves out the slots that do not fill a bin. With them some bins, the newest, have a rank below
    BIN_RANK, so that at a large budget the newest slots lose one of theirs at every fold.
    """

    def __init__(self, max_tokens: int, block: int, seed: int, full_bins: bool = False) -> None:
        self.block = block
        self.slots = max_tokens + 1 - block - SINK - WINDOW
        if full_bins:
            self.slots -= self.slots % BIN_RANK
        self._generator = torch.Generator().manual_seed(seed)

    def start(self, prompt: Coreset) -> None:
        """Compress the prompt's tokens between sink and window."""
        self.coreset = self._compress(prompt, self.slots)

    def fold(self, expired: Coreset) -> None:
        """Make room for a block of new tokens."""
        self.coreset = self._compress(join([self.coreset, expired]), self.slots)

    def _compress(self, entries: Coreset, rank: int) -> Coreset:
        """Compress entries (..., n) into `rank` slots, in bins of at most BIN_RANK slots."""
        *batch, n = entries.weights.shape
        noise = -torch.empty(*batch, BIN_RANK, n).exponential_(generator=self._generator).log()
        return compress_kv(
            entries.keys,
            entries.values,
            weights=entries.weights,
            valid=entries.valid,
            rank=rank,
            bins=-(-rank // BIN_RANK),
            noise=noise,
        )


class OneMerge(AllAtOnce):
    """Makes expired tokens a bin of their own, and merges one adjacent pair of older bins."""

    def __init__(self, max_tokens: int, pick: Callable[[Sequence[int], int], int], seed: int) -> None:
        super().__init__(max_tokens, BLOCK, seed, full_bins=True)
        self._pick = pick
        self._levels = [0] * (self.slots // BIN_RANK)
        self._last = -1

    def fold(self, expired: Coreset) -> None:
        """Merge the pair that `pick` names, and append the new bin."""
        pair = self._last = self._pick(self._levels, self._last)
        first, stop = pair * BIN_RANK, (pair + 2) * BIN_RANK
        # Both bins in one call, whose cost is its sequential steps: the pair is padded to the tokens' number.
        items = stack(pad(cut(self.coreset, first, stop), BLOCK), expired)
        merged = self._compress(items, BIN_RANK)
        before, after = cut(self.coreset, 0, first), cut(self.coreset, stop, self.slots)
        self.coreset = join([before, unstack(merged, 0), after, unstack(merged, 1)])
        level = 1 + max(self._levels[pair : pair + 2])
        self._levels = [*self._levels[:pair], level, *self._levels[pair + 2 :], 0]


def next_pair(levels: Sequence[int], last: int) -> int:
    """Pick the pair after the last one, from the oldest to the newest and round again."""
    return (last + 1) % (len(levels) - 1)


def tree_pair(levels: Sequence[int], last: int) -> int:
    """Pick the oldest pair of equal level; without one, the pair with the lowest sum of levels."""
    pairs = range(len(levels) - 1)
    equal = [pair for pair in pairs if levels[pair] == levels[pair + 1]]
    return equal[0] if equal else min(pairs, key=lambda pair: levels[pair] + levels[pair + 1])


def join(parts: Sequence[Coreset]) -> Coreset:
    """Put entries (heads, n) side by side."""
    return Coreset(
        torch.cat([part.keys for part in parts], dim=-2),
        torch.cat([part.values for part in parts], dim=-2),
        torch.cat([part.weights for part in parts], dim=-1),
        torch.cat([part.valid for part in parts], dim=-1),
    )


def cut(entries: Coreset, start: int, stop: int) -> Coreset:
    """Take entries [start, stop) of (heads, n), as views."""
    return Coreset(
        entries.keys[:, start:stop],
        entries.values[:, start:stop],
        entries.weights[:, start:stop],
        entries.valid[:, start:stop],
    )


def pad(entries: Coreset, length: int) -> Coreset:
    """Pad entries (heads, n) with invalid ones, to (heads, length)."""
    heads, n, d = entries.keys.shape
    empty = torch.zeros(heads, length - n, d)
    return join([entries, Coreset(empty, empty, empty[..., 0], empty[..., 0] > 0)])


def stack(first: Coreset, second: Coreset) -> Coreset:
    """Stack two sets of entries (heads, n) into one batch (2, heads, n)."""
    return Coreset(
        torch.stack((first.keys, second.keys)),
        torch.stack((first.values, second.values)),
        torch.stack((first.weights, second.weights)),
        torch.stack((first.valid, second.valid)),
    )


def unstack(entries: Coreset, index: int) -> Coreset:
    """Take one set (heads, n) of a batch (2, heads, n)."""
    return Coreset(entries.keys[index], entries.values[index], entries.weights[index], entries.valid[index])


def make_strategies(max_tokens: int, seed: int) -> dict[str, AllAtOnce]:
    """Make every strategy that keeps a coreset, by name; all draw from the same seed."""
    return {
        BASELINE: AllAtOnce(max_tokens, BLOCK, seed),
        "pairs": OneMerge(max_tokens, next_pair, seed),
        "tree": OneMerge(max_tokens, tree_pair, seed),
        "all_at_once, block 12": AllAtOnce(max_tokens, 12, seed),
        "all_at_once, block 24": AllAtOnce(max_tokens, 24, seed),
        "all_at_once, block 96": AllAtOnce(max_tokens, 96, seed),
        "full bins (the cache)": AllAtOnce(max_tokens, BLOCK, seed, full_bins=True),
        "full bins, block 24": AllAtOnce(max_tokens, 24, seed, full_bins=True),
        "full bins, block 96": AllAtOnce(max_tokens, 96, seed, full_bins=True),
    }


@torch.no_grad()
def read_text(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, Layer]:
    """Read a text exactly: keys, values and rotated queries of `layers`."""
    queries: dict[int, Tensor] = {}

    def record(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx in layers:
            queries[module.layer_idx] = query[0]
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("record_queries", record)
    AttentionMaskInterface.register("record_queries", sdpa_mask)
    before, model.config._attn_implementation = model.config._attn_implementation, "record_queries"
    cache = DynamicCache(config=model.config)
    try:
        model(ids, **{CACHE: cache}, logits_to_keep=1)
    finally:
        model.config._attn_implementation = before
    return {
        index: Layer(cache.layers[index].keys[0].clone(), cache.layers[index].values[0].clone(), queries[index])
        for index in layers
    }


def masked_attention(layer: Layer, start: int, stop: int, newest: int | None = None) -> Tensor:
    """Attend with queries [start, stop) to the past and themselves, or to its sink and `newest` alone.

    Returns:
        (heads, stop - start, d).
    """
    query, key = torch.arange(start, stop).unsqueeze(-1), torch.arange(stop)
    seen = key <= query
    if newest is not None:
        seen &= (key < SINK) | (key > query - newest)
    return scaled_dot_product_attention(
        layer.queries[None, :, start:stop],
        layer.keys[None, :, :stop],
        layer.values[None, :, :stop],
        attn_mask=seen,
        enable_gqa=True,
    )[0]


def compressed_attention(layer: Layer, coreset: Coreset, start: int, stop: int) -> Tensor:
    """Attend with queries [start, stop) to sink, coreset, window and themselves: (heads, stop - start, d)."""
    entries = join([layer.tokens(0, SINK), coreset, layer.tokens(start - WINDOW, stop)])
    seen = layer.values[:, :stop]
    return weighted_attention(
        layer.queries[:, start:stop],
        entries.keys,
        entries.values,
        entries.weights,
        valid=entries.valid,
        causal=True,
        value_range=(seen.amin(-2, keepdim=True), seen.amax(-2, keepdim=True)),
    )


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Compute |output - exact| / |exact|, averaged over heads and queries."""
    return float(((output - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


@dataclass
class Replay:
    """One strategy on one layer of one text: an error a checkpoint, seconds a fold."""

    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def replay(layer: Layer, max_tokens: int, seed: int) -> dict[str, Replay]:
    """Decode with every strategy in turns, a cycle at a time."""
    strategies = make_strategies(max_tokens, seed)
    replays = {name: Replay() for name in (*strategies, "drop_oldest")}
    for strategy in strategies.values():
        strategy.start(layer.tokens(SINK, PROMPT - WINDOW))
        assert SINK + strategy.coreset.keys.shape[-2] + WINDOW + strategy.block - 1 <= max_tokens
    for cycle, start in enumerate(range(PROMPT, layer.keys.shape[-2] - CYCLE + 1, CYCLE)):
        stop = start + CYCLE
        check = cycle > 0 and cycle % CYCLES_A_CHECKPOINT == 0
        exact = masked_attention(layer, start, stop) if check else None
        for name, strategy in strategies.items():
            outputs = []
            for first in range(start, stop, strategy.block):
                last = first + strategy.block
                if check:
                    outputs.append(compressed_attention(layer, strategy.coreset, first, last))
                expired = layer.tokens(first - WINDOW, last - WINDOW)
                clock = time.perf_counter()
                strategy.fold(expired)
                replays[name].seconds.append(time.perf_counter() - clock)
            if exact is not None:
                replays[name].errors.append(relative_error(torch.cat(outputs, dim=-2), exact))
        if exact is not None:  # between two tokens it stores max_tokens; the query's own comes on top, as with all
            floor = masked_attention(layer, start, stop, newest=max_tokens + 1 - SINK)
            replays["drop_oldest"].errors.append(relative_error(floor, exact))
    return replays


def average(replays: Sequence[dict[str, Replay]]) -> dict[str, Replay]:
    """Merge replays that differ in their draws alone: of one text and layer, they are no further evidence."""
    return {
        name: Replay(
            [statistics.fmean(column) for column in zip(*(each[name].errors for each in replays), strict=True)],
            [statistics.median(column) for column in zip(*(each[name].seconds for each in replays), strict=True)],
        )
        for name in replays[0]
    }


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Compute the mean and its 95 % bootstrap interval."""
    mean = statistics.fmean(differences)
    if len(set(differences)) < 2:
        return mean, mean, mean
    limits = bootstrap((differences,), statistics_mean, method="percentile", rng=0).confidence_interval
    return mean, float(limits.low), float(limits.high)


def statistics_mean(sample: Any, axis: int = -1) -> Any:
    """Compute the mean along an axis, as scipy wants it."""
    return sample.mean(axis=axis)


def summarise(max_tokens: int, cells: Sequence[dict[str, Replay]]) -> list[dict[str, Any]]:
    """Make a row a strategy, from its replays on every layer of every text."""
    rows = []
    for name in cells[0]:
        errors = [cell[name].errors for cell in cells]
        base = [cell[BASELINE].errors for cell in cells]
        last = [ours[-1] - theirs[-1] for ours, theirs in zip(errors, base, strict=True)]
        overall = [statistics.fmean(ours) - statistics.fmean(theirs) for ours, theirs in zip(errors, base, strict=True)]
        # The errors of layers differ by a factor of ten; in logarithms the worst does not drown the others.
        ratios = interval(
            [
                statistics.fmean(map(math.log, ours)) - statistics.fmean(map(math.log, theirs))
                for ours, theirs in zip(errors, base, strict=True)
            ]
        )
        # A block of b tokens is folded 48 / b times while the baseline folds once.
        seconds = [second for cell in cells for second in cell[name].seconds]
        folds = len(seconds) / len(cells[0][BASELINE].seconds) / len(cells)
        rows.append(
            {
                "max_tokens": max_tokens,
                "strategy": name,
                "error": [statistics.fmean(column) for column in zip(*errors, strict=True)],
                "last_minus_baseline": interval(last),
                "mean_minus_baseline": interval(overall),
                "ratio_to_baseline": tuple(map(math.exp, ratios)),
                "better_cells": sum(difference < 0 for difference in overall),
                "cells": errors,
                "seconds": statistics.median(seconds) * folds if seconds else 0.0,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]], title: str, cells: int) -> None:
    """Print errors at three checkpoints and over all, paired with the baseline's; seconds of folding."""
    table = Table(title=title)
    for column in (
        "max_tokens",
        "strategy",
        "first",
        "middle",
        "last",
        "all",
        "all - baseline [95 %]",
        "last - baseline [95 %]",
        "all / baseline [95 %]",
        f"better of {cells}",
        f"s / {BLOCK} tokens",
    ):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    for row in rows:
        error, other = row["error"], row["strategy"] != BASELINE
        table.add_row(
            str(row["max_tokens"]),
            row["strategy"],
            *(f"{error[index]:.4f}" for index in (0, len(error) // 2, -1)),
            f"{statistics.fmean(error):.4f}",
            *(signed(row[key]) if other else "" for key in ("mean_minus_baseline", "last_minus_baseline")),
            bracketed(row["ratio_to_baseline"]) if other else "",
            str(row["better_cells"]) if other else "",
            f"{row['seconds']:.4f}" if row["seconds"] else "",
            end_section=row["strategy"] == "drop_oldest",
        )
    Console(width=190).print(table)


def signed(figures: tuple[float, float, float]) -> str:
    """Write a difference with its interval."""
    mean, low, high = figures
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def bracketed(figures: tuple[float, float, float]) -> str:
    """Write a ratio with its interval."""
    mean, low, high = figures
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def spread_out(count: int, total: int) -> list[int]:
    """Choose `count` layers of `total`, from the first to the last."""
    return sorted({round(index * (total - 1) / max(1, count - 1)) for index in range(min(count, total))})


def main(
    max_tokens: Annotated[list[int] | None, typer.Option(help="entries a layer may store, repeatable")] = None,
    tokens: Annotated[int, typer.Option(help="length of a text")] = 5000,
    texts: Annotated[int, typer.Option(min=1, help="texts")] = 2,
    layers: Annotated[int, typer.Option(min=1, help="layers, from the first to the last")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="replays of each layer and text, with other draws")] = 1,
    output: Annotated[Path | None, typer.Option(help="also write the rows as JSON")] = None,
) -> None:
    """Compare ways to merge a full coreset with expired tokens, by error and by time."""
    if tokens < PROMPT + (CYCLES_A_CHECKPOINT + 1) * CYCLE:
        raise typer.BadParameter(f"--tokens {tokens} ends before the first checkpoint; give 2000 or more")
    budgets = max_tokens or [256, 1024]
    if min(budgets) < SINK + WINDOW + CYCLE + 2 * BIN_RANK or max(budgets) > PROMPT:
        raise typer.BadParameter(f"--max-tokens must lie in [{SINK + WINDOW + CYCLE + 2 * BIN_RANK}, {PROMPT}]")
    torch.set_num_threads(1)  # folds of one layer are too small to share out, and a busy machine is noisier
    model, tokenizer = load_model(None)
    chosen = spread_out(layers, model.config.num_hidden_layers)
    cells: dict[int, list[dict[str, Replay]]] = {budget: [] for budget in budgets}
    for text in track(range(texts), description="texts", console=Console(stderr=True)):
        context = build_context(tokenizer, tokens, [], seed=text)
        ids = tokenizer(context, return_tensors="pt", add_special_tokens=False).input_ids
        for index, layer in read_text(model, ids, chosen).items():
            first = (text * 1000 + index) * 1000
            for budget in budgets:
                cells[budget].append(average([replay(layer, budget, first + seed) for seed in range(seeds)]))
    rows = [row for budget in budgets for row in summarise(budget, cells[budget])]
    title = (
        f"Relative error of attention, {texts} texts of {tokens} tokens, layers {', '.join(map(str, chosen))}, "
        f"{seeds} seed(s), prompt {PROMPT}, sink {SINK}, window {WINDOW}, bin_rank {BIN_RANK}"
    )
    print_table(rows, title, len(cells[budgets[0]]))
    if output is not None:
        output.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
