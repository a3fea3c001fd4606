"""Fitted scorer of a model: what a second reading would find, from what the first one sees.

It is a small file of safetensors: a matrix for each layer, and what is known of its origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.query_wildcat.model_match import check_match, find_file, shipped_names
from wildcat_kv.validation import one_line

_FOLDER = Path(__file__).with_name("scorers")
_SUFFIX = ".safetensors"
# Key of the metadata in a file.
_KEY = "wildcat_kv_scorer"
_WAY_OUT = "fit one by `wildcat-kv fit-scorer MODEL`, or leave scorer out"


class FittedScorer(BaseModel):
    """Weights of each head's features, fitted once over some texts.

    `fit_scorer` and `wildcat-kv fit-scorer MODEL` make one.

    Attributes:
        version: 1.
        model: name of the model, for the reader.
        match: fields of the decoder's config, and the values that they have in this model.
        texts: description of the texts that it was fitted to.
        tokens: tokens of all these texts.
        heads: key heads of each layer that can be compressed.
        weights: weights of each layer: the float32 of (heads, features + 1), little-endian, in base64.

    Raises:
        pydantic.ValidationError: a field that is unknown or does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(1, description="version is 1")
    model: str = Field(min_length=1, description="model is the name of the model, for the reader")
    match: dict[str, str | int | None] = Field(min_length=1, description="match are fields of the decoder's config")
    texts: str = Field(min_length=1, description="texts says what it was fitted to")
    tokens: int = Field(ge=1, description="tokens is the number of tokens of all texts, at least 1")
    heads: tuple[int, ...] = Field(min_length=1, description="heads are the key heads of each layer")
    weights: tuple[str, ...] = Field(min_length=1, description="weights are the weights of each layer, in base64")

    @model_validator(mode="after")
    def _check_weights(self) -> FittedScorer:
        if len(self.weights) != len(self.heads):
            raise ValueError(f"weights: {len(self.weights)} layers, and heads has {len(self.heads)}")
        for place, heads in enumerate(self.heads):
            try:
                numbers = _decoded(self.weights[place])
            except (binascii.Error, ValueError):
                raise ValueError(f"weights: layer {place} is no base64 of float32") from None
            if heads < 1 or numbers.numel() % heads or not bool(numbers.isfinite().all()):
                raise ValueError(f"weights: layer {place} needs finite numbers, as many for each of its {heads} heads")
        return self

    def __repr__(self) -> str:
        return f"FittedScorer({self.model!r}, {len(self.heads)} layers)"

    __str__ = __repr__

    @property
    def digest(self) -> str:
        """Name the weights: 16 digits of their SHA-256."""
        return hashlib.sha256("".join(self.weights).encode("ascii")).hexdigest()[:16]

    @classmethod
    def of(cls, layers: Sequence[Tensor], **origin: Any) -> FittedScorer:
        """Build a scorer of its weights.

        Args:
            layers: (heads, features + 1) of each layer, the constant last.
            **origin: the other fields.
        """
        return cls(heads=tuple(len(layer) for layer in layers), weights=tuple(map(_encoded, layers)), **origin)

    def layer(self, place: int) -> Tensor:
        """Give the weights of a layer, float32 (heads, features + 1)."""
        return _decoded(self.weights[place]).view(self.heads[place], -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scorer to a file of safetensors."""
        origin = self.model_dump(mode="json", exclude={"heads", "weights"})
        tensors = {str(place): self.layer(place) for place in range(len(self.heads))}
        save_file(tensors, path, metadata={_KEY: json.dumps(origin)})

    def check_model(self, decoder: Any, layers: int) -> None:
        """Refuse another model than the one that it was fitted to.

        Args:
            decoder: Transformers config of the decoder.
            layers: number of its layers that can be compressed.

        Raises:
            ValueError: names what differs.
        """
        check_match(self.match, decoder, f"scorer={self!r}", _WAY_OUT)
        if layers != len(self.heads):
            raise ValueError(
                f"scorer={self!r} has {len(self.heads)} layers, and this model has {layers} that can be compressed; "
                f"{_WAY_OUT}"
            )

    def layer_of(self, block: KVBlock) -> Tensor | None:
        """Give the weights of a block's layer, float32 (heads, features + 1).

        None, with a warning, where a process has only a share of the heads: it does not tell which.

        Raises:
            ValueError: its heads have other sizes.
        """
        weights, keys = self.layer(block.layer_index), block.keys
        needed = keys.shape[1], 2 * keys.shape[3] + block.values.shape[3] + 2
        if weights.shape[1] == needed[1] and needed[0] < weights.shape[0] and weights.shape[0] % needed[0] == 0:
            warnings.warn(
                f"scorer={self!r} is left out: this process has {needed[0]} of a layer's {weights.shape[0]} heads, and "
                "does not know which",
                stacklevel=2,
            )
            return None
        if weights.shape != needed:
            raise ValueError(
                f"scorer={self!r} has weights {tuple(weights.shape)} for layer {block.layer_index}, and this layer "
                f"needs {needed}; leave scorer out"
            )
        return weights


def scorer_names() -> list[str]:
    """List the names of the scorers that come with the package."""
    return shipped_names(_FOLDER, _SUFFIX)


def load_scorer(given: str | os.PathLike[str] | Mapping[str, Any] | FittedScorer) -> FittedScorer:
    """Load a scorer by its name, from a file, or from plain data.

    Args:
        given: one of `scorer_names()`, the path of a .safetensors file, the fields of a `FittedScorer`, or one, which
            is returned as it is.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such scorer, or the file cannot be read or has a wrong field; one line that names it.

    Example:
        >>> len(load_scorer("smollm2-135m").heads)
        30
    """
    if isinstance(given, FittedScorer):
        return given
    if isinstance(given, Mapping):
        return _checked("scorer", given)
    path = find_file("scorer", given, _FOLDER, _SUFFIX, "wildcat-kv fit-scorer")
    return _read_once(path) if path.parent == _FOLDER else _read(path)


def _read(path: Path) -> FittedScorer:
    """Read a scorer from a file."""
    named = f"scorer={str(path)!r}"
    try:
        with safe_open(path, "pt") as opened:
            origin = json.loads((opened.metadata() or {})[_KEY])
            layers = [opened.get_tensor(str(place)) for place in range(len(opened.keys()))]
        if not all(layer.dim() == 2 for layer in layers):
            raise ValueError("each layer needs (heads, features + 1) numbers")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{named} is no file of a scorer: {reason}; {_WAY_OUT}") from None
    try:
        return FittedScorer.of(layers, **origin)
    except ValidationError as error:
        raise ValueError(f"{named}: {one_line(error, FittedScorer)}") from None


# For the package's own files, which do not change: each cache of their model needs one.
_read_once = cache(_read)


def _checked(where: str, contents: Mapping[str, Any]) -> FittedScorer:
    """Make a scorer of plain data."""
    try:
        return FittedScorer(**contents)
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error, FittedScorer)}") from None


def _encoded(layer: Tensor) -> str:
    """Write a layer's numbers as text."""
    numbers = layer.detach().to("cpu", torch.float32).contiguous().view(-1)
    return base64.b64encode(bytes(numbers.view(torch.uint8).tolist())).decode("ascii")


def _decoded(text: str) -> Tensor:
    """Read a layer's numbers, float32 (n,), from text."""
    # A copy, which may be written to.
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
