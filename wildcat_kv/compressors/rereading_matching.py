"""Attention Matching with the queries of a model that repeats the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.attention_matching import AttentionMatching
from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.repetition import Repetition


@dataclass(frozen=True)
class RereadingMatching(AttentionMatching):
    """Fit keys, weights and values to what the model's repetition attends to.

    This is Attention Matching, and its reference queries are those of the repeated tokens, as in the paper: at most
    `queries` of them, evenly spread. It needs the model, and reads a text twice: `wildcat_kv.compress_context` does so.
    What is generated later is compressed as by Attention Matching.

    The carried state of a token is 1 once it was repeated.

    Source: Zweiger, Fu, Guo and Kim, arXiv 2602.16284, with its repeated text; without the questions that a model asks
    itself.
    """

    reads_twice: ClassVar[bool] = True
    learns_from_repetition: ClassVar[bool] = True
    state_size: ClassVar[int] = 1

    @override
    def reread(self, repetition: Repetition) -> Tensor:
        part = repetition.keys[:, :, repetition.start : repetition.stop, :1]
        return torch.ones_like(part, dtype=torch.float32)

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        state = block.carried_state
        # Once something is compressed, the text was read twice, or what came later is compressed.
        if block.exact == block.keys.shape[2] and (state is None or not bool(state.any())):
            raise ValueError(
                "RereadingMatching has no queries of a repetition; call wildcat_kv.compress_context(model, tokenizer, "
                "text, compressor='rereading_matching', ...)"
            )
        return super().compress(block, rank)
