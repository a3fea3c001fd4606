"""kvpress on the texts; runs in its environment, which has another Transformers, and knows no wildcat_kv.

Its own pipeline reads a text under a press and asks the questions. What differs is the last step: the right answer is
scored instead of one being written. Texts come as JSON lines on standard input; a line a cell goes to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
from kvpress.pipeline import KVPressTextGenerationPipeline  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache
from transformers.utils.logging import disable_progress_bar

from eval.kvpress.scoring import check_ids, compression_ratio, score
from eval.plain_caches import copied, held_bytes


class KVzip(kvpress.KVzipPress):
    """Their KVzip, whose second reading of a text serves all ratios.

    The scores do not depend on the ratio. They are those of exact keys: over a QuantizedCache the second reading finds
    the keys of the context alone, where it looks for those of the repetition behind them.

    Attributes:
        remembered: scores of the last text.
        spared: seconds of the second reading, where it was not needed again.
    """

    remembered: Tensor | None = None
    spared = 0.0
    _took = 0.0

    def _perform_kvzip_compression(self, model: Any, tokenizer: Any) -> None:
        if self.remembered is None:
            started = time.process_time()
            super()._perform_kvzip_compression(model, tokenizer)
            self._took = time.process_time() - started
        else:
            self.score_val, self.spared = self.remembered.clone(), self._took
            self.compress_post(model)

    def compress_post(self, model: Any) -> None:
        """Remember the scores, which the press forgets when it is done."""
        self.remembered = self.score_val.clone()
        super().compress_post(model)


def presses() -> dict[str, Any]:
    """Make their presses, as kvpress's own evaluation has them (`evaluate_registry.py`)."""
    return {
        "kvzip": KVzip(),
        "adakv_compactor": kvpress.AdaKVPress(kvpress.CompactorPress()),
        "expected_attention": kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(epsilon=1e-2)),
        "keydiff": kvpress.KeyDiffPress(),
        "snapkv": kvpress.SnapKVPress(),
    }


class ScoringPipeline(KVPressTextGenerationPipeline):
    """Their pipeline, which scores the right answers instead of writing some.

    Attributes:
        text: text that is read, with its questions.
        found: scores of the answers, and what the cache held before the first question.
        started: seconds of the processor when the text was given.
    """

    text: Mapping[str, Any]

    def measure(self, text: Mapping[str, Any], press: Any, cache: Any) -> dict[str, Any]:
        """Read a text under a press into a cache, and score the answers."""
        self.text, self.started = text, time.process_time()
        self.found: dict[str, Any] = {"answers": []}
        questions = [question["question"] for question in text["questions"]]
        self(text["context"], questions=questions, press=press, cache=cache)
        return self.found

    def preprocess(self, context: str, questions: list[str], answer_prefix: str, *others: Any, **more: Any) -> Any:
        """Encode each question with the beginning of its own answer, by their own code."""
        parts = [
            super(ScoringPipeline, self).preprocess(context, [question], asked["lead"], *others, **more)
            for question, asked in zip(questions, self.text["questions"], strict=True)
        ]
        encoded = {
            "context_ids": parts[0]["context_ids"],
            "questions_ids": [ids for part in parts for ids in part["questions_ids"]],
        }
        check_ids(encoded, self.text)
        return encoded

    def generate_answer(self, question_ids: Tensor, cache: Any, context_length: int, max_new_tokens: int) -> str:
        """Score the right answer over a copy of the cache."""
        if not self.found["answers"]:
            self.found |= {"seconds": time.process_time() - self.started, **held(self.model, cache)}
        asked = self.text["questions"][len(self.found["answers"])]
        answer = torch.tensor(asked["answer_ids"])
        ids = torch.cat((question_ids, answer[None, :-1]), dim=1)
        logits = self.model(
            input_ids=ids,
            past_key_values=copied(cache),
            position_ids=torch.arange(context_length, context_length + ids.shape[1])[None],
            logits_to_keep=len(answer),
        ).logits
        self.found["answers"].append(score(logits[0], answer))
        return ""

    def _remove_answer_from_cache(self, cache: Any, cache_seq_lengths: list[int]) -> None:
        """Leave the cache alone: the answer was read into a copy, and quanto's tensors cannot be cut."""


def held(model: Any, cache: Any) -> dict[str, Any]:
    """Count what a cache holds, and how much of it a press has kept.

    A press with unequal heads masks the entries that it drops, and holds them all the same.
    """
    lengths = [layer.get_seq_length() for layer in cache.layers]
    heads = model.config.num_key_value_heads
    masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    masked = sum(len(mask[0]) for mask in masks if mask is not None)
    entries, count = sum(lengths) * heads, held_bytes(cache.layers)
    return {
        "stored_tokens": (entries - masked) / (heads * len(lengths)),
        "memory_bytes": round(count * (entries - masked) / entries),
        "held_bytes": count,
    }


def measure(pipeline: ScoringPipeline, text: Mapping[str, Any], cells: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Measure every cell on a text; those without a press come first."""
    made, without = presses(), dict[int | None, int]()
    for cell in sorted(cells, key=lambda cell: (cell["press"] is not None, cell["bits"] is not None)):
        bits, press = cell["bits"], made.get(cell["press"])
        cache: Any = DynamicCache()
        if bits is not None:
            cache = QuantizedCache("quanto", pipeline.model.config, nbits=bits)
        ratio = compression_ratio(cell["share"], bits, without)
        if press is not None:
            press.compression_ratio = ratio
        torch.manual_seed(0)  # Compactor draws a sketch
        found = pipeline.measure(text, press, cache)
        if press is None:
            without[bits] = found["memory_bytes"]
        found["seconds"] += getattr(press, "spared", 0.0)
        yield {"cell": cell["name"], "dropped": ratio, **found}


@torch.no_grad()
def main(setting: Mapping[str, Any]) -> None:
    """Answer each line of standard input, a text and its cells, with a line a cell."""
    disable_progress_bar()
    torch.set_num_threads(setting["threads"])
    dtype = getattr(torch, setting["dtype"])
    model = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=dtype, attn_implementation="sdpa")
    pipeline = ScoringPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(setting["model"]))
    for line in sys.stdin:
        asked = json.loads(line)
        for found in measure(pipeline, asked["text"], asked["cells"]):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
