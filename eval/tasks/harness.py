"""Tasks of lm-eval: its documents, its prompts and its scores, over compressed contexts."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from pydantic import Field, PrivateAttr
from torch import Tensor

from eval.cells import Cell
from eval.data import expected_files, find_local
from eval.tasks.asking import Asked, Clock, Prompt
from eval.tasks.base import Measure, Metric, Outcome, Sample, Setting, Task
from wildcat_kv.accounting import stored_tokens
from wildcat_kv.reading import token_losses
from wildcat_kv.splits import cut_middle, split_prompt

RULER = ("niah_", "ruler_")
# What LongBench's authors send as plain text even to chat models: examples and code.
_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_DEFAULT_LIMIT = 100
_CHUNK = 64  # tokens read at once where a task asks for the likelihood of a whole text
# Fields of a group's members that do not change what is asked.
_DESCRIBES = {"task", "group", "task_alias", "group_alias", "aggregate_metric_list", "metadata"}
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "httpx")


class HarnessTask(Task):
    """A task by its name in lm-eval, answered greedily.

    Scores are the task's metrics that are means over documents, after the first of its filters.

    Args:
        task: the name.
        lengths: tokens of RULER's texts, 4096 by default, or the version of a benchmark that has several, such as
            "4k" of BABILong.
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

    @property
    def name(self) -> str:
        """As lm-eval calls it."""
        return self.task

    @property
    def metrics(self) -> dict[str, Metric]:
        """The task's own first, then the likelihood of the reference; known once the samples are."""
        return self._metrics

    def samples(self, setting: Setting) -> list[Sample]:
        """The first documents of every length, as lm-eval orders them."""
        samples: list[Sample] = []
        lengths: list[int | str | None] = [*self.lengths] or [None]
        for length in lengths:
            loaded = _load(self.task, length, setting)
            self._metrics.update(_metrics(loaded, self.task))
            documents = loaded.eval_docs
            for number in range(min(len(documents), self.count(setting, _DEFAULT_LIMIT))):
                samples.append(self._sample(loaded, documents[number], number, len(samples), length, setting))
        return samples

    def _sample(
        self, loaded: Any, document: dict[str, Any], number: int, index: int, length: int | str | None, setting: Setting
    ) -> Sample:
        facets: dict[str, int | float | str] = {"document": number, **_length(self.task, document, length)}
        [first, *others] = requests = _requests(loaded, document, self._chats(setting))
        fields: dict[str, Any] = {"index": index, "facets": facets, "loaded": loaded, "document": document}
        if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
            (text,) = first.args
            ids = _encode(setting.tokenizer, text)
            tokens = min(len(ids), self.max_length or setting.positions)
            return _Rolling(prompt=text, tokens=tokens, ids=ids[None, :tokens], **fields)
        text = first.args[0]
        if any(other.args[0] != text for other in others):
            raise ValueError(
                f"task={self.task!r}: each of its choices comes after another prompt, and one prompt a sample is read "
                "here; use `wildcat-kv lm-eval`"
            )
        if loaded.OUTPUT_TYPE == "generate_until":
            with _quiet():
                options = normalize_gen_kwargs(first.args[1])
            room = self.max_gen_toks or options["max_gen_toks"]
            parts = self._split(text, document, setting)
            prompt = self._prompt(parts, room, index, setting)
            reference = _reference(loaded, document, self.task)
            return _Generation(
                prompt=text,
                tokens=len(prompt) + room,
                asked=prompt,
                max_new_tokens=room,
                until=tuple(options["until"]),
                reference=reference,
                expected=_answer(setting.tokenizer, parts, f" {reference}") if reference.strip() else None,
                **fields,
            )
        bare = text.rstrip()  # the spaces belong to what follows, as in lm-eval
        parts = self._split(bare, document, setting)
        answers = [_answer(setting.tokenizer, parts, text[len(bare) :] + request.args[1]) for request in requests]
        prompt = self._prompt(parts, max(map(len, answers)), index, setting)
        return _Choice(
            prompt=text,
            tokens=len(prompt) + max(map(len, answers)),
            asked=prompt,
            answers=answers,
            choices=[request.args[1] for request in requests],
            **fields,
        )

    def _split(self, text: str, document: Mapping[str, Any], setting: Setting) -> tuple[str, str]:
        """What is read before the compression, and after it."""
        return (text, "") if setting.protocol == "full-prompt" else split_prompt(text, self.task, document)

    def _prompt(self, parts: tuple[str, str], room: int, index: int, setting: Setting) -> Prompt:
        context = _encode(setting.tokenizer, parts[0])
        question = _encode(setting.tokenizer, parts[1], begins=False)
        limit = (self.max_length or setting.positions) - room
        try:
            if self.truncate == "middle" or (self.truncate is None and self.task.startswith("longbench")):
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
        """The tokenizer whose chat template is to be used, or None."""
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
            cache, stored = asked.compress(cell, clock)
            found = asked.likelihoods(cache.clone(), [expected]) if expected is not None else []
            with clock("answer", model.device):
                prediction = asked.generate(cache, self.max_new_tokens, self.until)
            scores = _scores(self.loaded, self.document, [prediction])
            if found:
                scores["nll"] = -found[0].total / found[0].tokens
            return Outcome(scores, stored, asked.seen_tokens, prediction, self.reference, seconds=clock)

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
            cache, stored = asked.compress(cell, clock)
            with clock("answer", model.device):
                found = asked.likelihoods(cache, self.answers)
            results = [(likelihood.total, likelihood.greedy) for likelihood in found]
            scores = _scores(self.loaded, self.document, results)
            if self.loaded.OUTPUT_TYPE == "loglikelihood":
                scores["nll"] = -found[0].total / found[0].tokens
            best = max(range(len(results)), key=lambda choice: results[choice][0])
            return Outcome(scores, stored, asked.seen_tokens, self.choices[best], seconds=clock)

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
            return Outcome({"nll": float(losses.mean())}, round(stored_tokens(cache), 4), ids.shape[1], seconds=clock)

        return measure


def known_tasks() -> list[str]:
    """Names of all tasks, groups and tags of lm-eval."""
    with _quiet():
        return _manager().all_tasks


def members(name: str) -> list[str]:
    """The single tasks of a group or tag of lm-eval, of a task itself.

    Raises:
        ValueError: there is no such name; near ones are proposed.
    """
    with _quiet():
        manager = _manager()
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`python -m eval tasks` lists the names"
            raise ValueError(f"tasks={name!r}: neither a task of ours nor of lm-eval; {hint}")
        return _members(manager, name)


def _members(manager: TaskManager, name: str) -> list[str]:
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return [task for tagged in sorted(entry.tags) for task in _members(manager, tagged)]
    return _listed(manager, name, entry.cfg["task"]) if name in manager.all_groups else [name]


def _listed(manager: TaskManager, group: str, entries: list[Any]) -> list[str]:
    """Tasks of a group's list: names, or mappings of a name, or groups that are only there."""
    tasks = []
    for entry in entries:
        fields: dict[str, Any] = {"task": entry} if isinstance(entry, str) else entry
        name: Any = fields.get("group", fields.get("task"))
        if name in manager.task_index and not set(fields) - _DESCRIBES:
            tasks += _members(manager, name)
        elif isinstance(fields.get("task"), list):
            tasks += _listed(manager, group, fields["task"])
        else:
            raise ValueError(
                f"tasks={group!r}: it changes fields of its member {name!r}; name the single tasks instead"
            )
    return tasks


@lru_cache(maxsize=1)
def _manager() -> TaskManager:
    return TaskManager()


@lru_cache(maxsize=4)
def _saved(tokenizer: Any) -> tempfile.TemporaryDirectory[str]:
    """A folder with the tokenizer, because RULER's generators load it by name."""
    folder = tempfile.TemporaryDirectory(prefix="wildcat-kv-")
    tokenizer.save_pretrained(folder.name)
    return folder


def _load(task: str, length: int | str | None, setting: Setting) -> Any:
    """The task with its documents: a function of the setting alone, whatever was loaded before.

    Raises:
        ValueError: its documents cannot be had.
    """
    if task.startswith(RULER) and isinstance(length, str):
        raise ValueError(f"task={task!r}: lengths={length!r} must be a number of tokens, such as 4096")
    changes = find_local(task, setting.data_dir, str(length or "")) if setting.data_dir else None
    metadata: dict[str, Any] = {}
    if task.startswith(RULER):
        metadata["tokenizer"] = _saved(setting.tokenizer).name
    if length is not None:
        metadata["max_seq_lengths"] = [length] if isinstance(length, int) else length
    # A group of one: the way to change fields of a task that is known by name.
    spec = {"group": "chosen", "task": [{"task": task, "metadata": metadata, **(changes or {})}]}
    with _quiet():
        _seed(setting.seed)
        try:
            loaded = _manager().load([spec])["tasks"]
        except Exception as error:  # whatever datasets and the hub's client may raise
            raise ValueError(f"task={task!r}: {_missing(task, length, setting, error, changes)}") from error
    [found] = loaded.values()
    if length is not None and not _takes_lengths(task, found):
        raise ValueError(f"task={task!r}: lengths={length!r} is nothing that it has; leave lengths out")
    found.set_fewshot_seed(DEFAULT_OTHER_SEED + setting.seed)
    return found


def _takes_lengths(task: str, loaded: Any) -> bool:
    """Whether it makes or chooses its documents by length: those functions of lm-eval are told."""
    family = task.partition("_")[0]
    return family not in ("longbench", "infinitebench", "wikitext") and loaded.config.custom_dataset is not None


def _seed(seed: int) -> None:
    """As lm-eval seeds itself; its generators draw from all of these."""
    random.seed(DEFAULT_RANDOM_SEED + seed)
    np.random.seed(DEFAULT_OTHER_SEED + seed)
    # Has a source of its own, made as it is imported: without this its samples would depend on what was made before.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)


def _missing(
    task: str, length: int | str | None, setting: Setting, error: Exception, changes: dict[str, Any] | None
) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if changes is not None:
        return f"its file in data_dir={str(setting.data_dir)!r} is not in the format of the authors: {reason}"
    files = expected_files(task, None if length is None else str(length))
    if not files:
        return f"its documents cannot be had: {reason}"
    where = " or ".join(f"{name}.jsonl" for name in files)
    folder = "--data-dir FOLDER" if setting.data_dir is None else f"data_dir={str(setting.data_dir)!r}"
    return f"no dataset on the hub could be reached ({reason}); without a hub put {where} into {folder}"


def _requests(task: Any, document: dict[str, Any], tokenizer: Any) -> list[Any]:
    """What lm-eval would ask a model about the document; in chat messages if there is a tokenizer for it."""
    template = None if tokenizer is None else partial(_render, tokenizer)
    text = task.fewshot_context(
        document,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=template is not None,
        fewshot_as_multiturn=template is not None,
        chat_template=template,
        gen_prefix=task.doc_to_prefix(document),
    )
    requests = task.construct_requests(
        document, text, apply_chat_template=template is not None, metadata=(task.config.task, 0, 1)
    )
    return requests if isinstance(requests, list) else [requests]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """As lm-eval does it: templates that know no system role get the messages without it."""
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        messages = [message for message in messages if message["role"] != "system"]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _scores(task: Any, document: dict[str, Any], results: Any) -> dict[str, float]:
    """What lm-eval's first filter and its metrics say; RULER's score by length becomes one score."""
    if task.OUTPUT_TYPE == "generate_until":
        instance = Instance("generate_until", document, (), 0)
        instance.resps = list(results)
        first = task._filters[0]
        first.apply([instance])
        results = [instance.filtered_resps[first.name]]
    found = task.process_results(document, results)
    if task.config.task.startswith(RULER):
        return {"score": float(found[str(document["max_length"])])}
    return {name: float(found[name]) for name in _means(task) if name in found}


def _means(task: Any) -> dict[str, bool]:
    """Metrics that are means over documents, and whether higher is better. Others have no value a document."""
    aggregations = task.aggregation()
    return {name: bool(higher) for name, higher in task.higher_is_better().items() if aggregations.get(name) is mean}


def _length(task: str, document: Mapping[str, Any], chosen: int | str | None) -> dict[str, int | str]:
    """The group of lengths that a document belongs to; LongBench-E has three, in words."""
    if task.startswith("longbench") and task.endswith("_e"):
        words = int(document["length"])
        return {"length": "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"}
    length = document.get("max_length") if chosen is None and task.startswith(RULER) else chosen
    return {} if length is None else {"length": length}


def _metrics(task: Any, name: str) -> dict[str, Metric]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"nll": Metric(False, "nats a token", 3)}
    better = {"score": True} if name.startswith(RULER) else _means(task)
    metrics = {metric: Metric(higher, "share") for metric, higher in better.items()}
    return metrics | ({} if task.OUTPUT_TYPE == "multiple_choice" else {"nll": Metric(False, "nats a token")})


def _reference(task: Any, document: dict[str, Any], name: str) -> str:
    """Of several right answers the first; RULER wants all."""
    target = task.doc_to_target(document)
    if isinstance(target, list):
        return ", ".join(map(str, target)) if name.startswith(RULER) else str(target[0] if target else "")
    return str(target)


def _encode(tokenizer: Any, text: str, *, begins: bool = True) -> Tensor:
    """Token ids int64 (n,); special tokens as the tokenizer has them, but not twice and not inside a text."""
    begins = begins and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return torch.tensor(tokenizer(text, add_special_tokens=begins).input_ids, dtype=torch.int64)


def _answer(tokenizer: Any, parts: tuple[str, str], text: str) -> Tensor:
    """Token ids of what follows a prompt, as they come when it is encoded with what stands before it."""
    before = parts[1] or parts[0]
    return _encode(tokenizer, before + text, begins=False)[len(_encode(tokenizer, before, begins=False)) :]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints and logs while it makes samples; what matters comes as an error."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _LOGGERS]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
