"""Read what methods need of a model's attention module: the weights behind its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

# Names of the linear layer that all heads' outputs go through.
_NAMES = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True, eq=False)
class AttentionModule:
    """A model's attention module and its output projection.

    A copy of a cache shares it: it belongs to the model. Weights are read when they are asked for, so they are where
    the model is then.

    Attributes:
        module: attention module.
        projection: linear layer that the heads' outputs go through.
        heads: query heads.
    """

    module: nn.Module
    projection: nn.Linear
    heads: int

    @classmethod
    def of(cls, module: nn.Module, heads: int, channels: int, method: Any) -> Self:
        """Find the output projection of an attention module.

        Args:
            module: attention module.
            heads: query heads.
            channels: channels of a head's output.
            method: method that asks, for the message.

        Raises:
            ValueError: there is none of a known name, it is no plain linear layer (quantised, or behind an adapter), it
                takes other inputs than the heads' outputs, or its weights are elsewhere until they are used.
        """
        for name in _NAMES:
            layer = getattr(module, name, None)
            if layer is None:
                continue
            # Exactly this class: quantised layers and adapters have other weights than they show.
            if type(layer) is nn.Linear and layer.in_features == heads * channels and not layer.weight.is_meta:
                return cls(module, layer, heads)
            found = f"its {name} is {_describe(layer)}"
            break
        else:
            found = f"it has no {', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
        raise ValueError(
            f"compressor={type(method).__name__} weighs values by the weights behind {type(module).__name__}, and "
            f"{found}; it must be a plain torch.nn.Linear of {heads * channels} inputs: merge adapters, load the model "
            "unquantised and on its devices, or take a method that needs no output projection, such as adakv"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def output_projection(self) -> Tensor:
        """View the weights of the projection, (query_heads, d_v, hidden)."""
        return self.projection.weight.detach().mT.unflatten(0, (self.heads, -1))


@contextmanager
def watched_inputs(modules: Sequence[AttentionModule]) -> Iterator[list[Tensor]]:
    """Watch what attention modules read in a forward pass.

    Args:
        modules: attention modules, in the order of their layers.

    Yields:
        Norms of the hidden states that each module reads, float32 (rows, tokens), filled as the pass goes on.
    """
    norms: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        norms.append(torch.linalg.vector_norm(hidden.to(torch.float32), dim=-1))

    handles = [each.module.register_forward_pre_hook(note, with_kwargs=True) for each in modules]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _describe(layer: Any) -> str:
    """Say what a projection is that cannot be read."""
    inputs, weight = getattr(layer, "in_features", None), getattr(layer, "weight", None)
    place = " on no device" if isinstance(weight, Tensor) and weight.is_meta else ""
    return f"a {type(layer).__module__}.{type(layer).__name__}" + (f" of {inputs} inputs" if inputs else "") + place
