"""Format of an exported context: a folder with a header and one file of tensors.

The header, context.json, names the tensors' file by its SHA-256. It is written last, so that a folder holds a whole
context at any time, the old one or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wildcat_kv.files import replacing
from wildcat_kv.models.identity import ModelIdentity

FORMAT: Literal["wildcat_kv context for vLLM"] = "wildcat_kv context for vLLM"
VERSION: Literal[1] = 1
HEADER = "context.json"
# A header is small; a larger file is none.
_MOST_HEADER_BYTES = 1 << 22
_BLOCK = 1 << 22
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class FoldingCost(BaseModel):
    """Cost of weights folded into keys, measured on the context's own queries.

    Attributes:
        error: relative error of attention to the entries, root mean square over layers and heads.
        worst: largest such error of a layer.
        queries: number of queries of a head that it was measured on; they were not fitted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: float
    worst: float
    queries: int


class ContextHeader(BaseModel):
    """Description of an exported context.

    Attributes:
        format: name of the format.
        version: version of the format.
        model: shapes and positions of the model.
        samples: samples of the model's weights, see `weight_samples`.
        method: method that compressed the text.
        tokens: number of tokens of the text.
        slots: entries of each head, r: the prompt's prefix in tokens.
        stored: entries of a head that are no padding, on average.
        layers: number of layers.
        heads: number of key heads of a layer.
        key_channels: channels of a key.
        value_channels: channels of a value.
        dtype: dtype of keys and values, such as "float32".
        weighted: True if the entries have weights, which need the weighted backend.
        folding: cost of weights that were folded into keys; None if there were none to fold.
        sha256: SHA-256 of the tensors' file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["wildcat_kv context for vLLM"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelIdentity
    samples: dict[str, list[float]]
    method: str
    tokens: int = Field(ge=1)
    slots: int = Field(ge=1)
    stored: float
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    key_channels: int = Field(ge=1)
    value_channels: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float16"]
    weighted: bool
    folding: FoldingCost | None = None
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def tensors_name(self) -> str:
        """Name of the tensors' file."""
        return f"entries-{self.sha256[:16]}.safetensors"


@dataclass(frozen=True)
class LayerTensors:
    """Entries of some heads of one layer.

    Attributes:
        index: index of the layer.
        keys: (heads, slots, d).
        values: (heads, slots, d_v); the numerators, where there are weights.
        weights: float32 (heads, slots); None where all are 1.
    """

    index: int
    keys: Tensor
    values: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class StoredContext:
    """An exported context in its folder.

    Attributes:
        folder: path of the folder.
        header: description.
        digest: digest of the header, 24 bytes; it tells contexts apart.
    """

    folder: Path
    header: ContextHeader
    digest: bytes

    @property
    def path(self) -> Path:
        """Path of the tensors' file."""
        return self.folder / self.header.tensors_name

    def check_tensors(self) -> None:
        """Read the whole file of tensors, and compare its SHA-256.

        Raises:
            ValueError: the file is missing or damaged.
        """
        try:
            found = _sha256(self.path)
        except OSError as error:
            raise ValueError(f"{self._named} is damaged: {self.path.name}: {error.strerror}; export it again") from None
        if found != self.header.sha256:
            raise ValueError(f"{self._named} is damaged: {self.path.name} has another SHA-256; export it again")

    def layers(self, indices: Iterable[int], heads: slice = slice(None)) -> Iterator[LayerTensors]:
        """Read the entries of some heads, layer by layer.

        Args:
            indices: indices of the layers.
            heads: key heads to read.

        Raises:
            ValueError: the file is missing, or does not fit the header.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                for index in indices:
                    yield self._layer(file, index, heads)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._named} is damaged: {' '.join(str(error).split())}; export it again") from None

    def _layer(self, file: Any, index: int, heads: slice) -> LayerTensors:
        header = self.header

        def read(name: str) -> Tensor:
            return file.get_slice(f"layers.{index}.{name}")[heads]

        found = LayerTensors(index, read("keys"), read("values"), read("weights") if header.weighted else None)
        expected = {(header.slots, header.key_channels), (header.slots, header.value_channels)}
        fits = {tuple(tensor.shape[1:]) for tensor in (found.keys, found.values)} == expected
        if not fits or {found.keys.dtype, found.values.dtype} != {getattr(torch, header.dtype)}:
            raise ValueError(f"{self._named} is damaged: layer {index} does not fit its header; export it again")
        return found

    @property
    def _named(self) -> str:
        return f"context={self.folder.name!r}"


def is_name(name: str) -> bool:
    """Tell if a context may have this name: letters, digits, hyphens and underscores, 100 at most."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return a name that a context may have.

    Raises:
        ValueError: it has other characters.
    """
    if not is_name(name):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise ValueError(
            f"context={shown!r} is no name of a context; take letters, digits, hyphens and underscores, 100 at most"
        )
    return name


def write_context(folder: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> StoredContext:
    """Write a context to its folder; an older one there is replaced.

    Args:
        folder: path of the folder; it is made if its parent is there.
        header: fields of `ContextHeader`, without the SHA-256.
        tensors: tensors by name, as `StoredContext.layer` reads them.

    Raises:
        FileNotFoundError: the parent is not there.
        OSError: it cannot be written.
    """
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"output={str(folder)!r}: there is no folder {str(folder.parent)!r}; make it first")
    folder.mkdir(exist_ok=True)
    first = folder / f".entries.{os.getpid()}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, first)
        made = ContextHeader(**header, sha256=_sha256(first))
        first.chmod(0o644)
        first.replace(folder / made.tensors_name)
    finally:
        first.unlink(missing_ok=True)
    with replacing(folder / HEADER) as partial:
        partial.write_text(made.model_dump_json(indent=1), encoding="utf-8")
    for older in folder.glob("entries-*.safetensors"):
        if older.name != made.tensors_name:
            older.unlink()
    return read_context(folder)


def read_context(folder: Path) -> StoredContext:
    """Read the header of a context's folder.

    Args:
        folder: path of the folder.

    Raises:
        FileNotFoundError: there is no such folder, or no context in it.
        ValueError: a damaged header, or one of another version.
    """
    name, path = folder.name, folder / HEADER
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_HEADER_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"context={name!r}: there is no such context; `wildcat-kv export` makes one") from None
    except OSError as error:
        raise ValueError(f"context={name!r} cannot be read: {error.strerror}; check its permissions") from None
    if len(content) > _MOST_HEADER_BYTES:
        raise ValueError(f"context={name!r} is damaged: {HEADER} is too large; export it again")
    return StoredContext(folder, _parsed(name, content), hashlib.sha256(content).digest()[:24])


def _parsed(name: str, content: bytes) -> ContextHeader:
    """Parse a header; the version is looked at first."""
    try:
        found = _Version.model_validate_json(content)
    except ValidationError:
        raise ValueError(f"context={name!r} is damaged: {HEADER} is no header of a context; export it again") from None
    if found.format != FORMAT or found.version != VERSION:
        raise ValueError(
            f"context={name!r} has format {found.format!r} version {found.version}, and this release reads {FORMAT!r} "
            f"version {VERSION}; export it again"
        )
    try:
        return ContextHeader.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise ValueError(f"context={name!r} is damaged: {field}: {fault['msg']}; export it again") from None


class _Version(BaseModel):
    """The part of a header that all versions have."""

    format: str
    version: int


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
