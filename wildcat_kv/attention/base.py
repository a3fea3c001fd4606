"""The protocol of an attention method, and what all methods do alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from wildcat_kv.attention.inputs import check_call, rows_by_padding
from wildcat_kv.validation import did_you_mean

# Odd and far from small: the seeds of neighbouring layers have nothing in common.
_LAYER_STRIDE = 0x5851F42D4C957F2D


@dataclasses.dataclass(frozen=True, eq=False)
class Attention(nn.Module):
    """Softmax attention of all queries to all keys, or an approximation of it.

    A module without parameters: its fields are its settings, and do not change. Two calls with the same tensors give
    the same result, because noise is keyed by the seed and the head and not drawn from torch's generator. A row of a
    batch is what it is alone. Half precision is accumulated in float32. Gradients flow through queries, keys and
    values; what was drawn, sorted or chosen is held fixed.

    To add a method, derive a frozen dataclass, name its source, and implement `attend` and `operations`.

    Attributes:
        name: name that `available` lists.
        paper: source of the method.
        complexity: operations of one head in n keys and as many queries.
        presets: settings of published experiments, by name.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    complexity: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        super().__init__()
        at_least(0, seed=getattr(self, "seed", None))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Build the method with the settings of a published experiment.

        Args:
            name: key of `presets`.
            **settings: fields to set besides.

        Raises:
            ValueError: there is no such preset.

        Example:
            >>> from wildcat_kv.attention import WildCatAttention
            >>> WildCatAttention.preset("biggan").rank
            96
        """
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise ValueError(f"preset={name!r}: {did_you_mean(name, cls.presets)}{cls.name} has {known}")
        return cls(**{**cls.presets[name], **settings})

    def for_layer(self, layer: int) -> Self:
        """Give the method of a layer: the same settings, and a seed of its own."""
        if "seed" not in {field.name for field in dataclasses.fields(self)}:
            return self
        seed: int = vars(self)["seed"]
        return dataclasses.replace(self, seed=(seed + layer * _LAYER_STRIDE) % 2**63)  # type: ignore[call-arg]

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend with every query to every key that is no padding.

        Args:
            query: (..., heads, q, d), floating point.
            key: (..., kv_heads, n, d); `heads` is a multiple of `kv_heads`, query heads grouped in order.
            value: (..., kv_heads, n, d_v).
            attn_mask: None; any other mask is refused.
            dropout_p: dropout of the probabilities, refused in training and without effect otherwise.
            is_causal: False; True is refused.
            scale: b, the factor of the scores, positive; d^-1/2 by default.
            key_padding_mask: bool (..., n), True for keys that are padding, as in `torch.nn.MultiheadAttention`.

        Returns:
            (..., heads, q, d_v) in the query's dtype; 0 in rows that are all padding.

        Raises:
            ValueError: shapes, dtypes, masks or numbers that do not fit; names the argument and its value.
        """
        dropout = dropout_p if self.training else 0.0
        check_call(query, key, value, attn_mask, dropout, is_causal, scale, key_padding_mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        *batch, heads, length, d = query.shape
        kv_heads, n = key.shape[-3:-1]
        rows = math.prod(batch)
        query = query.reshape(rows, kv_heads, heads // kv_heads, length, d)
        key = key.reshape(rows, kv_heads, n, d)
        value = value.reshape(rows, kv_heads, n, value.shape[-1])
        if key_padding_mask is None:
            output = self._attend(query, key, value, scale)
        else:  # a row without its padding is a plain one: no method need know of masks
            output = query.new_zeros(*query.shape[:-1], value.shape[-1])
            for alike, real in rows_by_padding(key_padding_mask.reshape(rows, n)):
                part = self._attend(query[alike], key[alike][:, :, real], value[alike][:, :, real], scale)
                output = output.index_copy(0, alike, part)
        return output.reshape(*batch, heads, length, value.shape[-1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Call `attend`, without autocast; no key or no query gives 0."""
        shape = (*query.shape[:-1], value.shape[-1])
        if 0 in (*query.shape, *key.shape):
            return query.new_zeros(shape)
        with torch.autocast(query.device.type, enabled=False):
            return self.attend(query, key, value, scale).reshape(shape).to(query.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend in rows of equal length without padding.

        Args:
            query: (rows, kv_heads, groups, q, d).
            key: (rows, kv_heads, n, d), n at least 1.
            value: (rows, kv_heads, n, d_v).
            scale: b, the factor of the scores.

        Returns:
            (rows, kv_heads, groups, q, d_v), or with groups and queries as one dimension.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement attend")

    def cost(self, n: int, d: int, *, queries: int | None = None, value_dim: int | None = None) -> int:
        """Count the operations of one head, a multiplication with an addition as one.

        Exponentials and comparisons count as one each, terms of lower order are left out.

        Args:
            n: number of keys.
            d: channels of queries and keys.
            queries: number of queries, n by default.
            value_dim: channels of the values, d by default.

        Example:
            >>> from wildcat_kv.attention import Exact
            >>> Exact().cost(1000, 64)
            129000000
        """
        return self.operations(n if queries is None else queries, n, d, d if value_dim is None else value_dim)

    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        """Count the operations of one head with q queries, see `cost`."""
        raise NotImplementedError(f"{type(self).__name__} must implement operations")

    @override
    def train(self, mode: bool = True) -> Self:
        object.__setattr__(self, "training", mode)  # the one attribute that is no setting
        return self


Method = TypeVar("Method", bound=Attention)


def function_form(method: type[Attention], name: str) -> Callable[..., Tensor]:
    """Make the function that builds a method and calls it.

    Its arguments are those of `Attention.forward`, and the method's settings by name.

    Args:
        method: class of the method.
        name: name of the function.
    """
    settings = {field.name for field in dataclasses.fields(method)}

    def function(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any) -> Tensor:
        own = {each: named.pop(each) for each in settings & set(named)}
        output: Tensor = method(**own)(query, key, value, *arguments, **named)
        return output

    function.__name__ = function.__qualname__ = name
    function.__module__ = method.__module__
    function.__doc__ = f"Attend as `{method.__name__}` does; takes its settings and the arguments of its call."
    return function


def at_least(least: float, **numbers: float | None) -> None:
    """Refuse settings below a number; None passes.

    Raises:
        ValueError: names the setting and its value.

    Example:
        >>> at_least(1, rank=0)
        Traceback (most recent call last):
        ValueError: rank=0 must be at least 1
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise ValueError(f"{name}={number} must be at least {least}")


def wide(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
