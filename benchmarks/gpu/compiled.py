"""Decoding by a compiled step: Transformers' static cache, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.gpu.decoding import Setting, decode, random_cache
from benchmarks.gpu.graphed import graphed
from benchmarks.gpu.lab import Lab, noting_error
from wildcat_kv import WildCatCache, compile_decoding
from wildcat_kv.cache.budget import kept_tokens
from wildcat_kv.hook.keyword import CACHE

STATIC, OURS = "StaticCache, compiled", "wildcat, compiled"
_ROOM = 256


def compiled(lab: Lab, setting: Setting, inductor: bool) -> Iterator[dict[str, Any]]:
    """Decode with one CUDA graph a token: of the step as it is, or of the kernels that inductor generates for it."""
    if lab.device.type == "cpu":
        options: dict[str, Any] = {"backend": "eager"}
        told = "eager"
    elif inductor:
        options, told = {"mode": "reduce-overhead"}, "inductor"
    else:
        options, told = {"backend": graphed}, "CUDA graph"
    model = lab.model(setting.shape)
    for name, make in ((OURS, _ours), (STATIC, _theirs)):
        torch._dynamo.reset()

        def work(name: str = name, make: Callable[..., Any] = make) -> dict[str, Any]:
            cache, step = make(lab, setting, model, options)
            return decode(lab, setting, cache, step, folds=name == OURS)

        yield noting_error({"cache": f"{name} ({told})"}, work)
        lab.sweep()


@torch.no_grad()
def _ours(lab: Lab, setting: Setting, model: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    most = kept_tokens(setting.tokens, setting.kept)
    cache = WildCatCache(model.config, compressor="wildcat", max_tokens=most, sink=4, static=True)
    model(lab.ids(setting.shape, setting.tokens), **{CACHE: cache}, logits_to_keep=1)
    cache.batch_repeat_interleave(setting.rows)
    return cache, compile_decoding(model, cache, **options)


def _theirs(lab: Lab, setting: Setting, model: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    room = setting.tokens + _ROOM
    cache = random_cache(lab, setting, StaticCache(config=model.config, max_cache_len=room))
    call = torch.compile(model.forward, **{"dynamic": False, **options})
    return cache, lambda ids: call(input_ids=ids, **{CACHE: cache}).logits.clone()
