"""The base of every task: samples, each read once and then measured for every cell."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from eval.cells import Cell
from wildcat_kv.data.haystack import Half
from wildcat_kv.lm_eval.prompts import Protocol

Lengths = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]  # tokens


@dataclass(frozen=True)
class Metric:
    """The meaning of a score.

    Attributes:
        higher_is_better: True if it is.
        unit: unit of the score.
        digits: digits to print after the point.
    """

    higher_is_better: bool
    unit: str = ""
    digits: int = 2


@dataclass(frozen=True)
class Setting:
    """The setting that the samples of all tasks depend on.

    Attributes:
        tokenizer: tokenizer of the model.
        seed: seed that chooses samples.
        protocol: "context-only": compressed before the question is read. "full-prompt": after.
        positions: most tokens that the model can read.
        limit: most samples of a task, of each of its lengths and depths; None for a task's own number.
        chat_template: True to send prompts as chat messages.
        data_dir: folder of benchmarks that are not to come from the hub.
        half: half of the essays and of the seeds; None for all.
    """

    tokenizer: Any
    seed: int
    protocol: Protocol
    positions: int
    limit: int | None = None
    chat_template: bool = False
    data_dir: Path | None = None
    half: Half | None = None

    def seed_of(self, index: int) -> int:
        """Make the seed of a sample; those of the two halves are never the same."""
        seed = self.seed * 100_003 + index
        return seed if self.half is None else 2 * seed + (self.half == "report")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one cell on one sample.

    Attributes:
        scores: scores by the metric's name.
        stored_tokens: entries that a key head held after the compression, on average.
        seen_tokens: tokens that had been read then.
        memory_bytes: bytes of all tensors that the cache held then, free room included; of the exact cache its keys
            and values.
        prediction: text that the model wrote, if it wrote.
        reference: expected text, if there is one.
        layers: scores by layer and head, by name.
        seconds: times, by what took them.
    """

    scores: dict[str, float]
    stored_tokens: float
    seen_tokens: int
    memory_bytes: int
    prediction: str | None = None
    reference: str | None = None
    layers: dict[str, list[list[float]]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


Measure = Callable[[Cell], Outcome]


@dataclass(frozen=True, kw_only=True)
class Sample(ABC):
    """One text to measure all cells on.

    Attributes:
        index: number in the task.
        facets: groups of tables and plots, such as its length.
        prompt: whole text that is read, to be hashed.
        tokens: the most positions that the model needs for it.
    """

    index: int
    facets: Mapping[str, int | float | str]
    prompt: str
    tokens: int

    @property
    def prompt_hash(self) -> str:
        """First 16 hexadecimal digits of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    @abstractmethod
    def open(self, model: Any, tokenizer: Any) -> Measure:
        """Do the work that all cells share, such as reading the context; return a function that measures one."""


class Task(BaseModel, ABC):
    """Something to measure. Its fields are its options in a configuration file.

    Args:
        limit: most samples, of each length and depth, instead of the run's limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int | None = Field(None, ge=1)

    @property
    @abstractmethod
    def name(self) -> str:
        """The task's name in records and tables."""

    @property
    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """The scores, the most telling one first; known at the latest when the samples are."""

    @property
    def streams(self) -> bool:
        """True if it compresses while it reads on; known once the samples are."""
        return False

    def check_model(self, model_config: Any) -> None:
        """Refuse a model that the task cannot be measured on.

        Raises:
            ValueError: says why.
        """

    @abstractmethod
    def samples(self, setting: Setting) -> list[Sample]:
        """Make all samples, the same ones for the same setting.

        Raises:
            ValueError: they cannot be made, or the data is not there; says what is missing.
        """

    def count(self, setting: Setting, default: int) -> int:
        """Choose how many samples to make."""
        return next(limit for limit in (self.limit, setting.limit, default) if limit is not None)
