"""Attention backends of vLLM in which entries have weights.

Weights ride in the value channels: an entry has [U, w, |w|], an ordinary token [v, 1, 1], and softmax attention gives
sums of all three, of which the first divided by the second is weighted attention. So a backend of vLLM's own does the
work, with heads that are wider.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from wildcat_kv.coreset.wtdattn import DENOMINATOR_FLOOR
from wildcat_kv.integrations.vllm.names import CONNECTOR

# Channels behind the values: w and |w|.
_EXTRA = 2
# Head sizes of a backend that names none.
_STEP = 8
# Beginnings of the names of cache dtypes that round weights away.
_PACKED = ("fp8", "int8", "int4", "nvfp4")


def wants_weights(config: Any) -> bool:
    """Tell if a vLLM config asks for attention with weights."""
    transfer = getattr(config, "kv_transfer_config", None)
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return False
    return bool(transfer.kv_connector_extra_config.get("weighted", True))


class WeightedImpl:
    """Attention with weights, mixed into an implementation of vLLM's.

    Attributes:
        stock: vLLM's backend class.
        channels: channels of a value, d_v.
        wide: channels of a head in the cache.
    """

    stock: ClassVar[Any]

    def __init__(self, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        self.channels, self.wide = head_size, width(self.stock, head_size)
        super().__init__(num_heads, self.wide, *args, **kwargs)  # type: ignore[call-arg]  # the implementation's
        if getattr(self, "sinks", None) is not None:
            raise ValueError("the model has attention sinks, whose share is lost beside weights; serve it with --stock")
        kind = str(getattr(self, "kv_cache_dtype", "auto"))
        if kind.startswith(_PACKED):
            raise ValueError(f"kv_cache_dtype={kind!r} cannot hold weights; leave it 'auto'")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with queries (n, heads, d) to the cache; see vLLM's `AttentionImpl`."""
        if attn_metadata is None:  # a run that warms up
            return output.zero_()
        sums = output.new_zeros(*output.shape[:-1], self.wide)
        # Keys and values are read from the cache.
        super().forward(  # type: ignore[misc]
            layer, padded(query, self.wide), key, value, kv_cache, attn_metadata, sums, *args, **kwargs
        )
        mass, size = sums[..., self.channels, None], sums[..., self.channels + 1, None]
        # A denominator that has cancelled says nothing.
        shown = mass > DENOMINATOR_FLOOR * size
        return output.copy_(torch.where(shown, sums[..., : self.channels] / torch.where(shown, mass, 1.0), 0.0))

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write ordinary tokens to the cache; see vLLM's `AttentionImpl`."""
        self.write_entries(layer, key, value, None, kv_cache, slot_mapping)

    def write_entries(
        self, layer: Any, key: Tensor, value: Tensor, weights: Tensor | None, kv_cache: Tensor, slots: Tensor
    ) -> None:
        """Write entries to the cache.

        Args:
            layer: vLLM's attention layer.
            key: (n, heads, d).
            value: numerators (n, heads, d_v).
            weights: (n, heads); None for ordinary tokens.
            kv_cache: cache of the layer.
            slots: places in the cache, int64 (n,).
        """
        wide = padded(value, self.wide)
        if weights is None:
            wide[..., self.channels : self.channels + _EXTRA] = 1
        else:
            wide[..., self.channels] = weights
            wide[..., self.channels + 1] = weights.abs()
        super().do_kv_cache_update(layer, padded(key, self.wide), wide, kv_cache, slots)  # type: ignore[misc]


class WeightedBackend:
    """A backend with weights, mixed into a backend class of vLLM's.

    Attributes:
        stock: vLLM's backend class.
        impl: implementation with weights.
        widened: head sizes of the specs that were widened.
    """

    stock: ClassVar[Any]
    impl: ClassVar[Any]
    widened: ClassVar[set[int]]

    @classmethod
    def get_impl_cls(cls) -> Any:
        """Give the implementation."""
        return cls.impl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Tell if heads of this size have room for weights."""
        return fitting(cls.stock, head_size + _EXTRA) is not None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Widen the heads of a cache; vLLM may ask twice."""
        if spec.head_size not in cls.widened:
            wide = width(cls.stock, spec.head_size)
            cls.widened.add(wide)
            spec = replace(spec, head_size=wide, head_size_v=wide)
        return cls.stock.customize_spec(spec)


@functools.cache
def weighted(stock: Any) -> Any:
    """Make the weighted backend of one of vLLM's.

    Args:
        stock: backend class with one width for queries, keys and values, whose cache `do_kv_cache_update` writes.

    Raises:
        ValueError: the backend writes its cache by itself.
    """
    if stock.forward_includes_kv_cache_update:
        raise ValueError(f"backend={stock.__name__} writes its cache within its forward pass; take another one")
    inner = stock.get_impl_cls()
    impl = type(f"Weighted{inner.__name__}", (WeightedImpl, inner), {"stock": stock})
    fields = {"stock": stock, "impl": impl, "widened": set()}
    return type(f"Weighted{stock.__name__}", (WeightedBackend, stock), fields)


def fitting(stock: Any, channels: int) -> int | None:
    """Find a backend's least head size of at least `channels`; None without one."""
    sizes = stock.get_supported_head_sizes()
    if not sizes:
        found = -(-channels // _STEP) * _STEP
        return found if stock.supports_head_size(found) else None
    return min((size for size in sizes if size >= channels), default=None)


def width(stock: Any, head_size: int) -> int:
    """Give the channels of a head that has weights.

    Raises:
        ValueError: the backend has no heads that wide.
    """
    found = fitting(stock, head_size + _EXTRA)
    if found is None:
        raise ValueError(
            f"head_size={head_size} leaves no room for weights in {stock.__name__}, whose head sizes are "
            f"{stock.get_supported_head_sizes()}; export contexts with --stock, and serve with weights off"
        )
    return found


def padded(tensor: Tensor, channels: int) -> Tensor:
    """Copy a tensor (..., d) to one of `channels` channels, zeros behind."""
    return torch.nn.functional.pad(tensor, (0, channels - tensor.shape[-1]))


def __getattr__(name: str) -> Any:
    """Choose a backend by the current config: vLLM looks a registered class up by its name, when it builds a model."""
    if name == "CPU":
        return weighted(CPUAttentionBackend) if wants_weights(get_current_vllm_config()) else CPUAttentionBackend
    if name == "CUDA":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        return weighted(FlashAttentionBackend)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
