"""Tiny random encoders of the families that dispatch through Transformers' attention interface."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 4}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 40,
    "max_target_positions": 20,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
BART = {name: WHISPER[name] for name in WHISPER if name.startswith(("d_", "encoder", "decoder", "vocab"))}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and what it reads.

    Attributes:
        model: name of Transformers' class.
        config: name of its config class.
        fields: fields of the config.
        inputs: function that makes the inputs; with padding where the argument is True and the family has masks.
        layers: number of layers that are replaced.
        masks: True if the family takes masks of padding.
    """

    model: str
    config: str
    fields: dict[str, Any]
    inputs: Callable[[bool], dict[str, Any]]
    layers: int = 2
    masks: bool = False

    def build(self, implementation: str = "sdpa", **changes: Any) -> Any:
        """Make the model, with weights large enough for attention that is not uniform."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.fields, **changes})
        model = getattr(transformers, self.model)._from_config(config, attn_implementation=implementation).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(8.0)
        return model


def text(padded: bool, key: str = "input_ids") -> dict[str, Any]:
    ids = torch.randint(3, 50, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 30, dtype=torch.int64)
    if padded:
        mask[1, 18:] = 0
    return {key: ids, "attention_mask": mask}


def image(_: bool) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def sound(_: bool) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 80, generator=torch.Generator().manual_seed(1))}


def whisper(padded: bool) -> dict[str, Any]:
    return {**sound(padded), "decoder_input_ids": torch.tensor([[1, 5, 7], [1, 9, 4]])}


FAMILIES = {
    "vit": Family("ViTModel", "ViTConfig", IMAGE, image),
    "deit": Family("DeiTModel", "DeiTConfig", IMAGE, image),
    "dinov2": Family("Dinov2Model", "Dinov2Config", IMAGE, image),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", IMAGE, image),
    "dinov3_vit": Family("DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, image),
    "clip_vision": Family("CLIPVisionModel", "CLIPVisionConfig", IMAGE, image),
    "siglip_vision": Family("SiglipVisionModel", "SiglipVisionConfig", IMAGE, image),
    "bert": Family("BertModel", "BertConfig", {**SIZES, "vocab_size": 60}, text, masks=True),
    "roberta": Family("RobertaModel", "RobertaConfig", {**SIZES, "vocab_size": 60}, text, masks=True),
    "electra": Family("ElectraModel", "ElectraConfig", {**SIZES, "vocab_size": 60}, text, masks=True),
    "modernbert": Family(
        "ModernBertModel",
        "ModernBertConfig",
        {**SIZES, "num_hidden_layers": 4, "vocab_size": 60, "pad_token_id": 0, "local_attention": 8}
        | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        text,
        masks=True,
    ),
    "whisper": Family("WhisperModel", "WhisperConfig", WHISPER, whisper),
    "bart": Family("BartModel", "BartConfig", {**BART, "max_position_embeddings": 64}, text, masks=True),
}
