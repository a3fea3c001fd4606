"""Models that can be compressed, told by the config alone."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from wildcat_kv.models.modeling_source import INSTEAD, OWN_CACHE, unfit_attention

# Transformers' own layers that may stand beside compressed ones: their masks are not the causal one.
_BESIDE = {"DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"}


def decoder_config(config: Any) -> Any:
    """Take the decoder's config out of a model's.

    It alone is switched to the "wildcat" attention: a vision tower keeps its own.

    Args:
        config: a Transformers config.

    Raises:
        TypeError: config is none.
        ValueError: the model's attention cannot be followed; says why.
    """
    if not hasattr(config, "get_text_config"):
        hint = "; pass model.config" if hasattr(config, "config") else ""
        raise TypeError(f"config={type(config).__name__} is no Transformers config{hint}")
    try:
        decoder = config.get_text_config(decoder=True)
    except ValueError as error:  # several decoders
        raise ValueError(f"config={type(config).__name__}: {_line(error)}; {OWN_CACHE}") from None
    if reason := _reason(config, decoder):
        raise ValueError(f"config={type(config).__name__}: {reason}")
    return decoder


def cache_layers(decoder: Any) -> tuple[list[Any], list[int]]:
    """Build an uncompressed cache's layers, with indices of those to compress.

    Raises:
        ValueError: there are none, or others that share their mask.
    """
    try:
        layers = DynamicCache(config=decoder).layers
    except Exception as error:  # Transformers reads fields that not every config has
        raise ValueError(
            f"config={type(decoder).__name__}: Transformers cannot tell its layers ({_line(error)}); {OWN_CACHE}"
        ) from None
    positions = getattr(decoder, "max_position_embeddings", None) or float("inf")
    full = [index for index, layer in enumerate(layers) if _sees_everything(layer, positions)]
    kinds = {type(layer).__name__ for index, layer in enumerate(layers) if index not in full}
    if not full:
        raise ValueError(
            f"config={type(decoder).__name__}: no full-attention layer to compress, all layers are "
            f"{', '.join(sorted(kinds))}; {INSTEAD}"
        )
    # A layer that attends to everything by itself would lose its mask to the compressed layers.
    if strangers := sorted(kinds - _BESIDE):
        raise ValueError(
            f"config={type(decoder).__name__}: layers of {', '.join(strangers)} are not supported; {INSTEAD}"
        )
    return layers, full


def with_parts(config: Any) -> list[Any]:
    """List a config and the configs within it."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(inner for part in parts if part is not None for inner in with_parts(part))]


def check_prompt(model: Any, wrapped: Any = None) -> None:
    """Refuse a model that PEFT gives a learned prompt.

    Args:
        model: a Transformers model, or PEFT's around it.
        wrapped: PEFT's model around it, where that is known; by default what `model` itself tells.

    Raises:
        ValueError: says what to use instead.
    """
    if wrapped is None:  # PEFT hangs its own method into the model that it wraps while it generates
        wrapped = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    if getattr(getattr(wrapped, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model={type(model).__name__}: prompt learning of PEFT puts keys of its own before the prompt's, which "
            "cannot be compressed with them; use another adapter, such as LoRA"
        )


def dropped_from(decoder: Any) -> int | None:
    """Return the length from which `generate()` drops its cache; None for never.

    Some models with two sets of rotary frequencies (Phi-3) start over where the longer set takes over.
    """
    length, positions = (
        getattr(decoder, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")
    )
    return length if length and positions and length < positions else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _sees_everything(layer: Any, positions: float) -> bool:
    """Tell whether one of Transformers' layers keeps all tokens."""
    # Exactly these classes: subclasses keep what they need by themselves.
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window >= positions
    return type(layer) is DynamicLayer


def _reason(config: Any, decoder: Any) -> str | None:
    """Say why this model cannot be compressed; None if it can."""
    if _field(config, "is_encoder_decoder"):
        return f"encoder-decoder models attend across to the encoder, which is not supported; {INSTEAD}"
    if _field(decoder, "kv_lora_rank"):
        return "multi-head latent attention (MLA) caches latents from which keys are made later, not keys; " + INSTEAD
    if _field(decoder, "num_kv_shared_layers") or "reuse" in (_field(decoder, "kv_sharing_modes") or ()):
        return f"layers that share keys and values are not supported; {INSTEAD}"
    if _field(decoder, "cross_attention_layers"):
        return f"layers that attend across to an image keep its keys in the cache, which is not supported; {INSTEAD}"
    if config is decoder and _field(decoder, "use_bidirectional_attention") in (True, "all"):
        return f"its tokens see later ones, which cannot be compressed; {INSTEAD}"
    if decoder.model_type == "glm_image_text":
        return f"the model keeps the positions of the image that it draws, where no cache can carry them; {INSTEAD}"
    return unfit_attention(decoder)


def _field(config: Any, name: str) -> Any:
    """Read a config's field, any layer's where they differ; None without one."""
    try:
        return getattr(config, name, None)
    except Exception:  # Transformers refuses to name one value for all layers
        return vars(config).get(name)
