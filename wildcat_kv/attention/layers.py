"""The choice of layers to replace, and of the method of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from wildcat_kv.attention.base import Attention


def check_able(
    model: nn.Module,
    able: list[str],
    found: Mapping[str, nn.Module],
    obstacle: Callable[[nn.Module], str | None],
    otherwise: str,
) -> None:
    """Refuse a model without a layer to replace.

    Args:
        model: the model, to be named.
        able: names of the layers that can be replaced.
        found: modules of all attention layers by name.
        obstacle: says why a layer cannot be replaced; None where it can.
        otherwise: the reason where no layer has an obstacle.

    Raises:
        ValueError: `able` is empty; names the first layer with an obstacle.
    """
    if able:
        return
    reasons = ((name, obstacle(module)) for name, module in found.items())
    reason = next((f"{name!r} {reason}" for name, reason in reasons if reason is not None), otherwise)
    raise ValueError(f"model={type(model).__name__} has no attention layer to replace: {reason}")


def methods_by_layer(
    method: Attention | Mapping[int | str, Attention],
    layers: Iterable[int | str] | None,
    able: list[str],
    found: Mapping[str, nn.Module],
    obstacle: Callable[[nn.Module], str | None],
) -> dict[str, Attention]:
    """Choose the layers and give each its method, in the order of the model.

    Args:
        method: the method of all layers, or methods by number or name of the layer.
        layers: numbers or names; all of `able` by default.
        able: names of the layers that numbers count.
        found: modules of all layers by name.
        obstacle: says why a layer cannot be replaced; None where it can.

    Raises:
        TypeError: a method is no `Attention`.
        ValueError: no layer, an unknown one, or one that cannot be replaced.
    """
    if isinstance(method, Mapping):
        if layers is not None:
            raise ValueError("layers is given beside a method for each layer; give one of them")
        chosen = {_named(number, able, found, obstacle): one for number, one in method.items()}
    else:
        chosen = {_named(layer, able, found, obstacle): method for layer in (able if layers is None else layers)}
    if not chosen:
        raise ValueError("layers names no layer; leave it out for all of them, or give a plan that approximates one")
    for one in chosen.values():
        if not isinstance(one, Attention):
            raise TypeError(f"method={one!r} is no Attention; give one of wildcat_kv.attention's, such as Exact()")
    return {name: chosen[name].for_layer(number) for number, name in enumerate(found) if name in chosen}


def _named(
    layer: int | str,
    able: list[str],
    found: Mapping[str, nn.Module],
    obstacle: Callable[[nn.Module], str | None],
) -> str:
    """Find the name of a layer that is given by name or number.

    Raises:
        ValueError: there is no such layer, or it cannot be replaced.
    """
    if isinstance(layer, int):
        if not -len(able) <= layer < len(able):
            raise ValueError(f"layers: {layer} is none of the {len(able)} layers that can be replaced, counted from 0")
        return able[layer]
    if layer not in found:
        raise ValueError(f"layers: there is no attention layer {layer!r}; the first is {next(iter(found))!r}")
    if (reason := obstacle(found[layer])) is not None:
        raise ValueError(f"layers: {layer!r} {reason}")
    return layer
