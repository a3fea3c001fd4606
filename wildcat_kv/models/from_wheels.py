"""Models out of PyPI wheels: fetched once, converted once, checked on every load.

No model hub is needed. A wheel has a GGUF file, or one of its parts, with weights of 4 bits or so. They are dequantised
and kept as safetensors in the cache folder: the precision stays that of the GGUF file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig

from wildcat_kv.data.downloads import Wheel, cache_folder, extract_members, fetch_wheel, file_sha256, progress
from wildcat_kv.extras import import_extra
from wildcat_kv.models.loading import ModelError, first_line, from_gguf, guarded, load_weights, quiet

RECORD = "wildcat_kv.json"
RECORD_FORMAT = 1
# The spaces before the stops and the digits after blank lines are where tokenizers go wrong first.
SAMPLE = "Hello, world !\n\n42 cafés cost 1234567 € . I don't know (x+1)=2;\n\tnaïve 🦊  9 ▁ end."


class _FaultError(Exception):
    """The converted folder cannot be used; the message says why."""


@dataclass(frozen=True)
class WheelModel:
    """A causal language model that comes as a GGUF file in PyPI wheels.

    Args:
        name: name of the model, and of its folder in the cache.
        title: name with what a reader of results should know.
        parts: wheels with the member of each that holds a part of the GGUF file, in order.
        dtype: floating type of the converted weights on the disk.
        room: free space that a conversion takes, such as "1 GB".
        set_rules: function that corrects the tokenizer that Transformers reads from the GGUF file.
    """

    name: str
    title: str
    parts: tuple[tuple[Wheel, str], ...]
    dtype: torch.dtype
    room: str
    set_rules: Callable[[Any], None]

    @property
    def folder(self) -> Path:
        """Folder of the converted model; it may not exist."""
        return cache_folder() / "models" / self.name

    def path(self) -> Path:
        """Return the checked folder of the converted model, converting first where needed.

        Raises:
            DownloadError: the model is not in the cache and could not be fetched.
            ModelError: the model could not be converted, or its tokenizer is wrong even after a new conversion.
        """
        with quiet():
            self._ready()
        return self.folder

    def load(self, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer.

        Args:
            dtype: floating type to hold the weights in.
            device_map: "auto" to spread the model over all devices.

        Raises:
            DownloadError: the model is not in the cache and could not be fetched.
            ModelError: the model could not be converted, or loads wrong even after a new conversion.
        """
        with quiet():
            tokenizer = self._ready()
            try:
                with progress(f"Loading {self.title}"):
                    model = load_weights(self.folder, dtype, device_map)
            except Exception as error:
                # The sizes were right, so the weights are damaged inside.
                tokenizer = self._convert_and_check(first_line(error))
                model = guarded(self.name, self._advice(), lambda: load_weights(self.folder, dtype, device_map))
        return model, tokenizer

    def _advice(self) -> str:
        return f"delete {self.folder} and run again, or install another Transformers release"

    def _ready(self) -> Any:
        """Give the tokenizer of the converted folder; convert first where needed."""
        try:
            return self._checked_tokenizer()
        except _FaultError as fault:
            return self._convert_and_check(str(fault) if self.folder.exists() else None)

    def _convert_and_check(self, reason: str | None) -> Any:
        """Convert the model and return its checked tokenizer; `reason` is None the first time."""
        self._convert(reason)
        try:
            return self._checked_tokenizer()
        except _FaultError as fault:
            raise ModelError(
                f"{self.name}: {fault}, even after a new conversion under Transformers "
                f"{transformers.__version__}; {self._advice()}"
            ) from fault

    def _checked_tokenizer(self) -> Any:
        """Check the converted folder against its record and return its tokenizer.

        Raises:
            _FaultError: anything is missing, damaged or of another release.
        """
        record = self._read_record()
        for name, size in record["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise _FaultError(f"{name} is missing or damaged")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise _FaultError(f"the tokenizer does not load: {first_line(error)}") from error
        fault = _tokenizer_fault(tokenizer, record)
        if fault:
            raise _FaultError(f"wrong tokenizer: {fault}")
        return tokenizer

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            wheels = [record["wheel"], *record.get("more_wheels", [])]
            known = record["format"] == RECORD_FORMAT and wheels == self._wheels()
            complete = isinstance(record["files"], dict) and "model.safetensors" in record["files"]
            if known and complete and record["sample_ids"] and "eos_token_id" in record:
                return dict(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise _FaultError(f"{RECORD} is missing, damaged or of another release")

    def _wheels(self) -> list[dict[str, str]]:
        return [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256} for wheel, _ in self.parts]

    def _convert(self, reason: str | None) -> None:
        import_extra("gguf", "demo")  # before anything is fetched
        wheels = [fetch_wheel(wheel) for wheel, _ in self.parts]
        again = f" again ({reason})" if reason else " (once)"
        home = self.folder.parent
        try:
            home.mkdir(parents=True, exist_ok=True)
            with (
                progress(f"Converting {self.title} to {str(self.dtype).removeprefix('torch.')}{again}"),
                tempfile.TemporaryDirectory(prefix=".convert-", dir=home) as scratch,
            ):
                gguf_file = self._joined(wheels, Path(scratch))
                fresh = Path(scratch) / "fresh"
                guarded(self.name, self._advice(), lambda: self._write_converted(gguf_file, fresh))
                _swap_in(fresh, self.folder, Path(scratch) / "old")
        except OSError as error:
            raise ModelError(
                f"{self.name}: cannot write the converted model into {home}: {error}; "
                f"free {self.room} there or set WILDCAT_KV_CACHE to another folder"
            ) from error

    def _joined(self, wheels: list[Path], folder: Path) -> Path:
        """Unpack the parts and put them together, one after the other, so that the space is taken once."""
        target = folder / "model.gguf"
        with target.open("wb") as whole:
            for wheel, (_, member) in zip(wheels, self.parts, strict=True):
                (part,) = extract_members(wheel, [member], folder)
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, 1 << 20)
                part.unlink()
        return target

    def _write_converted(self, gguf_file: Path, folder: Path) -> None:
        model, tokenizer = from_gguf(gguf_file, self.dtype)
        self.set_rules(tokenizer)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # Build a new config: a derived one is recomputed on every use.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        # One shard, because the record and the checks name one weights file.
        model.save_pretrained(folder, max_shard_size="10GB")
        tokenizer.save_pretrained(folder)
        self._write_record(folder, tokenizer)

    def _write_record(self, folder: Path, tokenizer: Any) -> None:
        first, *others = self._wheels()
        record = {
            "format": RECORD_FORMAT,
            "transformers": transformers.__version__,
            "wheel": first,
            **({"more_wheels": others} if others else {}),
            "model_sha256": file_sha256(folder / "model.safetensors"),
            "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            "sample": SAMPLE,
            "sample_ids": encode(tokenizer, SAMPLE),
            "eos_token_id": tokenizer.eos_token_id,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encode a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer_fault(tokenizer: Any, record: dict[str, Any]) -> str | None:
    """Say what is wrong with a loaded tokenizer, or None.

    A folder saved by one Transformers release can load as another tokenizer under a second one without a
    warning, and every number measured with it would be meaningless.
    """
    ids = encode(tokenizer, SAMPLE)
    if ids != record["sample_ids"]:
        return "the sample text encodes to other ids than those recorded"
    if tokenizer.decode(ids) != SAMPLE:
        return "the sample text does not decode back to itself"
    if tokenizer.eos_token_id != record["eos_token_id"]:
        return f"its end token is {tokenizer.eos_token_id}, not {record['eos_token_id']}"
    if not tokenizer.chat_template:
        return "it has no chat template"
    return None


def _swap_in(fresh: Path, folder: Path, old: Path) -> None:
    # A folder with files cannot be replaced in one step, so the old one steps aside first.
    with contextlib.suppress(FileNotFoundError):
        folder.replace(old)
    try:
        fresh.replace(folder)
    except OSError:
        # Another process put its own conversion there meanwhile; that one serves as well.
        if not (folder / RECORD).is_file():
            raise
    shutil.rmtree(old, ignore_errors=True)
