"""Tiny random models of every family that Transformers knows, for text and for text with images.

`text_families()` and `image_families()` are names (`model_type`s); `tiny(name)` builds one, or says why it cannot.
Fields are shrunk by their names; a few families have fields of their own. Nothing here says which families work.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 200
WORDS = range(4, 120)  # Tokens of random texts; no special token is among them.
WINDOW = 24


class NotBuiltError(Exception):
    """Says why the zoo has no tiny model of a family."""


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Holds a tiny model and what makes its inputs.

    Attributes:
        name: the family's `model_type`.
        model: the model, in evaluation mode, float32.
        picture: pixel inputs of one image and its tokens; None for a model that is given text alone.
    """

    name: str
    model: Any
    picture: Picture | None = None

    def text(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Make random tokens, int64 (rows, length); the same seed gives the same beginning of each row."""
        return words(rows, length, seed)

    def inputs(self, length: int, seed: int = 0) -> dict[str, Any]:
        """Make the inputs of one row: random text, with the image in its midst where the model takes one."""
        if self.picture is None:
            ids = self.text(1, length, seed)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        half = self.text(1, length, seed).chunk(2, dim=1)
        ids = torch.cat((half[0], self.picture.tokens, half[1]), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.picture.pixels}
        for named, value in self.picture.types.items():
            inputs[named] = (ids == self.picture.token).long() * value
        return inputs


@dataclasses.dataclass(frozen=True)
class Picture:
    """Holds one image as a model takes it.

    Attributes:
        tokens: its tokens in the text, int64 (1, n).
        token: the id of the tokens that the image's features replace.
        pixels: further arguments of `forward`.
        types: arguments of the text's shape, with their value at the image's tokens and 0 elsewhere.
    """

    tokens: Tensor
    token: int
    pixels: Mapping[str, Any]
    types: Mapping[str, int]


def words(rows: int, length: int, seed: int = 0) -> Tensor:
    """Make random tokens, int64 (rows, length)."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (length, rows), generator=made).T.contiguous()


def text_families() -> list[str]:
    """List the families of causal language models, by `model_type`."""
    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_families() -> list[str]:
    """List the families that answer images and texts with text, by `model_type`."""
    return list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny(name: str, image: bool = False, **changes: Any) -> Tiny:
    """Build the tiny model of a family.

    Args:
        name: the family's `model_type`.
        image: whether it is the model for images and text, with an image among its inputs if one can be made.
        **changes: fields of the config, beside those of the zoo.

    Raises:
        NotBuiltError: says why there is none.
    """
    auto = tf.AutoModelForImageTextToText if image else tf.AutoModelForCausalLM
    try:
        config = small_config(name, **changes)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_config(config).float().eval()
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if not hasattr(model, "generate"):
        raise NotBuiltError(f"{type(model).__name__} has no generate()")
    _spread(model)
    model.generation_config.update(
        eos_token_id=None, bos_token_id=None, pad_token_id=0, forced_bos_token_id=None, forced_eos_token_id=None
    )
    picture = _picture(model) if image else None
    for module in model.modules():  # some keep the positions of the last image that they saw
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return Tiny(name, model, picture)


def small_config(name: str, **changes: Any) -> Any:
    """Build a family's config with all its sizes small.

    Args:
        name: the family's `model_type`.
        **changes: fields, beside those of the zoo.
    """
    return _small(CONFIG_MAPPING[name](**_DEFAULTS.get(name, {})), {**_OWN.get(name, {}), **changes})


def _small(config: Any, own: Mapping[str, Any]) -> Any:
    """Build the config anew, its fields shrunk by their names, except those given in `own`."""
    cls = type(config)
    # By vars(): some fields differ from layer to layer, and getattr() refuses to name one value.
    old = {field.name: vars(config)[field.name] for field in dataclasses.fields(cls) if field.name in vars(config)}
    fields = _unlike_the_class(cls, old) | _layers(config, own)
    for name, value in old.items():
        if isinstance(value, tf.PreTrainedConfig):
            fields[name] = _small(value, own.get(name) or {})
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[name] = _special(name)
        elif name in _SIZES and (value is not None or name == "head_dim") and not isinstance(value, str | list | tuple):
            fields[name] = _SIZES[name]
    fields |= _heads(config, old) | _vision(old)
    fields |= {name: value for name, value in own.items() if not isinstance(fields.get(name), tf.PreTrainedConfig)}
    if isinstance(old.get("rope_parameters"), dict) and "rope_parameters" not in own:
        fields["rope_parameters"] = _rope(old["rope_parameters"], fields.get("head_dim") or 16)
    return cls(**fields)


def _unlike_the_class(cls: type, old: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not the class's own defaults, as those of a sub-config may be."""
    try:
        usual = vars(cls())
    except Exception:  # a class that needs arguments: it was made with them
        usual = {}
    return {
        name: value
        for name, value in old.items()
        if isinstance(value, bool | float | str | list | tuple) and usual.get(name, value) != value
    }


def _layers(config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a layer of each kind, three at least, and of each list with an item a layer the same items."""
    named = [name for name in _DEPTHS if isinstance(vars(config).get(name), int)]
    if not named:
        return {}
    depth = vars(config)[named[0]]
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == depth > 4 and name not in own
    }
    kinds: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True) if lists else [()] * depth):
        kinds.setdefault(str(kind), layer)
    chosen = sorted(kinds.values())[:6]
    spare = [layer for layer in range(depth - 1, -1, -1) if layer not in chosen]
    chosen = sorted(chosen + spare[: max(0, 3 - len(chosen))])
    kept: dict[str, Any] = {name: [value[layer] for layer in chosen] for name, value in lists.items()}
    return {name: len(chosen) for name in named if vars(config)[name] == depth or name.endswith("_layers")} | kept


def _heads(config: Any, old: Mapping[str, Any]) -> dict[str, Any]:
    """Four heads, and two of keys where these are fewer than the queries'."""
    kept = {}
    for name, value in old.items():
        if isinstance(value, int) and name.endswith(("num_key_value_heads", "num_kv_heads")):
            heads = old.get(name.replace("key_value", "attention").replace("kv", "attention"))
            kept[name] = 4 if heads == value else min(value, 2)
    return kept


def _vision(old: Mapping[str, Any]) -> dict[str, Any]:
    """Images of four patches a side."""
    if isinstance(old.get("patch_size"), int) and isinstance(old.get("image_size"), int):
        return {"image_size": 4 * old["patch_size"]}
    return {}


def _rope(parameters: dict[str, Any], channels: int) -> dict[str, Any]:
    """Rotary parameters for heads of `channels`, those that list something a channel cut to fit."""
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        return {kind: _rope(value, channels) for kind, value in parameters.items()}
    small = copy.deepcopy(parameters)
    half = int(channels * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:half]
    if small.get("mrope_section"):
        grids = len(small["mrope_section"])
        small["mrope_section"] = [half - (grids - 1) * (half // grids), *[half // grids] * (grids - 1)]
    return small


def _special(name: str) -> int:
    """The token id of a special token, the same for the same name in every config of a model."""
    if name in _TOKENS:
        return _TOKENS[name]
    return 130 + sum(map(ord, name.replace("_index", "_id"))) % 60


def _spread(model: Any) -> None:
    """Make scores spread wide enough for attention to matter: larger weights where a family starts with small ones."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif not bool(torch.isfinite(parameter).all()):  # some are left empty
            parameter.data = torch.ones(parameter.shape)


def _picture(model: Any) -> Picture | None:
    """Make the image that the model takes, in the first of the usual layouts that its forward pass accepts."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    features = getattr(model, "get_image_features", None)
    if not isinstance(token, int) or features is None:
        return None
    named = inspect.signature(model.forward).parameters
    types = {name: 1 for name in ("mm_token_type_ids", "token_type_ids") if name in named}
    start, end = (
        next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
        for names in (
            ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
            ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
        )
    )
    for pixels in _layouts(model):
        with contextlib.suppress(Exception), torch.no_grad():
            count = _count(features(**pixels))
            tokens = [*[start] * (start is not None), *[token] * count, *[end] * (end is not None)]
            made = Tiny("", model, Picture(torch.tensor([tokens]), token, pixels, types))
            inputs = made.inputs(8)
            one = model(**inputs).logits
            other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits
            if torch.isfinite(one).all() and not torch.equal(one, other):
                return made.picture
    return None


def _layouts(model: Any) -> Iterator[dict[str, Any]]:
    """The ways in which families take the pixels of one image."""
    generator = torch.Generator().manual_seed(5)
    vision = getattr(model.config, "vision_config", model.config)
    patch, merge = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", None) or 3
    size = size[0] if isinstance(size, list | tuple) else size
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    sides = [*([size] if isinstance(size, int) else []), 8 * patch, 4 * patch, 384, 224]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        for depth in dict.fromkeys((merge, 1)):
            pixels = noise(64, channels * depth * patch * patch)
            grid = {"image_grid_thw": torch.tensor([[1, 8, 8]])}
            yield {"pixel_values": pixels, **grid}
            yield {"pixel_values": pixels, **grid, "image_merge_sizes": torch.tensor([2])}
            yield {"pixel_values": pixels.view(1, 64, channels * depth, patch, patch), **grid}
    if "image_position_ids" in inspect.signature(model.forward).parameters:
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(-1)[None]
        yield {"pixel_values": noise(1, 36, channels * patch * patch), "image_position_ids": places}
    for side in dict.fromkeys(sides):
        yield {"pixel_values": noise(1, channels, side, side)}
        yield {"pixel_values": noise(1, channels, side, side), "image_sizes": torch.tensor([[side, side]])}
        yield {"pixel_values": noise(1, 1, channels, side, side)}
        yield {"pixel_values": noise(1, 3, channels, side, side), "image_sizes": torch.tensor([[side, side]])}


def _count(features: Any) -> int:
    """The number of tokens that an image's features stand for."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _each(names: str, value: Any) -> dict[str, Any]:
    """The same value for several names."""
    return dict.fromkeys(names.split(), value)


_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "layers",
    "depth",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 198, "eos_token_id": 199, "decoder_start_token_id": 198}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "n_positions": 4096,
    "initializer_range": 0.2,
    **_each(
        "hidden_size d_model n_embd embed_dim word_embed_proj_dim projection_dim out_hidden_size "
        "text_hidden_size embedding_size hidden_dim dim output_dim projector_hidden_size encoder_hidden_size "
        "emb_dim attention_hidden_size encoder_hidden_dim lm_hidden_size n_embed",
        64,
    ),
    **_each(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner mlp_dim d_ff ffn_hidden_size dff "
        "intermediate_size_mlp dense_intermediate_size encoder_intermediate_dim decoder_intermediate_dim",
        96,
    ),
    **_each(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size share_expert_dim "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size expert_intermediate_size "
        "shared_experts_intermediate_size",
        32,
    ),
    **_each(
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_sliding_attention_heads linear_num_value_heads linear_num_heads",
        4,
    ),
    **_each("linear_num_key_heads index_n_heads n_mamba_heads", 2),
    **_each(
        "head_dim global_head_dim swa_head_dim v_head_dim qk_head_dim kv_channels attention_head_dim d_kv "
        "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim kv_lora_rank mamba_d_head "
        "mamba_head_dim mamba_chunk_size chunk_size",
        16,
    ),
    **_each("qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size ssm_state_size index_topk", 8),
    "q_lora_rank": 24,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts", 4),
    **_each("num_experts_per_tok moe_k moe_topk num_experts_per_token top_k_experts", 2),
    **_each("n_group topk_group num_expert_group topk_groups", 1),
    **_each("sliding_window sliding_window_size attention_window local_window_size", WINDOW),
    "attention_chunk_size": WINDOW,
    "first_k_dense_replace": 1,
}
# Fields without which a class cannot be made.
_DEFAULTS = _each("gemma4 gemma4_unified", {"vision_config": {}})
# Fields that no rule of names gets right.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
    },
}
_DECODER = {"is_decoder": True}
_GEMMA4 = {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
}
_QWEN4 = {
    "hc_lowrank": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    **_each(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer",
        _DECODER,
    ),
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "roc_bert": {**_DECODER, "pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "bamba": {"attn_layer_indices": [1, 2], **_MAMBA},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention"], **_MAMBA},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "mamba2": {"num_heads": 8},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    **_each("glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_vl qwen2_vl hunyuan_vl", _MROPE),
    **_each("gemma3 shieldgemma2", {"mm_tokens_per_image": 4}),
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "mllama": {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1]}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "idefics2": {"text_config": {"sliding_window": None}},
    "qwen2_5_omni_thinker": {**_MROPE, "vision_start_token_id": 152},
    "qwen3_omni_moe_thinker": {**_MROPE, "vision_start_token_id": 152},
    "nemotron": {"num_key_value_heads": 2},
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "dots3_note_text": {
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds": False, **_DECODER},
}
