"""Stretches of essays, cut into what is compressed and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from eval.tasks.base import Lengths, Sample, Setting, Task
from wildcat_kv.data.haystack import build_context

_SPARE = 20  # tokens to spare when a text is cut, for rounding


@dataclass(frozen=True, kw_only=True)
class Stretch(Sample):
    """A stretch of essays. Nothing is asked about it, so that both protocols are the same.

    Attributes:
        ids: int64 (1, tokens), all of it.
        length: tokens of its beginning.
    """

    ids: Tensor
    length: int


class EssayTask(Task):
    """A task on stretches of essays.

    Args:
        lengths: tokens of the beginning, which is compressed.
        repeats: texts of each length; the run's limit may lower it.
        limit: most texts of each length, instead of the run's limit.
    """

    lengths: Lengths = Field([1000])
    repeats: int = Field(8, ge=1)

    def stretches(self, setting: Setting, after: int = 0) -> Iterator[dict[str, Any]]:
        """Make the fields of a `Stretch` for every length, `repeats` times.

        Args:
            setting: setting of the run.
            after: tokens that follow the beginning.
        """
        repeats = min(self.repeats, self.count(setting, self.repeats))
        for index, length in enumerate(length for length in self.lengths for _ in range(repeats)):
            total = length + after
            seed = setting.seed_of(index)
            text = build_context(setting.tokenizer, total + _SPARE, [], seed=seed, half=setting.half)
            ids = setting.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :total]
            facets = {"length": length}
            yield {"index": index, "facets": facets, "prompt": text, "tokens": total, "ids": ids, "length": length}
