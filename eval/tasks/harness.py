"""Tasks of lm-eval: its documents, its prompts and its scores, over compressed contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import Field, PrivateAttr
from torch import Tensor

from eval.cells import Cell
from eval.lm_eval_tasks import RULER, load, means_of, quiet, requests_of, scores_of
from eval.tasks.asking import Asked, Clock, Prompt, held_by
from eval.tasks.base import Measure, Metric, Outcome, Sample, Setting, Task
from wildcat_kv.contexts.reading import token_losses
from wildcat_kv.lm_eval.prompts import Parts, PromptEncoder, cut_middle, loses_middle, move_spaces

# What LongBench's authors send as plain text even to chat models: examples and code.
_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_DEFAULT_LIMIT = 100
_CHUNK = 64  # tokens read at once where a task asks for the likelihood of a whole text


class HarnessTask(Task):
    """A task by its name in lm-eval, answered greedily.

    Scores are the task's metrics that are means over documents, after the first of its filters.

    Args:
        task: name of the task.
        lengths: tokens of RULER's texts, 4096 by default, or the version of a benchmark that has several, such as
            "4k" of BABILong.
        limit: most documents of each length, instead of the run's limit.
        max_gen_toks: most tokens of an answer, instead of the task's own number.
        truncate: "middle" cuts prompts that are too long as LongBench does, and is its default; "never" refuses them.
        max_length: most tokens of prompt and answer, instead of the model's positions. Texts whose likelihood is
            asked for are read up to there.
    """

    task: str
    lengths: list[int | str] = Field(default_factory=list)
    max_gen_toks: int | None = Field(None, ge=1)
    truncate: Literal["middle", "never"] | None = None
    max_length: int | None = Field(None, ge=8)
    _metrics: dict[str, Metric] = PrivateAttr(default_factory=dict)
    _rolling: bool = PrivateAttr(False)

    @property
    def name(self) -> str:
        """The name in lm-eval."""
        return self.task

    @property
    def metrics(self) -> dict[str, Metric]:
        """The task's own first, then the likelihood of the reference; known once the samples are."""
        return self._metrics

    @property
    def streams(self) -> bool:
        """True where lm-eval asks for the likelihood of whole texts."""
        return self._rolling

    def samples(self, setting: Setting) -> list[Sample]:
        """Take the first documents of every length, as lm-eval orders them."""
        samples: list[Sample] = []
        lengths: list[int | str | None] = [*self.lengths] or [None]
        for length in lengths:
            loaded = load(self.task, length, setting)
            self._metrics.update(_metrics(loaded, self.task))
            self._rolling = loaded.OUTPUT_TYPE == "loglikelihood_rolling"
            documents = loaded.eval_docs
            for number in range(min(len(documents), self.count(setting, _DEFAULT_LIMIT))):
                samples.append(self._sample(loaded, documents[number], number, len(samples), length, setting))
        return samples

    def _sample(
        self, loaded: Any, document: dict[str, Any], number: int, index: int, length: int | str | None, setting: Setting
    ) -> Sample:
        facets: dict[str, int | float | str] = {"document": number, **_length(self.task, document, length)}
        [first, *others] = requests = requests_of(loaded, document, self._chats(setting))
        fields: dict[str, Any] = {"index": index, "facets": facets, "loaded": loaded, "document": document}
        if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
            (text,) = first.args
            ids = torch.tensor(_encode(setting.tokenizer, text), dtype=torch.int64)
            tokens = min(len(ids), self.max_length or setting.positions)
            return _Rolling(prompt=text, tokens=tokens, ids=ids[None, :tokens], **fields)
        text = first.args[0]
        encoder = PromptEncoder(partial(_encode, setting.tokenizer), setting.protocol)
        if any(other.args[0] != text for other in others):
            raise ValueError(
                f"task={self.task!r}: each of its choices comes after another prompt, and one prompt a sample is read "
                "here; use `wildcat-kv lm-eval`"
            )
        if loaded.OUTPUT_TYPE == "generate_until":
            with quiet():
                options = normalize_gen_kwargs(first.args[1])
            room = self.max_gen_toks or options["max_gen_toks"]
            parts = encoder.split(text, self.task, document)
            prompt = self._prompt(encoder, parts, room, index, setting)
            reference = _reference(loaded, document, self.task)
            expected = encoder.answer(parts, reference if text[-1:].isspace() else f" {reference}")
            return _Generation(
                prompt=text,
                tokens=len(prompt) + room,
                asked=prompt,
                max_new_tokens=room,
                until=tuple(options["until"]),
                reference=reference,
                expected=expected if reference.strip() else None,
                **fields,
            )
        bare, _ = move_spaces(text, "")
        parts = encoder.split(bare, self.task, document)
        answers = [encoder.answer(parts, move_spaces(text, request.args[1])[1]) for request in requests]
        prompt = self._prompt(encoder, parts, max(map(len, answers)), index, setting)
        return _Choice(
            prompt=text,
            tokens=len(prompt) + max(map(len, answers)),
            asked=prompt,
            answers=answers,
            choices=[request.args[1] for request in requests],
            **fields,
        )

    def _prompt(self, encoder: PromptEncoder, parts: Parts, room: int, index: int, setting: Setting) -> Prompt:
        context, question = encoder.ids(parts)
        limit = (self.max_length or setting.positions) - room
        try:
            if self.truncate == "middle" or (self.truncate is None and loses_middle(self.task)):
                context = cut_middle(context, question, limit)
            elif self.max_length is not None and len(context) + len(question) > limit:
                raise ValueError(
                    f"it has {len(context) + len(question)} tokens beside {room} for the answer, and max_length="
                    f"{self.max_length}; raise it, choose shorter lengths, or truncate: middle"
                )
        except ValueError as error:
            raise ValueError(f"task={self.task!r}, sample {index}: {error}") from None
        return Prompt(context, question)

    def _chats(self, setting: Setting) -> Any:
        """Choose the tokenizer whose chat template is used; None for plain text."""
        name = self.task.removeprefix("longbench_").removesuffix("_e")
        plain = self.task.startswith("longbench") and name in _PLAIN
        return setting.tokenizer if setting.chat_template and setting.tokenizer.chat_template and not plain else None


@dataclass(frozen=True, kw_only=True)
class _Document(Sample):
    loaded: Any
    document: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Generation(_Document):
    asked: Prompt
    max_new_tokens: int
    until: tuple[str, ...]
    reference: str
    expected: Tensor | None

    def open(self, model: Any, tokenizer: Any) -> Measure:
        asked, expected = Asked(model, tokenizer, self.asked), self.expected

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, held = asked.compress(cell, clock)
            found = asked.likelihoods(cache.clone(), [expected]) if expected is not None else []
            with clock("answer", model.device):
                prediction = asked.generate(cache, self.max_new_tokens, self.until)
            scores = scores_of(self.loaded, self.document, [prediction])
            if found:
                scores["nll"] = -found[0].total / found[0].tokens
            return Outcome(
                scores,
                seen_tokens=asked.seen_tokens,
                prediction=prediction,
                reference=self.reference,
                seconds=clock,
                **held,
            )

        return measure


@dataclass(frozen=True, kw_only=True)
class _Choice(_Document):
    asked: Prompt
    answers: list[Tensor]
    choices: list[str]

    def open(self, model: Any, tokenizer: Any) -> Measure:
        asked = Asked(model, tokenizer, self.asked)

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, held = asked.compress(cell, clock)
            with clock("answer", model.device):
                found = asked.likelihoods(cache, self.answers)
            results = [(likelihood.total, likelihood.greedy) for likelihood in found]
            scores = scores_of(self.loaded, self.document, results)
            if self.loaded.OUTPUT_TYPE == "loglikelihood":
                scores["nll"] = -found[0].total / found[0].tokens
            best = max(range(len(results)), key=lambda choice: results[choice][0])
            prediction = self.choices[best]
            return Outcome(scores, seen_tokens=asked.seen_tokens, prediction=prediction, seconds=clock, **held)

        return measure


@dataclass(frozen=True, kw_only=True)
class _Rolling(_Document):
    ids: Tensor

    def open(self, model: Any, tokenizer: Any) -> Measure:
        ids = self.ids.to(model.device)

        def measure(cell: Cell) -> Outcome:
            clock, cache = Clock(), cell.empty(model.config)
            with clock("read", model.device):
                losses = token_losses(model, cache, ids, chunk=_CHUNK)
            scores = {"nll": float(losses.mean())}
            return Outcome(scores, seen_tokens=ids.shape[1], seconds=clock, **held_by(cache, cell))

        return measure


def _length(task: str, document: Mapping[str, Any], chosen: int | str | None) -> dict[str, int | str]:
    """Find the group of lengths that a document belongs to; LongBench-E has three, in words."""
    if task.startswith("longbench") and task.endswith("_e"):
        words = int(document["length"])
        return {"length": "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"}
    length = document.get("max_length") if chosen is None and task.startswith(RULER) else chosen
    return {} if length is None else {"length": length}


def _metrics(task: Any, name: str) -> dict[str, Metric]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"nll": Metric(False, "nats a token", 3)}
    better = {"score": True} if name.startswith(RULER) else means_of(task)
    metrics = {metric: Metric(higher, "share") for metric, higher in better.items()}
    return metrics | ({} if task.OUTPUT_TYPE == "multiple_choice" else {"nll": Metric(False, "nats a token")})


def _reference(task: Any, document: dict[str, Any], name: str) -> str:
    """Take the first of several right answers; RULER wants all."""
    target = task.doc_to_target(document)
    if isinstance(target, list):
        return ", ".join(map(str, target)) if name.startswith(RULER) else str(target[0] if target else "")
    return str(target)


def _encode(tokenizer: Any, text: str, begins: bool = True) -> list[int]:
    """Encode a text; with the tokenizer's special tokens, not twice and not inside a text."""
    begins = begins and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return tokenizer(text, add_special_tokens=begins).input_ids
