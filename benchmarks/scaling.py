"""Growth of compression with the tokens and with the rank, on synthetic heads, and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.options import Options
from benchmarks.records import Label, Record
from benchmarks.turns import Stopwatch, take_turns
from wildcat_kv import WildCatConfig, compress_kv, weighted_attention
from wildcat_kv.cache.budget import kept_tokens
from wildcat_kv.compressors import KVBlock, WildCat

HEADS, DIM = 8, 128
TOKENS = tuple(2**power for power in range(11, 17))
RANKED_TOKENS = 4096  # at which the rank is varied
RANKS = (12, 24, 48, 96, 192, 384)

ERROR_TOKENS = (1024, 2048, 4096, 8192)
ERROR_RANKS = (8, 16, 32, 64, 128, 256)
ERROR_SEEDS = 5
ERROR_DIM, ERROR_QUERIES = 64, 256


def measure(options: Options) -> Iterator[Record]:
    """Time a fold by tokens and by rank, in every dtype; measure the error of attention, in float32."""
    lengths = options.lengths(*TOKENS)
    for dtype in options.dtypes:
        by_length = {n: _fold(n, dtype, options.settings, options.device) for n in lengths}
        for n, quantities in take_turns(by_length, options.turns, title=f"scaling, {dtype}, tokens").items():
            yield _seconds("fold_seconds", quantities, {"dtype": dtype, "tokens": n})
        n = min(RANKED_TOKENS, max(lengths))
        budget = _budget(n, options.settings)
        ranks = [rank for rank in RANKS if rank < budget] + [budget]  # the last is one bin
        by_rank = {
            rank: _fold(n, dtype, options.settings.model_copy(update={"bin_rank": rank}), options.device)
            for rank in ranks
        }
        for rank, quantities in take_turns(by_rank, options.turns, title=f"scaling, {dtype}, rank").items():
            yield _seconds("fold_seconds_by_rank", quantities, {"dtype": dtype, "tokens": n, "rank": rank})
    for n in [n for n in ERROR_TOKENS if n <= max(lengths)] or [max(lengths)]:
        for rank in ERROR_RANKS:
            errors = tuple(_error(n, rank, seed, options.device) for seed in range(ERROR_SEEDS))
            yield Record(quantity="relative_error", unit="1", labels={"tokens": n, "rank": rank}, samples=errors)


def _fold(n: int, dtype: str, settings: WildCatConfig, device: str) -> Callable[[], dict[str, float]]:
    """Make a function that folds one layer as a prefill does, `n` tokens of HEADS random heads."""
    generator = torch.Generator().manual_seed(n)
    keys, values = (torch.randn(1, HEADS, n, DIM, generator=generator) for _ in range(2))
    block = KVBlock(
        keys=(1.5 * keys).to(device, getattr(torch, dtype)),
        values=values.to(device, getattr(torch, dtype)),
        valid=torch.ones(1, HEADS, n, dtype=torch.bool, device=device),
        items=n - settings.sink - settings.window,
        window=settings.window,
        exact=n,
        seen=n,
        scale=DIM**-0.5,
        layer_index=0,
        sharing=range(1),
        value_bound=torch.ones(1, HEADS, device=device),
    )
    method, budget = WildCat.of(settings), _budget(n, settings)

    @torch.no_grad()
    def run() -> dict[str, float]:
        with Stopwatch(block.keys.device) as watch:
            method.compress(block, budget)
        return {"seconds": watch.seconds}

    return run


def _budget(n: int, settings: WildCatConfig) -> int:
    """Count the slots for the items of `n` tokens."""
    assert settings.share is not None
    return max(1, kept_tokens(n, settings.share) - settings.sink - settings.window)


def _seconds(quantity: str, quantities: dict[str, list[float]], labels: dict[str, Label]) -> Record:
    return Record(quantity=quantity, unit="s", labels=labels, samples=tuple(quantities["seconds"]))


@torch.no_grad()
def _error(n: int, rank: int, seed: int, device: str) -> float:
    """Compute |output - exact| / |exact| over all queries: one bin of `rank` slots for `n` smooth points."""
    queries, keys, values = (part.to(device) for part in _smooth(n, seed))
    noise = -torch.empty(1, rank, n).exponential_(generator=torch.Generator().manual_seed(seed)).log()
    coreset = compress_kv(keys, values, rank=rank, noise=noise.to(device))
    output = weighted_attention(
        queries,
        coreset.keys,
        coreset.values,
        coreset.weights,
        valid=coreset.valid,
        value_range=(values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)),  # as the cache clips
    )
    exact = weighted_attention(queries, keys, values)
    return float((output - exact).norm() / exact.norm())


def _smooth(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys, values (1, n, d): smooth functions of places on a square, the same for every n."""
    functions, places = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    of_keys, of_values = (torch.randn(2, ERROR_DIM, generator=functions) for _ in range(2))
    square, asked = (2 * torch.rand(1, count, 2, generator=places) - 1 for count in (n, ERROR_QUERIES))
    return 2 * (asked @ of_keys).tanh(), 2 * (square @ of_keys).tanh(), (square @ of_values).sin()
