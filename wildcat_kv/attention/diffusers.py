"""Attention methods inside diffusers models, by attention processors.

An attention layer of diffusers hands its work to a processor. A layer that is replaced gets another one, which does
what diffusers' `AttnProcessor2_0` does around the attention: norms, projections, residual and factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.layers import check_able, methods_by_layer
from wildcat_kv.attention.masks import key_padding
from wildcat_kv.extras import import_extra

# diffusers marks padding by a bias of -10000 on the scores, in bfloat16 -9984.
_PADDING_BIAS = -9984.0
# Processors whose work `Processor` can do; those of the second kind know neither norms of heads nor another scale.
_FUSED = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
_KNOWN = (*_FUSED, "AttnProcessor")


@dataclass(frozen=True)
class Processor:
    """Attention processor of a replaced layer.

    Attributes:
        method: the method, with the layer's own seed.
        layer: name of the layer's module.
        previous: the processor that the layer had before.

    Source: `AttnProcessor2_0` of diffusers 0.42, models/attention_processor.py.
    """

    method: Attention
    layer: str
    previous: Any

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Do a layer's work.

        Args:
            attn: attention module of diffusers.
            hidden_states: (rows, q, channels), or (rows, channels, height, width).
            encoder_hidden_states: (rows, n, channels) to attend to; the hidden states by default.
            attention_mask: bias (rows, 1, n) on the scores, or bool, of padding only.
            temb: what a spatial norm takes.
            *args: without effect, as in diffusers.
            **kwargs: without effect, as in diffusers.

        Returns:
            The layer's output, of the shape of the hidden states.

        Raises:
            ValueError: a mask that is more than padding; names the layer.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial = hidden_states.shape[1:] if hidden_states.dim() == 4 else None
        if spatial is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        output = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        for module in attn.to_out:  # a projection and dropout
            output = module(output)
        if spatial is not None:
            output = output.transpose(-1, -2).reshape(-1, *spatial)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def _attend(self, attn: Any, asking: Tensor, asked: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with states (rows, q, channels) to states (rows, n, channels)."""
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(asking), attn.to_k(asked), attn.to_v(asked))
        )
        scale = attn.scale
        if type(self.previous).__name__ in _FUSED:
            scale = query.shape[-1] ** -0.5
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
        padding = self._padding(attn, mask, len(key), key.shape[2])
        output = self.method(query, key, value, scale=scale, key_padding_mask=padding)
        return output.transpose(1, 2).flatten(2)

    def _padding(self, attn: Any, mask: Tensor | None, rows: int, n: int) -> Tensor | None:
        """Read which keys are padding, bool (rows, n)."""
        if mask is None:
            return None
        if mask.shape[-1] != n:
            raise ValueError(f"layer {self.layer!r}: attention_mask has {mask.shape[-1]} keys, and there are {n}")
        mask = attn.prepare_attention_mask(mask, n, rows)
        mask = mask.view(rows, attn.heads, -1, mask.shape[-1])
        if mask.dtype != torch.bool:
            mask = mask.masked_fill(mask <= _PADDING_BIAS, torch.finfo(mask.dtype).min)
        try:
            padding = key_padding(mask, rows, n)
        except ValueError as error:
            raise ValueError(f"layer {self.layer!r}: {error}") from None
        # The same bias on all scores of a row changes nothing.
        return None if padding is None else padding & ~padding.all(-1, keepdim=True)


def enable(
    model: nn.Module, method: Attention | Mapping[int | str, Attention], layers: Iterable[int | str] | None = None
) -> tuple[str, ...]:
    """Let a diffusers model's self-attention use a method, until `disable`.

    Works for models of diffusers' `Attention` module with its default processors: UNet2DModel, UNet2DConditionModel,
    Transformer2DModel, DiTTransformer2DModel, PixArt, the autoencoder's middle. Attention to a prompt stays exact
    unless it is named.

    Args:
        model: a diffusers model, or a part of one.
        method: the method of all layers, each with a seed of its own; or methods by number or name of the layer, such
            as a `Plan`.
        layers: numbers of layers, counted over those of self-attention, negative ones from the end; or names of
            modules. All of self-attention by default.

    Returns:
        The names of the replaced layers, in order.

    Raises:
        MissingExtraError: diffusers is not installed.
        TypeError: the method is no `Attention`.
        ValueError: a model without such layers, an unknown layer or one that cannot be replaced, or a model that is
            enabled already. The model is left as it was.
    """
    found = attention_layers(model)
    taken = next((name for name, module in found.items() if _replaced(module)), None)
    if taken is not None:
        raise ValueError(f"model={type(model).__name__} has a method in {taken!r} already; disable(model) first")
    able = [name for name, module in found.items() if _obstacle(module) is None and not module.is_cross_attention]
    check_able(model, able, found, _obstacle, "none is self-attention of diffusers' Attention module")
    methods = methods_by_layer(method, layers, able, found, _obstacle)
    for name, chosen in methods.items():
        module: Any = found[name]
        module.set_processor(Processor(chosen, name, module.processor))
    return tuple(methods)


def disable(model: nn.Module) -> None:
    """Give the replaced layers of a model their own processors back.

    Args:
        model: the model that was given to `enable`.

    Raises:
        ValueError: a model that is not enabled.
    """
    if not _restore(model):
        raise ValueError(f"model={type(model).__name__} has no method of attention; there is nothing to disable")


@contextmanager
def use(
    model: nn.Module, method: Attention | Mapping[int | str, Attention], layers: Iterable[int | str] | None = None
) -> Iterator[tuple[str, ...]]:
    """Let a diffusers model's self-attention use a method inside a `with` block.

    Afterwards the layers have the very processors that they had, an exception or not. Arguments and errors are those of
    `enable`, and the names of the replaced layers are what `as` gives.

    Example:
        with wildcat_kv.attention.diffusers.use(pipeline.unet, WildCatAttention(rank=256, bins=16)):
            image = pipeline(prompt).images[0]
    """
    names = enable(model, method, layers)
    try:
        yield names
    finally:
        _restore(model)  # not those that were given another processor inside the block


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """List the layers with diffusers' attention module, by name, in order; cross-attention too."""
    kind = _library().Attention
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _library() -> ModuleType:
    return import_extra("diffusers.models.attention_processor", "attention")


def _obstacle(module: Any) -> str | None:
    """Say why a layer cannot be replaced; None where it can."""
    library, processor = _library(), module.processor
    known = tuple(getattr(library, name) for name in _KNOWN)
    if isinstance(processor, Processor) or type(processor) in known:
        return None
    return (
        f"has the processor {type(processor).__name__}, which works in a way of its own; where diffusers' "
        "AttnProcessor2_0 does as well, set it first by model.set_attn_processor"
    )


def _restore(model: nn.Module) -> bool:
    """Give replaced layers their own processors back, and tell whether there were any."""
    replaced: list[Any] = [module for module in model.modules() if _replaced(module)]
    for module in replaced:
        module.set_processor(module.processor.previous)
    return bool(replaced)


def _replaced(module: Any) -> bool:
    return isinstance(vars(module).get("processor"), Processor)
