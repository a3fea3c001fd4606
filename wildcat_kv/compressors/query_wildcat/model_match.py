"""Tell models apart by the shape of their decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of the decoder's config that tell models apart.
_FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def fingerprint(decoder: Any) -> dict[str, str | int | None]:
    """Describe a decoder by fields of its config."""
    return {field: getattr(decoder, field, None) for field in _FINGERPRINT}


def check_match(match: Mapping[str, str | int | None], decoder: Any, named: str, way_out: str) -> None:
    """Refuse another model than the one that was measured.

    Args:
        match: fields of the decoder's config, and the values that they had.
        decoder: Transformers config of the decoder.
        named: name and value of the argument.
        way_out: way out, for the error.

    Raises:
        ValueError: names the first field that differs.
    """
    for field, measured in match.items():
        if (found := getattr(decoder, field, None)) != measured:
            raise ValueError(f"{named} is of a model with {field}={measured!r}, and this one has {found!r}; {way_out}")
