"""Layer with a sliding window that holds its window, and no more."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils
from typing_extensions import override


# It bears its parent's name, by which saved files know it.
class DynamicSlidingWindowLayer(cache_utils.DynamicSlidingWindowLayer):
    """Transformers' layer, which keeps a view of all tokens of a prompt until the next one comes.

    A context that is compressed and kept would hold them as long.
    """

    keys: Tensor
    values: Tensor

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1 and self.keys.shape[-2] < found[0].shape[-2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return found


def hold_windows(layers: list[Any]) -> None:
    """Let the layers with a sliding window hold no more than that, in place."""
    for layer in layers:
        if type(layer) is cache_utils.DynamicSlidingWindowLayer:
            layer.__class__ = DynamicSlidingWindowLayer
