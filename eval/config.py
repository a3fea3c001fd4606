"""The description of an evaluation: one YAML file, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eval.cells import Cell, make_cells
from eval.lm_eval_tasks import members
from eval.tasks.arithmetic import Arithmetic
from eval.tasks.attention_error import AttentionError
from eval.tasks.base import Protocol, Task
from eval.tasks.drift import Drift
from eval.tasks.harness import HarnessTask
from eval.tasks.instructions import Instructions
from eval.tasks.long_answer import LongAnswer
from eval.tasks.lookup import Lookup
from eval.tasks.needle import Needle
from eval.tasks.perplexity import Perplexity
from wildcat_kv.compressors import available
from wildcat_kv.config import WildCatConfig, share_kept
from wildcat_kv.data.haystack import Half
from wildcat_kv.validation import did_you_mean

ALL = "all"
OURS: dict[str, type[Task]] = {
    "needle": Needle,
    "lookup": Lookup,
    "drift": Drift,
    "perplexity": Perplexity,
    "decoding": Perplexity,
    "attention_error": AttentionError,
    "long_answer": LongAnswer,
    "instructions": Instructions,
    "arithmetic": Arithmetic,
}


class RunConfig(BaseModel):
    """An evaluation: which tasks, which methods, which budgets.

    Args:
        name: name of the run; the file's, by default.
        model: hub id, folder or GGUF file; the default model if left out.
        dtype: dtype of the weights.
        device: "cpu", "cuda", ...; a GPU if there is one.
        device_map: "auto" spreads a model over several devices.
        protocol: "context-only" compresses before the question is seen, "full-prompt" after.
        methods: names, "all", or mappings of a name, a compressor, fields of `WildCatConfig`, the compressor's own
            `parameters`, and `ratios` of its own. A list of `bits` makes a variant a number. The exact cache is
            always there.
        ratios: shares of the tokens to keep; or `compression_ratios`, shares to drop. Methods with ratios of their
            own have those.
        max_tokens: budgets in tokens.
        settings: fields of `WildCatConfig` for all methods, beside the budget.
        seed: seed of samples and pivots.
        half: half of the essays and seeds, "develop" to choose by, "report" to report; all if left out.
        limit: most samples of a task, of each of its lengths and depths; a task's own limit wins over it.
        baseline: method that all others are compared with, such as "exact"; WildCat if left out.
        chat_template: True to send benchmarks' prompts as chat messages.
        data_dir: folder of benchmarks' local files.
        tasks: names, or mappings of a task and its options.

    Raises:
        ValueError: one line that names the field, its value and what it takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "run"
    model: str | None = None
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")] = "float32"
    device: str | None = None
    device_map: str | None = None
    protocol: Protocol = "context-only"
    methods: list[str | dict[str, Any]] = Field(default=[ALL], validate_default=True)
    ratios: list[Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=list)
    max_tokens: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0, lt=2**31)
    half: Half | None = None
    limit: int | None = Field(None, ge=1)
    baseline: str | None = None
    chat_template: bool = False
    data_dir: Path | None = None
    tasks: list[str | dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_compression_ratios(cls, fields: dict[str, Any]) -> dict[str, Any]:
        dropped = fields.get("compression_ratios")
        if dropped is None:
            return fields
        if fields.get("ratios"):
            raise ValueError(
                f"compression_ratios={dropped!r} given beside ratios={fields['ratios']!r}; give one of them"
            )
        if not isinstance(dropped, list):
            raise ValueError(f"compression_ratios={dropped!r} must be a list of shares to drop, such as [0.75]")
        rest = {name: value for name, value in fields.items() if name != "compression_ratios"}
        return {**rest, "ratios": [share_kept(share) for share in dropped]}

    @field_validator("methods")
    @classmethod
    def _all_methods(cls, methods: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        named = [entry for entry in methods if entry != ALL]
        if len(named) == len(methods):
            return methods
        everything: list[str | dict[str, Any]] = [method.name for method in available()]
        return everything + [entry for entry in named if entry not in everything]

    @field_validator("data_dir")
    @classmethod
    def _data_is_there(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"data_dir={str(folder)!r} is no folder")
        return folder

    def cells(self) -> list[Cell]:
        """Make every method's cell at every budget, the exact cache's first.

        Raises:
            ValueError: an unknown method or a wrong budget.
        """
        unknown = set(self.settings) - (set(WildCatConfig.model_fields) - {"ratio", "max_tokens"})
        if unknown:
            raise ValueError(f"settings={sorted(unknown)[0]!r}: no such setting of a cache")
        settings = {"seed": self.seed, **self.settings}
        cells = make_cells(self.methods, self.ratios, self.max_tokens, settings)
        check_baseline(self.baseline, [cell.method for cell in cells])
        return cells

    def make_tasks(self) -> list[Task]:
        """Make the tasks, and resolve groups of lm-eval into their members.

        Raises:
            ValueError: an unknown task, a wrong option, or one task twice.
        """
        tasks = [task for entry in self.tasks for task in _make(entry)]
        names = [task.name for task in tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"tasks: {twice!r} is there twice")
        return tasks


def check_baseline(baseline: str | None, methods: Sequence[str]) -> None:
    """Refuse a baseline that is not measured; None is always one.

    Raises:
        ValueError: there is no such method in the run.
    """
    if baseline is not None and baseline not in methods:
        names = list(dict.fromkeys(methods))
        hint = did_you_mean(baseline, names)
        raise ValueError(f"baseline={baseline!r} is no method of this run; {hint}there are {', '.join(names)}")


def read_config(path: Path, **changes: Any) -> RunConfig:
    """Read a run's YAML file; `changes` win over it.

    Tasks named in `changes` keep their options of the file. A `limit` there wins over the tasks' own limits too. Of
    the `ratios` there, methods with ratios of their own take those that they have.

    Raises:
        ValueError: the file cannot be read, or a field is wrong; names the file.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r} is no readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config={str(path)!r} must hold a mapping, such as 'tasks: [needle]'")
    strange = next((key for key in fields if not isinstance(key, str)), None)
    if strange is not None:
        raise ValueError(f"config={str(path)!r}: {strange!r} is no name of a field")
    if "ratios" in changes:
        fields.pop("compression_ratios", None)
        if isinstance(methods := changes.get("methods", fields.get("methods")), list):
            changes["methods"] = _at_ratios(methods, changes["ratios"])
    if "tasks" in changes:
        changes["tasks"] = _chosen(changes["tasks"], fields.get("tasks"))
    if "limit" in changes:
        tasks = changes.get("tasks", fields.get("tasks"))
        changes["tasks"] = [_without_limit(task) for task in tasks] if isinstance(tasks, list) else tasks
    try:
        return RunConfig(**{"name": path.stem, **fields, **changes})
    except ValidationError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _chosen(names: list[str], listed: Any) -> list[Any]:
    """Pick the file's entries of these names; names that it does not list stand for themselves."""
    entries: dict[str, list[Any]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            entries.setdefault(str(entry.get("task")), []).append(entry)
    return [entry for name in names for entry in entries.get(name, [name])]


def _at_ratios(methods: list[Any], ratios: list[float]) -> list[Any]:
    """Leave methods with ratios of their own those of `ratios` that they have, and leave out those with none."""
    chosen = []
    for entry in methods:
        if isinstance(entry, dict) and isinstance(own := entry.get("ratios"), list):
            entry = {**entry, "ratios": [ratio for ratio in own if ratio in ratios]}
            if not entry["ratios"]:
                continue
        chosen.append(entry)
    return chosen


def _without_limit(task: Any) -> Any:
    return {name: value for name, value in task.items() if name != "limit"} if isinstance(task, dict) else task


def _make(entry: str | dict[str, Any]) -> list[Task]:
    fields = {"task": entry} if isinstance(entry, str) else dict(entry)
    name = fields.get("task")
    if not isinstance(name, str):
        raise ValueError(f"tasks={entry!r} must be a name, or a mapping with a task and its options")
    try:
        if name in OURS:
            return [OURS[name](**({"chunk": 1} if name == "decoding" else {}), **fields)]
        return [HarnessTask(**{**fields, "task": member}) for member in members(name, OURS)]
    except ValidationError as error:
        raise ValueError(f"task={name!r}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    finding = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in finding["loc"])
    given = "" if finding["type"] == "missing" else f"={finding['input']!r}"
    return f"{where}{given}: {finding['msg'].removeprefix('Value error, ')}"
