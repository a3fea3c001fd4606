"""Long answers: many tokens written over a compressed text, and how likely the exact cache finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from eval.cells import Cell
from eval.tasks.asking import Asked, Clock, Prompt, held_by
from eval.tasks.base import Lengths, Measure, Metric, Outcome, Sample, Setting, Task
from wildcat_kv import CompressedCache
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.data.haystack import build_context

REQUEST = "Write a long and detailed summary of the text above, point by point."
NGRAM = 8  # tokens of a phrase that is written again


class LongAnswer(Task):
    """A long text is compressed; then the model writes a summary of it, and the cache compresses on.

    All answers have the same number of tokens: one that ends a text is never chosen. The exact cache of the same text
    reads every answer and says how likely it is, with the text and without. Its own answer is scored in the same way.

    Args:
        lengths: tokens of the texts.
        tokens: tokens of the answer.
        temperature: temperature of sampling, with the same random numbers for all methods; 0 for greedy decoding.
        repeats: texts of each length; the run's limit may lower it.
        limit: most texts of each length, instead of the run's limit.
    """

    task: Literal["long_answer"] = "long_answer"
    lengths: Lengths = Field([1500])
    tokens: int = Field(512, gt=NGRAM)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    repeats: int = Field(8, ge=1)

    @property
    def name(self) -> str:
        """The task's name, which says whether answers are sampled."""
        return "long_answer_sampled" if self.temperature else "long_answer"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Measure the gain by the text, the likelihood of the answer, and the share of repeated phrases.

        The likelihood alone takes a fluent answer about something else for a good one, and a loop for a better one:
        the exact cache follows both. `gain` is the likelihood with the text over that without it, 0 for either.
        """
        return {
            "gain": Metric(True, "nats of the exact cache a token that the text adds", 3),
            "nll": Metric(False, "nats of the exact cache a token", 3),
            "repeated": Metric(False, f"share of the phrases of {NGRAM} tokens that were written before"),
        }

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length."""
        repeats = min(self.repeats, self.count(setting, self.repeats))
        lengths = [length for length in self.lengths for _ in range(repeats)]
        return [self._sample(setting, index, length) for index, length in enumerate(lengths)]

    def _sample(self, setting: Setting, index: int, length: int) -> Sample:
        text = build_context(setting.tokenizer, length, [], seed=setting.seed_of(index), half=setting.half)
        context, question = encode_question(setting.tokenizer, text, REQUEST)
        return _LongAnswerSample(
            index=index,
            facets={"length": length},
            prompt=f"{text}\n\n{REQUEST}",
            tokens=context.shape[1] + question.shape[1] + self.tokens,
            asked=Prompt.of(context[0], question[0], setting.protocol),
            bare=Prompt.of(encode_question(setting.tokenizer, "", REQUEST)[0][0], question[0], setting.protocol),
            new_tokens=self.tokens,
            temperature=self.temperature,
            seed=setting.seed_of(index),
        )


@dataclass(frozen=True, kw_only=True)
class _LongAnswerSample(Sample):
    """A text and the request; `bare` is the request without the text."""

    asked: Prompt
    bare: Prompt
    new_tokens: int
    temperature: float
    seed: int

    def open(self, model: Any, tokenizer: Any) -> Measure:
        asked, bare = (Asked(model, tokenizer, prompt) for prompt in (self.asked, self.bare))

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, _ = asked.compress(cell, clock)
            with clock("answer", model.device):
                written = self._write(asked, cache, model.device)
            # Counted here, and not after the context: the answer is a part of what a cache has to hold.
            held, seen = held_by(cache, cell), cache.get_seq_length()
            with_text, without = (
                float(each.losses(each.context.exact.clone(), torch.tensor(written)).mean()) for each in (asked, bare)
            )
            return Outcome(
                scores={"gain": without - with_text, "nll": with_text, "repeated": share_repeated(written)},
                seen_tokens=seen,
                **held,
                prediction=tokenizer.decode(written),
                seconds=clock,
            )

        return measure

    def _write(self, asked: Asked, cache: CompressedCache, device: torch.device) -> list[int]:
        options: dict[str, Any] = {"suppress_tokens": asked.ends or None}
        if self.temperature:
            options |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        # The model's own device: by default every device of the current accelerator is asked for its state.
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(self.seed)
            return asked.write(cache, self.new_tokens, **options)


def share_repeated(tokens: Sequence[int]) -> float:
    """Count the phrases of 8 tokens that were written before, as a share of all phrases; at least 8 tokens."""
    phrases = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(phrases)) / len(phrases)
