"""The model under test, and what it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.read_check import check_read
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.integrations.model_checks.compare import FailedError
from wildcat_kv.models.support import with_parts

RATIO = 0.25
TOKENS = 160
NEW = 8


@dataclass(frozen=True)
class Subject:
    """The model under test, and what it is asked.

    Attributes:
        model: the model, in evaluation mode.
        ids: random tokens, int64 (2, n); far fewer than the model has positions for.
        prompt: keyword arguments of `generate()`, one row: the text, and pixels where an image is among them.
        tolerance: largest difference of two logits that is rounding, as a share of the largest logit.
        told: True if `forward()` has to be told positions after the first call; some models count from 0 again.
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
        new = options.pop("max_new_tokens", NEW)
        config = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        forget_positions(self.model)
        return self.model.generate(**(self.prompt if prompt is None else prompt), **given, generation_config=config)

    def check_close(self, found: Tensor, expected: Tensor) -> None:
        """Refuse logits that differ by more than rounding."""
        if not self.is_close(found, expected):
            far = float((found - expected).abs().max())
            raise FailedError(f"logits differ by up to {far:.2g}, where they reach {float(expected.abs().max()):.2g}")

    def is_close(self, found: Tensor, expected: Tensor) -> bool:
        """Tell whether logits differ by rounding alone; a NaN is never close."""
        return bool((found - expected).abs().max() <= self.tolerance * expected.abs().max())

    @property
    def row(self) -> Tensor:
        """The first row of the random tokens, int64 (1, n)."""
        return self.ids[:1]

    def text(self, length: int) -> dict[str, Tensor]:
        """Give the arguments of `generate()` for the random text's beginning."""
        ids = self.row[:, :length]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_subject(model: Any, prompt: Mapping[str, Any] | None, seed: int) -> Subject:
    """Make random tokens for a model, and find out how it wants positions.

    Args:
        model: the model, in evaluation mode.
        prompt: keyword arguments of `generate()` for one row; None for the random tokens.
        seed: the seed of the random tokens.
    """
    vocabulary = next(size for config in with_parts(model.config) if (size := vars(config).get("vocab_size")))
    # Special tokens stand at either end of a vocabulary.
    words = set(range(vocabulary // 20, vocabulary // 2)) - _special(model)
    table = torch.tensor(sorted(words))
    made = torch.Generator().manual_seed(seed)
    ids = table[torch.randint(len(table), (2, TOKENS), generator=made)].to(model.device)
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
        return not subject.is_close(subject.logits(cache, ids[:, 4:], seen=4), whole)
    except Exception:  # whatever is wrong with this model, the checks will tell
        return False


def _special(model: Any) -> set[int]:
    """List tokens that mean something to the model's code.

    They are the end of a text, or the place of an image.
    """
    found: set[int] = set()
    for config in (*with_parts(model.config), model.generation_config):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                found.update(value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else [])
    return found


def forget_positions(model: Any) -> None:
    """Forget where the text before had its images.

    Some models keep that beside the cache.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
