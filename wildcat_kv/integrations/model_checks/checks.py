"""The checks, each a function of the subject that raises where something is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache

from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.compressors import resolve
from wildcat_kv.compressors.registry import OURS
from wildcat_kv.config import WildCatConfig
from wildcat_kv.hook.keyword import returned_cache
from wildcat_kv.integrations.enable import enable
from wildcat_kv.integrations.model_checks.compare import (
    FailedError,
    NotApplicableError,
    baseline,
    check_bits,
    check_tokens,
)
from wildcat_kv.integrations.model_checks.subject import NEW, RATIO, TOKENS, Subject
from wildcat_kv.models.rope import rotations_of
from wildcat_kv.models.support import cache_layers, decoder_config


def check_built(subject: Subject) -> None:
    """Build a cache; if that fails, the other checks cannot be run."""
    try:
        subject.cache()
    except (TypeError, ValueError) as error:
        raise FailedError(str(error)) from None


def _exact_prefill(subject: Subject) -> None:
    expected = baseline(lambda: subject.logits(subject.exact(), subject.row))
    check_bits(subject.logits(subject.cache(1.0), subject.row), expected)


def _exact_chunks(subject: Subject) -> str:
    def chunks(cache: Cache) -> Tensor:
        edges = [0, 37, 38, 90, subject.row.shape[1]]
        return torch.cat([subject.logits(cache, subject.row[:, a:b], seen=a) for a, b in pairwise(edges)], dim=1)

    expected = baseline(lambda: chunks(subject.exact()))
    check_bits(chunks(subject.cache(1.0)), expected)
    return "with position_ids, which this model does not count past a cache" if subject.told else ""


def _exact_decoding(subject: Subject) -> None:
    expected = baseline(lambda: subject.generate(subject.exact()))
    found = subject.generate(subject.cache(1.0))
    check_bits(torch.stack(found.logits), torch.stack(expected.logits))


def _unit_weights(subject: Subject) -> None:
    def later(cache: Cache, weighted: bool) -> Tensor:
        subject.logits(cache, subject.row[:, :60])
        if weighted:
            # Keep what was read as it is, with weights of one: only the path is the weighted one.
            cache._pass_state.compressed = True
        collected, seen = [], 60
        for new in (subject.row[:, 60:66], *subject.row[:, 66:69].split(1, dim=1)):
            collected.append(subject.logits(cache, new, seen=seen))
            seen += new.shape[1]
        return torch.cat(collected, dim=1)

    decoder_config(subject.model.config)._attn_implementation = "eager"
    expected = baseline(lambda: later(subject.exact(), False))
    subject.check_close(later(WildCatCache(subject.model.config, max_tokens=4 * TOKENS), True), expected)


def _padded_row(subject: Subject) -> None:
    padding = subject.ids.shape[1] // 3
    mask = torch.ones_like(subject.ids)
    mask[0, :padding] = 0

    def together(cache: Cache) -> Tensor:
        return _forced(subject, cache, subject.ids, mask)[:1]

    def alone(cache: Cache) -> Tensor:
        ids = subject.ids[:1, padding:]
        return _forced(subject, cache, ids, torch.ones_like(ids))

    if not subject.is_close(*baseline(lambda: (together(subject.exact()), alone(subject.exact())))):
        raise NotApplicableError("this model answers a padded row otherwise than the row alone with DynamicCache too")
    subject.check_close(together(subject.cache()), alone(subject.cache()))


def _within_budget(subject: Subject) -> str:
    new = 2 * NEW
    cache = subject.cache()
    out = subject.generate(cache, max_new_tokens=new)
    if returned_cache(out) is not cache:
        raise FailedError("generate() went on with a cache of its own")
    if not all(bool(torch.isfinite(logits).any()) for logits in out.logits):
        raise FailedError("logits are not finite")
    seen = cache.get_seq_length()
    if seen < out.sequences.shape[1] - 1:
        raise FailedError(f"the cache has seen {seen} of {out.sequences.shape[1] - 1} tokens")
    least, most = kept_tokens(seen, RATIO), kept_tokens(seen, RATIO) + block_size(cache.settings)
    layers = [index for index, layer in enumerate(cache.layers) if isinstance(layer, WildCatLayer)]
    for index in layers:
        if not least <= (stored := cache.stored_length(index)) <= most:
            raise FailedError(f"layer {index} stores {stored} of {seen} tokens, not between {least} and {most}")
    return f"{len(layers)} of {len(cache.layers)} layers compressed"


def _beams(subject: Subject) -> None:
    def search(cache: Cache) -> Tensor:
        return subject.generate(cache, subject.text(60), num_beams=2).sequences

    expected = baseline(lambda: search(subject.exact()))
    check_tokens(search(subject.cache(1.0)), expected)
    if search(subject.cache()).shape != expected.shape:
        raise FailedError("beams beyond the budget end early")


def _prompt_lookup(subject: Subject) -> None:
    ids = subject.ids[:1, :25].repeat(1, 4)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def lookup(cache: Cache) -> Tensor:
        return subject.generate(cache, prompt, prompt_lookup_num_tokens=3, max_new_tokens=2 * NEW).sequences

    expected = baseline(lambda: lookup(subject.exact()))
    check_tokens(lookup(subject.cache(1.0)), expected)


def _saved(subject: Subject) -> None:
    cache = subject.cache()
    subject.logits(cache, subject.row[:, :-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = WildCatCache.load(path, subject.model.config, device=subject.ids.device).clone()
    seen, last = subject.row.shape[1] - 1, subject.row[:, -1:]
    subject.check_close(subject.logits(loaded, last, seen=seen), subject.logits(cache, last, seen=seen))


def _rollback(subject: Subject) -> None:
    seen = subject.row.shape[1] - 6
    first, wrong, right = subject.row[:, :seen], subject.row[:, -5:-2], subject.row[:, -2:]

    def undone(cache: Cache) -> Tensor:
        subject.logits(cache, first)
        cache.activate_past_recording()
        subject.logits(cache, wrong, seen=seen)
        try:
            cache.crop(-wrong.shape[1])
        except ValueError as error:
            raise NotApplicableError(str(error)) from None
        return subject.logits(cache, right, seen=seen)

    def never(cache: Cache) -> Tensor:
        subject.logits(cache, first)
        return subject.logits(cache, right, seen=seen)

    if not subject.is_close(*baseline(lambda: (undone(subject.exact()), never(subject.exact())))):
        raise NotApplicableError("tokens taken back from DynamicCache leave traces too")
    subject.check_close(undone(subject.cache()), never(subject.cache()))


def _enabled(subject: Subject) -> None:
    settings = WildCatConfig(ratio=RATIO)
    expected = subject.generate(WildCatCache(subject.model.config, settings)).sequences
    try:
        handle = enable(subject.model, settings)
    except ValueError as error:
        raise NotApplicableError(str(error)) from None
    with handle:
        found = subject.generate(None).sequences
    check_tokens(found, expected)


def _smaller(subject: Subject) -> str:
    exact, cache = subject.exact(), subject.cache()
    baseline(lambda: subject.logits(exact, subject.row))
    subject.logits(cache, subject.row)
    ours, theirs = cache_bytes(cache), cache_bytes(exact)
    if ours >= theirs:
        raise FailedError(f"{ours:,} bytes at ratio {RATIO}, {theirs:,} with DynamicCache")
    return f"{ours / theirs:.0%} of DynamicCache's bytes at {subject.row.shape[1]} tokens"


def _rotations(subject: Subject) -> None:
    decoder = decoder_config(subject.model.config)
    try:
        rotations_of(decoder, cache_layers(decoder)[1])
    except ValueError as error:
        raise NotApplicableError(f"{error}; methods that need none: {', '.join(_without_positions())}") from None


def _forced(subject: Subject, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the logits of a prompt's last token and of given ones after it."""
    tokens, collected, seen = subject.ids[:, :6], [], 0
    for step in range(tokens.shape[1] + 1):
        collected.append(subject.logits(cache, ids, mask, seen)[:, -1:])
        seen, ids = mask.shape[1], tokens[: len(mask), step : step + 1]
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return torch.cat(collected, dim=1)


def _without_positions() -> list[str]:
    """List the methods that need no rotary positions."""
    settings, fit = WildCatConfig(ratio=RATIO), []
    for name in OURS:
        with suppress(ValueError):  # some read a context by themselves
            if not resolve(name, settings).needs_rotation:
                fit.append(name)
    return fit


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "a cache can be built": check_built,
    "reading a prompt is exact at ratio 1": _exact_prefill,
    "reading in chunks is exact at ratio 1": _exact_chunks,
    "generate() is exact at ratio 1": _exact_decoding,
    "weights of one change nothing": _unit_weights,
    "generate() stays within its budget": _within_budget,
    "a padded row answers as the row alone": _padded_row,
    "beams are exact at ratio 1": _beams,
    "prompt lookup is exact at ratio 1": _prompt_lookup,
    "a saved cache goes on as before": _saved,
    "tokens taken back leave no trace": _rollback,
    "enable() answers as the explicit cache": _enabled,
    "the cache is smaller": _smaller,
    "rotary positions are understood": _rotations,
}
