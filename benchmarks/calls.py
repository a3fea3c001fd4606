"""The cost of the cache's own Python: calls and seconds of one decoded token, on a tiny model.

The interpreter's profiler counts the calls of one pass over a compressed context in which nothing folds. Models of two
depths tell apart what every layer takes and what a pass takes once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, cache_utils

import wildcat_kv
from benchmarks.caches import DYNAMIC, SAME_LENGTH, WILDCAT, fill
from benchmarks.decode import Contender
from benchmarks.options import Options
from benchmarks.records import Label, Record
from benchmarks.turns import take_turns
from wildcat_kv import Context
from wildcat_kv.cache.budget import block_size
from wildcat_kv.hook.keyword import CACHE

TOKENS = (512,)
DEPTHS = (4, 8)  # layers of the models that calls are counted in; the deeper one is timed
# The folder or file that defines the functions of a cache.
_SOURCES = {WILDCAT: str(Path(wildcat_kv.__file__).parent), DYNAMIC: str(cache_utils.__file__)}


def measure(options: Options) -> Iterator[Record]:
    """Count calls a layer and a pass, then time a token; in the first dtype, since Python does not depend on it."""
    dtype = options.dtypes[0]
    steps = options.steps or block_size(options.settings)
    for tokens in options.lengths(*TOKENS):
        labels: dict[str, Label] = {"dtype": dtype, "tokens": tokens, "steps": steps, "layers": DEPTHS[1]}
        counted = {depth: _counts(_contenders(depth, tokens, options)) for depth in DEPTHS}
        for name in (DYNAMIC, WILDCAT):
            few, many = (counted[depth][name] for depth in DEPTHS)
            layer = (many - few) / (DEPTHS[1] - DEPTHS[0])
            own = labels | {"contender": name}
            yield Record(quantity="calls_per_layer", unit="calls", labels=own, samples=(layer,))
            yield Record(quantity="calls_per_pass", unit="calls", labels=own, samples=(few - DEPTHS[0] * layer,))
        ids = _ids(1, options)
        contenders = _contenders(DEPTHS[1], tokens, options)
        runs = {name: _run(contender, ids, steps) for name, contender in contenders.items()}
        for name, quantities in take_turns(runs, options.turns, title=f"calls, {tokens} tokens").items():
            own = labels | {"contender": name}
            samples = tuple(quantities["seconds_per_step"])
            yield Record(quantity="seconds_per_step", unit="s", labels=own, samples=samples)


def count_calls(run: Callable[[], object], source: str) -> int:
    """Count the calls, while `run` runs, of Python functions defined in a file or folder."""
    count = 0

    def notice(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(source)

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def _counts(contenders: dict[str, Contender]) -> dict[str, int]:
    """Count the calls of one decoded token, by cache."""
    return {name: _count_step(contenders[name], source) for name, source in _SOURCES.items()}


@torch.no_grad()
def _count_step(contender: Contender, source: str) -> int:
    cache: Any = contender.cache()
    ids = torch.ones(1, 1, dtype=torch.int64, device=cache.layers[0].keys.device)
    contender.step(ids, cache)  # what is done once is done
    return count_calls(lambda: contender.step(ids, cache), source)


def _contenders(layers: int, tokens: int, options: Options) -> dict[str, Contender]:
    """Make contenders: the exact cache, WildCat's, and an exact one of WildCat's stored length."""
    model = _model(layers, options)
    context = Context(model, _ids(tokens, options))
    ours = context.compress(options.settings, compressor=WILDCAT)
    stored = ours.stored_length()

    def exact(length: int | None) -> Callable[[], Cache]:
        return lambda: fill(DynamicCache(config=model.config), context.exact, length=length)

    makers = {DYNAMIC: exact(None), WILDCAT: ours.clone, SAME_LENGTH: exact(stored)}
    return {
        name: Contender(make, lambda ids, cache: model(ids, **{CACHE: cache}, logits_to_keep=1).logits)
        for name, make in makers.items()
    }


def _model(layers: int, options: Options) -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=120,
        max_position_embeddings=2**16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtypes[0])).eval()


def _ids(tokens: int, options: Options) -> torch.Tensor:
    return torch.randint(1, 120, (1, tokens), generator=torch.Generator().manual_seed(0)).to(options.device)


def _run(contender: Contender, ids: torch.Tensor, steps: int) -> Callable[[], dict[str, float]]:
    return lambda: contender.decode(ids, steps)
