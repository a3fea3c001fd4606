"""Options of the benchmarks, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wildcat_kv import WildCatConfig
from wildcat_kv.compressors import available
from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.data.haystack import build_context
from wildcat_kv.models import load_model

NAMES = ("prefill", "decode", "memory", "scaling", "generation", "calls", "choices")  # of the benchmarks
DTYPES = ("float32", "bfloat16", "float16")
LEAST_TOKENS = 256  # below it sink and window are most of the budget


@dataclass(frozen=True)
class Options:
    """Options of all benchmarks; each uses its own.

    Attributes:
        dtypes: dtypes of model and cache.
        tokens: lengths; None for the benchmark's own.
        turns: turns to count.
        methods: names of methods to compare with WildCat; "auto" is the default of the model.
        model: hub id, folder or GGUF file; None for the default model.
        device: device to measure on.
        threads: threads of torch; None for torch's own choice.
        ratio: share of the tokens to keep.
        max_tokens: most tokens to store in a layer, in generation.
        prompt_tokens: tokens to start generation from.
        rows: batch sizes of decoding.
        steps: decoded tokens a turn; None for one fold's block.
        bits: bits of slots to decode with, beside slots in the model's dtype.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] | None = None
    turns: int = 3
    methods: tuple[str, ...] = ()
    model: str | None = None
    device: str = "cpu"
    threads: int | None = None
    ratio: float = 0.25
    max_tokens: int = 1024
    prompt_tokens: int = 1000
    rows: tuple[int, ...] = (1, 4)
    steps: int | None = None
    bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtype={dtype!r} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        for tokens in self.tokens or ():
            if tokens < LEAST_TOKENS:
                raise ValueError(f"tokens={tokens} must be at least {LEAST_TOKENS}")
        for rows in self.rows:
            if rows < 1:
                raise ValueError(f"rows={rows} must be at least 1")
        names = [*(method.name for method in available()), AUTO]
        for method in self.methods:
            if method not in names:
                raise ValueError(f"methods={method!r}: no such method; there are {', '.join(names)}")
        if (
            self.model is not None
            and self.model.startswith((".", "/", "~"))
            and not Path(self.model).expanduser().exists()
        ):
            raise ValueError(f"model={self.model!r}: no such folder or file")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={self.device!r} cannot be used: {str(error).splitlines()[0]}") from None
        WildCatConfig(ratio=self.ratio, sink=32)
        WildCatConfig(max_tokens=self.max_tokens, sink=32)
        for bits in self.bits:
            self.settings.changed(bits=bits)

    @property
    def settings(self) -> WildCatConfig:
        """The published protocol at `ratio`."""
        return WildCatConfig(ratio=self.ratio, sink=32)  # the published protocol

    @property
    def others(self) -> tuple[str, ...]:
        """The methods without WildCat, which is always measured."""
        return tuple(name for name in self.methods if name != "wildcat")

    def lengths(self, *default: int) -> tuple[int, ...]:
        """Take `tokens`, or the benchmark's own lengths."""
        return self.tokens or default


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        model: Transformers model, in evaluation mode.
        tokenizer: tokenizer of the model.
        dtype: dtype of the weights, by name.
    """

    model: Any
    tokenizer: Any
    dtype: str

    @staticmethod
    def load(options: Options, dtype: str) -> Subject:
        """Load the chosen model in one of the chosen dtypes."""
        model, tokenizer = load_model(options.model, getattr(torch, dtype), options.device)
        return Subject(model, tokenizer, dtype)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def prompt(self, tokens: int) -> torch.Tensor:
        """Make a prompt of essays, int64 (1, tokens)."""
        text = build_context(self.tokenizer, tokens + 32, [], seed=0)  # it may end a word early
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :tokens]
        return ids.to(self.device)


def split_names(text: str | None) -> Sequence[str]:
    """Split names with commas between; all methods for None or "all"."""
    if text is None or text == "all":
        return [method.name for method in available()]
    return [name.strip() for name in text.split(",") if name.strip()]
