"""Tiny random models that keep rotary positions on themselves (M-RoPE), and prompts with an image, one a family."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf

from tests.tiny import SMALL, random_ids

# One image of 8 x 8 patches, merged in twos to 16 tokens, which take 4 positions.
_SIDE, _MERGE = 8, 2
_TOKENS = (_SIDE // _MERGE) ** 2
# Ids beyond those of `random_ids`.
_IMAGE, _START, _SPECIAL = 120, 121, 122
_VOCABULARY = 150
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "patch_size": 4,
    "image_size": 32,
    "num_position_embeddings": 64,
    "num_patches": 64,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Seeing:
    """One family of models that see.

    Attributes:
        config: name of its config class in Transformers; that of the model follows from it.
        text: fields of the decoder's config beside those of `tests.tiny.SMALL`.
        vision: fields of the vision part's config beside the usual ones.
        top: further fields of the whole config.
        model: name of its model class, where it is not that of the config.
        frames: frames of a patch; 0 for patches side by side in a strip.
        tokens: tokens of the image.
        kinds: whether it wants to be told the kind of each token.
        folded: whether its patches come as (patches, channels, height, width).
    """

    config: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    frames: int = 2
    tokens: int = _TOKENS
    kinds: bool = True
    folded: bool = False


_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
_QWEN3 = {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
_HALF = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_FOUR = {**_ROPE, "mrope_section": [2, 2, 2, 2]}
_ERNIE = {
    "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]},
    "moe_num_experts": 2,
    "moe_k": 1,
    "moe_intermediate_size": [32, 32],
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_AUDIO = {
    "vision_start_token_id": _START,
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "output_dim": 64,
        "downsample_hidden_size": 16,
    },
}
_DEEP = {"deepstack_visual_indexes": [0]}
SEEING = {
    "qwen2_vl": Seeing("Qwen2VLConfig", vision={"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": Seeing("Qwen2_5_VLConfig", vision={"window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3_vl": Seeing("Qwen3VLConfig", _QWEN3, _DEEP),
    "qwen3_vl_moe": Seeing("Qwen3VLMoeConfig", {**_QWEN3, **_EXPERTS}, _DEEP),
    "qwen3_5": Seeing("Qwen3_5Config", {**_QWEN3, **_LINEAR}),
    "qwen3_5_moe": Seeing("Qwen3_5MoeConfig", {**_QWEN3, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "glm4v": Seeing("Glm4vConfig"),
    "glm46v": Seeing("Glm46VConfig"),
    "glm4v_moe": Seeing("Glm4vMoeConfig", {**_EXPERTS, "n_routed_experts": 2, "rope_parameters": _HALF}),
    "glm_ocr": Seeing("GlmOcrConfig", {"rope_parameters": _HALF}),
    "ernie4_5_vl_moe": Seeing("Ernie4_5_VLMoeConfig", _ERNIE, frames=1),
    "paddleocr_vl": Seeing("PaddleOCRVLConfig", frames=1, folded=True),
    "hunyuan_vl": Seeing("HunYuanVLConfig", {"rope_parameters": _FOUR}, frames=1, tokens=22),
    "minicpmv4_7": Seeing("MiniCPMV4_7Config", {**_QWEN3, **_LINEAR}, {"insert_layer_id": 0}, frames=0, tokens=4),
    "cohere_compass": Seeing("CohereCompassConfig", {"rope_parameters": {"full_attention": _ROPE}}),
    "cosmos3_edge": Seeing("Cosmos3EdgeConfig", frames=1),
    "cosmos3_omni": Seeing("Cosmos3OmniConfig"),
    "exaone4_5": Seeing(
        "Exaone4_5_Config", {"model_type": "exaone4", "layer_types": ["full_attention"] * 3}, kinds=False
    ),
    "qwen2_5_omni": Seeing("Qwen2_5OmniThinkerConfig", top=_AUDIO, vision={"fullatt_block_indexes": [1]}, kinds=False),
    "qwen3_omni_moe": Seeing("Qwen3OmniMoeThinkerConfig", {**_QWEN3, **_EXPERTS}, _DEEP, _AUDIO, kinds=False),
    "hyperclovax_vision_v2": Seeing("HyperCLOVAXVisionV2Config", kinds=False),
}


def seeing_model(family: str, **vision: Any) -> Any:
    """A random model; `vision` changes the config of its vision part."""
    entry = SEEING[family]
    if not hasattr(tf, entry.config):
        pytest.skip(f"this version of Transformers has no {entry.config}")
    torch.manual_seed(1)
    kind = getattr(tf, entry.config)
    names = [name for name in kind().to_dict() if name.endswith("_token_id")]
    special = {name: _SPECIAL + place for place, name in enumerate(names)} | {"image_token_id": _IMAGE}
    if "vision_start_token_id" in {*names, *entry.top}:
        special["vision_start_token_id"] = _START
    text = {**SMALL, "vocab_size": _VOCABULARY, "rope_parameters": _ROPE, **entry.text}
    config = kind(text_config=text, vision_config={**_VISION, **entry.vision, **vision}, **{**entry.top, **special})
    return getattr(tf, entry.model or entry.config.removesuffix("Config") + "ForConditionalGeneration")(config).eval()


def image_prompt(family: str, rows: int = 1, before: int = 30, after: int = 40, seed: int = 0) -> dict[str, Any]:
    """Inputs with one image of 16 tokens a row, between words."""
    entry = SEEING[family]
    image = torch.full((rows, entry.tokens), _IMAGE)
    start = torch.full((rows, 1), _START)
    ids = torch.cat((random_ids(rows, before, seed + 1), start, image, random_ids(rows, after, seed + 2)), dim=1)
    generator = torch.Generator().manual_seed(seed + 5)
    side = _VISION["patch_size"]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if entry.kinds:
        prompt["mm_token_type_ids"] = (ids == _IMAGE).long()
    if not entry.frames:
        strip = torch.randn(1, 3, side, rows * _SIDE**2 * side, generator=generator)
        return {**prompt, "pixel_values": strip, "target_sizes": torch.tensor([[_SIDE, _SIDE]] * rows)}
    pixels = torch.randn(rows * _SIDE**2, 3 * entry.frames * side**2, generator=generator)
    pixels = pixels.view(-1, 3, side, side) if entry.folded else pixels
    return {**prompt, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, _SIDE, _SIDE]] * rows)}
