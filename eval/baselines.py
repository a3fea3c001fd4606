"""Transformers' own quantised cache, measured beside the methods.

A configuration names it as a compressor, with bits and a ratio of 1:

    {name: quanto, compressor: transformers_quanto, bits: 4, parameters: {axis_key: -1}}

Backends are `quanto` (4 and 2 bits, package optimum-quanto), `hqq` (8, 4, 3, 2 bits, package hqq) and `fp8` (8 bits, no
package). By default quanto groups the channels of one token, in keys too; `axis_key: -1` groups tokens of one channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import QuantizedCache

from eval.plain_caches import copied, plain_tensors
from wildcat_kv import Context
from wildcat_kv.config import WildCatConfig

# The bits of each backend, by the name of its method.
METHODS: Mapping[str, tuple[int, ...]] = {
    "transformers_quanto": (4, 2),
    "transformers_hqq": (8, 4, 3, 2),
    "transformers_fp8": (8,),
}
_OPTIONS = ("axis_key", "axis_value")
# Tokens that are read later stay exact, as those after a fold do: more than any text has.
_NEVER_AGAIN = 1 << 40


class CountedCache(QuantizedCache):
    """Transformers' quantised cache that can be counted, copied and asked for several answers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            kind: Any = type(layer)
            layer.__class__ = _counted(kind)

    def clone(self) -> CountedCache:
        """Make an independent copy; the two share tensors, which no layer writes into."""
        twin: CountedCache = copied(self)
        return twin

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the only row."""
        self.reorder_cache(torch.zeros(repeats, dtype=torch.int64))

    def stored_tokens(self) -> int:
        """Count the tokens of a key head; all of them are held."""
        return int(self.get_seq_length())


@cache
def _counted(kind: Any) -> Any:
    """Derive a class of layers that lists its tensors, packed ones as they are stored."""
    methods = {"tensors": lambda layer: plain_tensors(list(vars(layer).values()))}
    return type(f"Counted{kind.__name__}", (kind,), methods)


@dataclass(frozen=True)
class QuantizedBaseline:
    """Transformers' quantised cache with one backend, number of bits and grouping.

    Args:
        method: name of a method in `METHODS`.
        bits: bits of a stored number.
        group: numbers that share a scale.
        options: axes of the groups, `axis_key` and `axis_value`, as in Transformers' `QuantizedCache`.

    Raises:
        ValueError: bits that the backend does not have, or another option.
    """

    method: str
    bits: int
    group: int = 64
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in METHODS[self.method]:
            there = ", ".join(map(str, METHODS[self.method]))
            raise ValueError(f"methods={self.method!r}: bits={self.bits!r}: the backend has {there}")
        strange = next((name for name in self.options if name not in _OPTIONS or self.backend == "fp8"), None)
        if strange is not None:
            known = "none" if self.backend == "fp8" else ", ".join(_OPTIONS)
            raise ValueError(f"methods={self.method!r}: parameters={strange!r}: no such parameter; it has {known}")
        if (self.backend, self.bits) == ("hqq", 3) and 1 in self.options.values():
            # Its unpacking takes the shape of a matrix for granted there.
            raise ValueError(f"methods={self.method!r}: bits=3 with an axis of 1: hqq fails; take an axis of 0")

    @property
    def backend(self) -> str:
        """Name that Transformers has for the backend."""
        return self.method.removeprefix("transformers_")

    def empty(self, model_config: Any) -> CountedCache:
        """Make an empty cache.

        Raises:
            ValueError: the backend is not installed, or the model or an axis is refused.
        """
        options: dict[str, Any] = {}
        if self.backend != "fp8":
            options = {"nbits": self.bits, "q_group_size": self.group, "residual_length": _NEVER_AGAIN, **self.options}
        try:
            return CountedCache(self.backend, model_config, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(f"methods={self.method!r}: {' '.join(str(error).split())}") from error

    def compress(self, context: Context) -> CountedCache:
        """Quantise the keys and values of a context that was read exactly.

        A model that reads into the cache leaves the same: the first pass attends exactly, and is quantised after.
        Tokens at the end that fill no group stay exact, as in KIVI (arXiv 2402.02750).
        """
        held = self.empty(context.model.config)
        seen = context.exact.get_seq_length()
        whole = seen - seen % self.group or seen
        for index, layer in enumerate(context.exact.layers):
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            held.update(keys[..., :whole, :], values[..., :whole, :], index)
            if whole < seen:
                # Copies, because a view would hold the memory of all tokens.
                held.update(keys[..., whole:, :].clone(), values[..., whole:, :].clone(), index)
        return held


def find_baseline(
    method: str | None, ratio: float | None, settings: Mapping[str, Any], parameters: Mapping[str, Any]
) -> QuantizedBaseline | None:
    """Make the baseline of a cell; None for other methods.

    Args:
        method: name of the cell's compressor.
        ratio: share of the tokens to keep.
        settings: fields of `WildCatConfig`; bits and group are read.
        parameters: options of the baseline.

    Raises:
        ValueError: a budget other than all tokens, no bits, or a wrong option.
    """
    if method is None or method not in METHODS:
        return None
    if ratio != 1:
        raise ValueError(f"methods={method!r} keeps all tokens: ratio={ratio!r} must be 1")
    fields = WildCatConfig(ratio=1.0, **{name: settings[name] for name in ("bits", "group") if name in settings})
    if fields.bits is None:
        raise ValueError(f"methods={method!r}: bits=None: give one of {', '.join(map(str, METHODS[method]))}")
    return QuantizedBaseline(method, fields.bits, fields.group, dict(parameters))
