"""Check on a given model what works with a compressed cache.

`run_checks(model)` yields one result a check. A check compares with `DynamicCache`, so what fails with that too is
"not applicable". The model is left as it was: its weights, its mode and the attention of its config.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig

from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.read_check import check_read
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.compressors import resolve
from wildcat_kv.compressors.registry import OURS
from wildcat_kv.config import WildCatConfig
from wildcat_kv.hook.keyword import CACHE, returned_cache
from wildcat_kv.integrations.enable import enable
from wildcat_kv.models.rope import rotations_of
from wildcat_kv.models.support import cache_layers, decoder_config, with_parts

Status = Literal["passed", "failed", "not applicable"]

RATIO = 0.25
_TOKENS = 160
_NEW = 8


@dataclass(frozen=True)
class Result:
    """Says how one check ended.

    Attributes:
        name: the check's name, in plain words.
        status: "passed", "failed" or "not applicable".
        reason: why it failed or does not apply; empty if it passed, except where there is something to tell.
    """

    name: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Subject:
    """Holds the model under test and what it is asked.

    Attributes:
        model: the model, in evaluation mode.
        ids: random tokens, int64 (2, n); far fewer than the model has positions for.
        prompt: keyword arguments of `generate()`, one row: the text, and pixels where an image is among them.
        tolerance: largest difference of two logits that is rounding, as a share of the largest logit.
        told: whether `forward()` has to be told the positions of tokens after others; some models count from 0 again.
    """

    model: Any
    ids: Tensor
    prompt: Mapping[str, Any]
    tolerance: float
    told: bool = False

    def cache(self, ratio: float = RATIO) -> WildCatCache:
        """Build a compressed cache for the model."""
        return WildCatCache(self.model.config, ratio=ratio)

    def exact(self) -> DynamicCache:
        """Build Transformers' own cache for the model."""
        return DynamicCache(config=self.model.config)

    def logits(self, cache: Cache, ids: Tensor, mask: Tensor | None = None, seen: int = 0) -> Tensor:
        """Read tokens into a cache.

        Args:
            cache: the cache.
            ids: int64 (rows, new).
            mask: int64 (rows, seen + new), 0 for padding; None where there is none.
            seen: the number of columns read before.

        Returns:
            Logits (rows, new, vocabulary) in float32.
        """
        options: dict[str, Any] = {CACHE: cache}
        if mask is not None:
            options["attention_mask"] = mask
            if _takes_positions(self.model):
                options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        elif self.told:
            options["position_ids"] = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(len(ids), -1)
        found = self.model(ids, **options).logits
        check_read(self.model, cache, seen + ids.shape[1])
        return found.float()

    def generate(self, cache: Cache | None, prompt: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Decode greedily, and never stop early; `options` are those of `GenerationConfig`."""
        given = {} if cache is None else {CACHE: cache}
        new = options.pop("max_new_tokens", _NEW)
        config = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        _forget_positions(self.model)
        return self.model.generate(**(self.prompt if prompt is None else prompt), **given, generation_config=config)

    @property
    def row(self) -> Tensor:
        """The first row of the random tokens, int64 (1, n)."""
        return self.ids[:1]

    def text(self, length: int) -> dict[str, Tensor]:
        """The arguments of `generate()` for the beginning of the random text."""
        ids = self.row[:, :length]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _FailedError(Exception):
    """Says what is wrong."""


class _NotApplicableError(Exception):
    """Says why a check says nothing about this model."""


def run_checks(model: Any, prompt: Mapping[str, Any] | None = None, *, seed: int = 0) -> Iterator[Result]:
    """Check what works with a compressed cache of this model.

    Args:
        model: a Transformers causal language model, or one that answers images and text.
        prompt: keyword arguments of `generate()` for one row, `input_ids` among them; by default random tokens.
        seed: the seed of the random tokens.

    Yields:
        One result a check, in the order of `names()`. No check raises. If no cache can be built, the others are
        not applicable.
    """
    with _as_it_was(model), torch.no_grad():
        subject = _subject(model, prompt, seed)
        refused = False
        for name, check in _CHECKS.items():
            if refused:
                yield Result(name, "not applicable", "no cache can be built")
                continue
            result = _run(name, check, subject)
            refused = check is _built and result.status == "failed"
            yield result


def names() -> tuple[str, ...]:
    """List the checks, in their order."""
    return tuple(_CHECKS)


def _run(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Result:
    configs = [(config, config._attn_implementation) for config in with_parts(subject.model.config)]
    _forget_positions(subject.model)
    try:
        return Result(name, "passed", check(subject) or "")
    except _NotApplicableError as error:
        return Result(name, "not applicable", str(error))
    except _FailedError as error:
        return Result(name, "failed", str(error))
    except Exception as error:  # whatever the model's code raises says that this does not work
        return _with_exact(name, subject) or Result(name, "failed", _line(error))
    finally:
        _give_back(configs)


def _with_exact(name: str, subject: Subject) -> Result | None:
    """A result for a model that cannot read these inputs with Transformers' own cache either; None if it can."""
    try:
        _baseline(lambda: subject.logits(subject.exact(), subject.row[:, :2]))
        _baseline(lambda: subject.generate(subject.exact(), max_new_tokens=2))
    except _NotApplicableError as error:
        return Result(name, "not applicable", str(error))
    return None


# The checks


def _built(subject: Subject) -> None:
    try:
        subject.cache()
    except (TypeError, ValueError) as error:
        raise _FailedError(str(error)) from None


def _exact_prefill(subject: Subject) -> None:
    expected = _baseline(lambda: subject.logits(subject.exact(), subject.row))
    _same_bits(subject.logits(subject.cache(1.0), subject.row), expected)


def _exact_chunks(subject: Subject) -> str:
    def chunks(cache: Cache) -> Tensor:
        edges = [0, 37, 38, 90, subject.row.shape[1]]
        return torch.cat([subject.logits(cache, subject.row[:, a:b], seen=a) for a, b in pairwise(edges)], dim=1)

    expected = _baseline(lambda: chunks(subject.exact()))
    _same_bits(chunks(subject.cache(1.0)), expected)
    return "with position_ids, which this model does not count past a cache" if subject.told else ""


def _exact_decoding(subject: Subject) -> None:
    expected = _baseline(lambda: subject.generate(subject.exact()))
    found = subject.generate(subject.cache(1.0))
    _same_bits(torch.stack(found.logits), torch.stack(expected.logits))


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
    expected = _baseline(lambda: later(subject.exact(), False))
    _close(subject, later(WildCatCache(subject.model.config, max_tokens=4 * _TOKENS), True), expected)


def _padded_row(subject: Subject) -> None:
    padding = subject.ids.shape[1] // 3
    mask = torch.ones_like(subject.ids)
    mask[0, :padding] = 0

    def together(cache: Cache) -> Tensor:
        return _forced(subject, cache, subject.ids, mask)[:1]

    def alone(cache: Cache) -> Tensor:
        ids = subject.ids[:1, padding:]
        return _forced(subject, cache, ids, torch.ones_like(ids))

    if not _is_close(subject, *_baseline(lambda: (together(subject.exact()), alone(subject.exact())))):
        raise _NotApplicableError("this model answers a padded row otherwise than the row alone with DynamicCache too")
    _close(subject, together(subject.cache()), alone(subject.cache()))


def _within_budget(subject: Subject) -> str:
    new = 2 * _NEW
    cache = subject.cache()
    out = subject.generate(cache, max_new_tokens=new)
    if returned_cache(out) is not cache:
        raise _FailedError("generate() went on with a cache of its own")
    if not all(bool(torch.isfinite(logits).any()) for logits in out.logits):
        raise _FailedError("logits are not finite")
    seen = cache.get_seq_length()
    if seen < out.sequences.shape[1] - 1:
        raise _FailedError(f"the cache has seen {seen} of {out.sequences.shape[1] - 1} tokens")
    least, most = kept_tokens(seen, RATIO), kept_tokens(seen, RATIO) + block_size(cache.settings)
    layers = [index for index, layer in enumerate(cache.layers) if isinstance(layer, WildCatLayer)]
    for index in layers:
        if not least <= (stored := cache.stored_length(index)) <= most:
            raise _FailedError(f"layer {index} stores {stored} of {seen} tokens, not between {least} and {most}")
    return f"{len(layers)} of {len(cache.layers)} layers compressed"


def _beams(subject: Subject) -> None:
    def search(cache: Cache) -> Tensor:
        return subject.generate(cache, subject.text(60), num_beams=2).sequences

    expected = _baseline(lambda: search(subject.exact()))
    _same_tokens(search(subject.cache(1.0)), expected)
    if search(subject.cache()).shape != expected.shape:
        raise _FailedError("beams beyond the budget end early")


def _prompt_lookup(subject: Subject) -> None:
    ids = subject.ids[:1, :25].repeat(1, 4)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def lookup(cache: Cache) -> Tensor:
        return subject.generate(cache, prompt, prompt_lookup_num_tokens=3, max_new_tokens=2 * _NEW).sequences

    expected = _baseline(lambda: lookup(subject.exact()))
    _same_tokens(lookup(subject.cache(1.0)), expected)


def _saved(subject: Subject) -> None:
    cache = subject.cache()
    subject.logits(cache, subject.row[:, :-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = WildCatCache.load(path, subject.model.config, device=subject.ids.device).clone()
    seen, last = subject.row.shape[1] - 1, subject.row[:, -1:]
    _close(subject, subject.logits(loaded, last, seen=seen), subject.logits(cache, last, seen=seen))


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
            raise _NotApplicableError(str(error)) from None
        return subject.logits(cache, right, seen=seen)

    def never(cache: Cache) -> Tensor:
        subject.logits(cache, first)
        return subject.logits(cache, right, seen=seen)

    if not _is_close(subject, *_baseline(lambda: (undone(subject.exact()), never(subject.exact())))):
        raise _NotApplicableError("tokens taken back from DynamicCache leave traces too")
    _close(subject, undone(subject.cache()), never(subject.cache()))


def _enabled(subject: Subject) -> None:
    settings = WildCatConfig(ratio=RATIO)
    expected = subject.generate(WildCatCache(subject.model.config, settings)).sequences
    try:
        handle = enable(subject.model, settings, compressor="wildcat")
    except ValueError as error:
        raise _NotApplicableError(str(error)) from None
    with handle:
        found = subject.generate(None).sequences
    _same_tokens(found, expected)


def _smaller(subject: Subject) -> str:
    exact, cache = subject.exact(), subject.cache()
    _baseline(lambda: subject.logits(exact, subject.row))
    subject.logits(cache, subject.row)
    ours, theirs = cache_bytes(cache), cache_bytes(exact)
    if ours >= theirs:
        raise _FailedError(f"{ours:,} bytes at ratio {RATIO}, {theirs:,} with DynamicCache")
    return f"{ours / theirs:.0%} of DynamicCache's bytes at {subject.row.shape[1]} tokens"


def _rotations(subject: Subject) -> None:
    decoder = decoder_config(subject.model.config)
    try:
        rotations_of(decoder, cache_layers(decoder)[1])
    except ValueError as error:
        raise _NotApplicableError(f"{error}; methods that need none: {', '.join(_without_positions())}") from None


_CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "a cache can be built": _built,
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


# Helpers


def _subject(model: Any, prompt: Mapping[str, Any] | None, seed: int) -> Subject:
    vocabulary = next(size for config in with_parts(model.config) if (size := vars(config).get("vocab_size")))
    # Special tokens stand at either end of a vocabulary.
    words = set(range(vocabulary // 20, vocabulary // 2)) - _special(model)
    table = torch.tensor(sorted(words))
    made = torch.Generator().manual_seed(seed)
    ids = table[torch.randint(len(table), (2, _TOKENS), generator=made)].to(model.device)
    if prompt is None:
        prompt = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
    tolerance = 2e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    subject = Subject(model, ids, prompt, tolerance)
    return replace(subject, told=_takes_positions(model) and _counts_anew(subject))


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _counts_anew(subject: Subject) -> bool:
    """Tell whether the model counts positions from 0 again after other tokens, by DynamicCache."""
    ids = subject.row[:, :8]
    try:
        cache = subject.exact()
        whole = subject.logits(subject.exact(), ids)[:, 4:]
        subject.logits(cache, ids[:, :4])
        return not _is_close(subject, subject.logits(cache, ids[:, 4:], seen=4), whole)
    except Exception:  # whatever is wrong with this model, the checks will tell
        return False


def _special(model: Any) -> set[int]:
    """Tokens that mean something to the model's code: the end of a text, or the place of an image."""
    found: set[int] = set()
    for config in (*with_parts(model.config), model.generation_config):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                found.update(value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else [])
    return found


def _forced(subject: Subject, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last token of a prompt, and of some given tokens after it."""
    tokens, collected, seen = subject.ids[:, :6], [], 0
    for step in range(tokens.shape[1] + 1):
        collected.append(subject.logits(cache, ids, mask, seen)[:, -1:])
        seen, ids = mask.shape[1], tokens[: len(mask), step : step + 1]
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return torch.cat(collected, dim=1)


def _baseline(run: Callable[[], Any]) -> Any:
    """Return what Transformers' own cache gives; where it gives nothing, ours need not."""
    try:
        return run()
    except Exception as error:
        raise _NotApplicableError(f"fails with DynamicCache too: {_line(error)}") from None


def _same_bits(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        far = (found - expected).abs().max()
        raise _FailedError(f"logits differ from DynamicCache's by up to {float(far):.2g}")


def _same_tokens(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise _FailedError("tokens differ")


def _close(subject: Subject, found: Tensor, expected: Tensor) -> None:
    if not _is_close(subject, found, expected):
        far = float((found - expected).abs().max())
        raise _FailedError(f"logits differ by up to {far:.2g}, where they reach {float(expected.abs().max()):.2g}")


def _is_close(subject: Subject, found: Tensor, expected: Tensor) -> bool:
    """Tell whether logits differ by rounding alone; a NaN is never close."""
    return bool((found - expected).abs().max() <= subject.tolerance * expected.abs().max())


def _without_positions() -> list[str]:
    """The methods that a cache can use without knowing the rotary positions."""
    settings, fit = WildCatConfig(ratio=RATIO), []
    for name in OURS:
        with suppress(ValueError):  # some read a context by themselves
            if not resolve(name, settings).needs_rotation:
                fit.append(name)
    return fit


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _give_back(configs: list[tuple[Any, Any]]) -> None:
    # Not by the property, which would set the parts of a config too.
    for config, implementation in configs:
        config._attn_implementation_internal = implementation


def _forget_positions(model: Any) -> None:
    """Forget where the text before had its images; some models keep that beside the cache."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Check in evaluation mode; give the model its mode, its attention and its positions back."""
    configs = [(config, config._attn_implementation) for config in with_parts(model.config)]
    modes = [(module, module.training) for module in model.modules()]
    positions = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    model.eval()
    try:
        yield
    finally:
        _give_back(configs)
        for module, training in modes:
            module.training = training
        for module, deltas in positions:
            module.rope_deltas = deltas
