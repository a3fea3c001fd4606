"""Facts about the model's own layer, for methods that look beyond keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wildcat_kv.compressors.base import Compressor
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.models.attention_module import AttentionModule


@dataclass
class ModelLayer:
    """The model's side of a cache layer.

    Attributes:
        rotation: rotary positions of the layer; None if the method needs none.
        attention: attention module, once it has attended; None if the method needs none of its weights.
    """

    rotation: Rotation | None = None
    attention: AttentionModule | None = None

    def output_projection(self, compressor: Compressor) -> Tensor | None:
        """Return the weights (query_heads, d_v, hidden); None if the method needs none.

        Raises:
            ValueError: the layer has not met its attention module.
        """
        if not compressor.needs_output_projection:
            return None
        if self.attention is None:
            raise ValueError(
                f"compressor={type(compressor).__name__} needs the model's output projections, and the keys did not "
                "come through the model's attention; let the model read the text with this cache, or call "
                "wildcat_kv.compress_context"
            )
        return self.attention.output_projection()
