"""The description of an evaluation of attention methods: one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from eval.attention.digits import Digits
from eval.attention.layers import Guarantee, Layers
from eval.attention.methods import Choice
from eval.attention.tasks import Pictures, Speech, Texts

AnyTask = Annotated[Pictures | Digits | Speech | Texts | Layers | Guarantee, Field(discriminator="task")]


class RunConfig(BaseModel):
    """An evaluation of attention methods.

    Args:
        name: name of the run; the file's, by default.
        tasks: mappings of a task, "pictures", "digits", "speech", "texts", "layers" or "guarantee", and its options.
        methods: methods to measure, each a name or a mapping of the name and its settings.
        seeds: seeds of every method that draws.
        threads: threads of the processor.

    Raises:
        ValueError: one line that names the field, its value and what it takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "run"
    tasks: list[AnyTask] = Field(min_length=1)
    methods: list[Choice] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _methods_can_be_built(self) -> Self:
        names = [choice.name for choice in self.methods]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"methods: {twice!r} is there twice; give one of them a label")
        for choice in self.methods:
            choice.build(n=4096)
        return self

    def plan(self) -> list[tuple[Choice, int]]:
        """List the methods with their seeds; one that draws nothing has the first seed alone."""
        return [(choice, seed) for choice in self.methods for seed in (self.seeds if choice.draws else self.seeds[:1])]


def read_config(path: Path, **changes: Any) -> RunConfig:
    """Read a YAML file; `changes` win over it, those of `inputs` over the tasks' own.

    Raises:
        ValueError: the file cannot be read, or a field is wrong; names the file.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r} is no readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config={str(path)!r} must hold a mapping, such as 'tasks: [...]'")
    inputs = changes.pop("inputs", None)
    if inputs is not None:
        fields["tasks"] = [_with_inputs(task, inputs) for task in fields.get("tasks") or []]
    try:
        return RunConfig(**{"name": path.stem, **fields, **changes})
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        given = f"={finding['input']!r}: " if where and finding["type"] != "missing" else ": " if where else ""
        raise ValueError(f"{path}: {where}{given}{message}") from None


def _with_inputs(task: Any, inputs: int) -> Any:
    """Limit a task to so many inputs of every source."""
    if not isinstance(task, dict):
        return task
    if "sources" in task:
        return {**task, "sources": [{**source, "inputs": inputs} for source in task["sources"]]}
    return {**task, "inputs": inputs}
