"""Identity of a served model: its config, and numbers of its weights read from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from wildcat_kv.integrations.vllm.folder import ContextHeader
from wildcat_kv.models.identity import ModelIdentity, is_near, spread
from wildcat_kv.models.support import decoder_config

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ServedModel:
    """A model that answers about contexts.

    Attributes:
        name: folder or hub id, for messages.
        folder: folder of its checkpoint; None if it is not at hand, so that weights cannot be compared.
        identity: shapes and positions.
    """

    name: str
    folder: Path | None
    identity: ModelIdentity

    @staticmethod
    def of(name: str, revision: str | None = None, config: Any = None) -> ServedModel:
        """Look at a model.

        Args:
            name: folder or hub id.
            revision: revision of a hub id.
            config: its Transformers config; read from the checkpoint by default.

        Raises:
            ValueError: the model cannot be found, or cannot be compressed.
        """
        folder = _checkpoint(name, revision)
        if config is None:
            try:
                config = AutoConfig.from_pretrained(folder or name, revision=revision)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"model={name!r} has no config that can be read: {reason}") from None
        # As a cache that has read text alone is described.
        return ServedModel(name, folder, ModelIdentity.of(decoder_config(config), config).without_senses())

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.identity.vocab_size)  # type: ignore[arg-type]  # a JsonValue

    def check(self, context: str, header: ContextHeader) -> None:
        """Refuse a context of another model.

        Args:
            context: name of the context, for the message.
            header: its description.

        Raises:
            ValueError: says in what the models differ.
        """
        if difference := header.model.without_senses().difference(self.identity):
            raise ValueError(f"context={context!r} is of another model than {self.name!r}: {difference}")
        name = next((name for name, numbers in header.samples.items() if self._differs(name, numbers)), None)
        if name is not None:
            raise ValueError(
                f"context={context!r} is of a model with other weights than {self.name!r}, {name} differs; serve the "
                "revision that read the text"
            )

    def _differs(self, name: str, numbers: list[float]) -> bool:
        """Tell if sampled numbers of a parameter are others in the checkpoint, where it has the parameter."""
        path = self._files.get(name)
        if path is None:
            return False
        found = _numbers(path, name, len(numbers))
        return found is not None and not all(is_near(here, there) for here, there in zip(found, numbers, strict=True))

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Files of the checkpoint's parameters, by name."""
        if self.folder is None:
            return {}
        index = self.folder / _INDEX
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in named.items()}
        return dict(_named(self.folder))


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, path
        except SafetensorError:
            continue


def _numbers(path: Path, name: str, count: int) -> list[float] | None:
    """Read the numbers of a parameter that `weight_samples` takes; None if it is no plain tensor of floats."""
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        if part.get_dtype() not in ("F64", "F32", "BF16", "F16") or not 1 <= len(shape) <= 2:
            return None
        total = shape[0] * (shape[1] if len(shape) == 2 else 1)
        if count > total:
            return None
        places = spread(range(total), count)
        if len(shape) == 1:
            return [float(part[place]) for place in places]
        return [float(part[place // shape[1], place % shape[1]]) for place in places]


def _checkpoint(name: str, revision: str | None) -> Path | None:
    """Find the folder of a model's checkpoint; None for a hub id that is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None
