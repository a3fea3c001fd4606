"""What makes two models alike to a cache: the shape of their keys and values, and how positions are written in."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue


class ModelIdentity(BaseModel):
    """The parts of a decoder's config that a stored context depends on. Its weights are not among them.

    Attributes:
        model_type: the architecture, as Transformers names it.
        num_hidden_layers: layers.
        layer_types: the kind of each layer, None where all are alike.
        sliding_window: tokens that sliding-window layers see, None where there are none.
        hidden_size: channels of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: key heads; a list where layers differ.
        head_dim: channels of a key, None where it follows from the others.
        vocab_size: tokens of the vocabulary.
        rope_parameters: of the rotary positions, None where there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    num_hidden_layers: JsonValue
    layer_types: JsonValue
    sliding_window: JsonValue
    hidden_size: JsonValue
    num_attention_heads: JsonValue
    num_key_value_heads: JsonValue
    head_dim: JsonValue
    vocab_size: JsonValue
    rope_parameters: JsonValue

    @staticmethod
    def of(decoder: Any) -> ModelIdentity:
        """The identity of the decoder with this Transformers config; what it does not have is None."""
        found = decoder.to_dict()  # attributes raise where layers differ
        return ModelIdentity.model_validate({name: plain(found.get(name)) for name in ModelIdentity.model_fields})

    def difference(self, other: ModelIdentity) -> str | None:
        """The first field in which they differ, as "name: this one's and that one's"; None for alike."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine!r} in the one and {theirs!r} in the other"
        return None


def plain(value: Any) -> JsonValue:
    """As JSON would give it back: mappings with string keys, lists, numbers."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
