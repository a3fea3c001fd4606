"""lm-eval's tasks by name: documents from its generators, the hub or local files; prompts and scores."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from eval.data import expected_files, find_local
from eval.tasks.base import Setting
from wildcat_kv.contexts.prompts import messages_for
from wildcat_kv.data.downloads import cache_folder
from wildcat_kv.files import replacing
from wildcat_kv.validation import did_you_mean

RULER = ("niah_", "ruler_")

# Fields of a group's members that do not change what is asked.
_DESCRIBES = {"task", "group", "task_alias", "group_alias", "aggregate_metric_list", "metadata"}
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "httpx")


def known_tasks() -> list[str]:
    """List the names of all tasks, groups and tags of lm-eval.

    lm-eval reads 14,000 files for them, which takes half a minute: the list of each of its releases is kept on disk.
    """
    kept = cache_folder() / f"lm-eval-{version('lm-eval')}-tasks.txt"
    if kept.is_file():
        return kept.read_text(encoding="utf-8").splitlines()
    with quiet():
        names = _manager().all_tasks
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as new:
            new.write_text("\n".join(names), encoding="utf-8")
    return names


def members(name: str, others: Iterable[str] = ()) -> list[str]:
    """List the single tasks of a group or tag of lm-eval; of a task, itself.

    Args:
        name: name of the task, group or tag.
        others: other names, to be proposed too.

    Raises:
        ValueError: there is no such name; near ones are proposed.
    """
    with quiet():
        manager = _manager()
        if name not in manager.task_index:
            hint = did_you_mean(name, [*others, *manager.all_tasks])
            raise ValueError(
                f"tasks={name!r}: neither a task of ours nor of lm-eval; {hint}`python -m eval tasks` lists the names"
            )
        return _members(manager, name)


def _members(manager: TaskManager, name: str) -> list[str]:
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return [task for tagged in sorted(entry.tags) for task in _members(manager, tagged)]
    return _listed(manager, name, entry.cfg["task"]) if name in manager.all_groups else [name]


def _listed(manager: TaskManager, group: str, entries: list[Any]) -> list[str]:
    """Resolve a group's list: names, mappings of a name, or groups that are only there."""
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
    """Save the tokenizer in a folder, because RULER's generators load it by name."""
    folder = tempfile.TemporaryDirectory(prefix="wildcat-kv-")
    tokenizer.save_pretrained(folder.name)
    return folder


def load(task: str, length: int | str | None, setting: Setting) -> Any:
    """Load a task with its documents: the same for the same setting, whatever was loaded before.

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
    with quiet():
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
    """Tell whether a task makes or chooses its documents by length, as lm-eval's own functions do."""
    family = task.partition("_")[0]
    return family not in ("longbench", "infinitebench", "wikitext") and loaded.config.custom_dataset is not None


def _seed(seed: int) -> None:
    """Seed all sources that lm-eval's generators draw from, as it does."""
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


def requests_of(task: Any, document: dict[str, Any], tokenizer: Any) -> list[Any]:
    """Make lm-eval's requests about a document; chat messages if there is a tokenizer for them."""
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
    """Render messages as lm-eval does: templates without a system role get none."""
    messages = messages_for(tokenizer, messages)
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        messages = [message for message in messages if message["role"] != "system"]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def scores_of(task: Any, document: dict[str, Any], results: Any) -> dict[str, float]:
    """Score results by a task's first filter and metrics; RULER's score by length becomes one score."""
    if task.OUTPUT_TYPE == "generate_until":
        instance = Instance("generate_until", document, (), 0)
        instance.resps = list(results)
        first = task._filters[0]
        first.apply([instance])
        results = [instance.filtered_resps[first.name]]
    found = task.process_results(document, results)
    if task.config.task.startswith(RULER):
        return {"score": float(found[str(document["max_length"])])}
    return {name: float(found[name]) for name in means_of(task) if name in found}


def means_of(task: Any) -> dict[str, bool]:
    """List a task's metrics that are means over documents: True where higher is better."""
    aggregations = task.aggregation()
    return {name: bool(higher) for name, higher in task.higher_is_better().items() if aggregations.get(name) is mean}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval, which prints and logs while it makes samples; errors still come."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _LOGGERS]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
