"""Read handwritten digits with a linear probe on DINOv2-S, which was fitted to the features of exact attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from eval.attention.dinov2 import PATCH, dinov2_small
from eval.attention.pictures import digits
from eval.attention.tasks import Case, Measured, Metric, Run, Task, Wanted
from wildcat_kv.attention import Attention, Exact

_CLASSES = 10
_RIDGE = 1e-2  # of the mean of the features' second moments


class Probe(NamedTuple):
    """Linear map of features to the scores of classes.

    Attributes:
        mean: (channels,), taken from features first.
        weights: (channels, classes).
        bias: (classes,).
    """

    mean: Tensor
    weights: Tensor
    bias: Tensor

    @staticmethod
    def fit(features: Tensor, labels: Tensor) -> Probe:
        """Fit by ridge regression on 0 and 1.

        Args:
            features: (m, channels).
            labels: int64 (m,), below 10.
        """
        features, wanted = features.double(), torch.nn.functional.one_hot(labels, _CLASSES).double()
        mean, bias = features.mean(0), wanted.mean(0)
        centred = features - mean
        moments = centred.T @ centred
        level = _RIDGE * moments.diagonal().mean()
        weights = torch.linalg.solve(moments + level * torch.eye(len(moments)), centred.T @ (wanted - bias))
        return Probe(mean, weights, bias)

    def read(self, features: Tensor) -> Tensor:
        """Choose the classes, int64 (m,), of features (m, channels)."""
        return ((features.double() - self.mean) @ self.weights + self.bias).argmax(-1)


class Digits(Task):
    """Read handwritten digits by the class token of DINOv2-S: all layers attend by the method.

    The probe knows the features of exact attention alone. An input is a batch of digits that it has not seen.

    Args:
        task: "digits".
        pixels: side of the digits' pictures, a multiple of 14: 518 makes 1,370 tokens.
        inputs: number of batches.
        batch: digits of a batch.
        fitted: digits that the probe is fitted to.
    """

    title: ClassVar[str] = "DINOv2-S, digits by a linear probe"
    metrics: ClassVar[dict[str, Metric]] = {
        "right": Metric("read right", True),
        "same": Metric("as by exact", True),
    }

    task: Literal["digits"] = "digits"
    pixels: int = Field(default=518, ge=PATCH, multiple_of=PATCH)
    inputs: int = Field(default=4, ge=1, le=20)
    batch: int = Field(default=20, ge=1, le=50)
    fitted: int = Field(default=100, ge=20, le=500)

    def cases(self) -> list[Case]:
        """List the batches."""
        side = self.pixels // PATCH
        n = side * side + 1
        group = f"{self.pixels} px, {n:,} tokens"
        return [Case(f"batch {number + 1}", group, n, (side, side)) for number in range(self.inputs)]

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare the classes with the labels, and with those of exact attention."""
        number = int(case.input.split()[1]) - 1
        own = slice(self.fitted + number * self.batch, self.fitted + (number + 1) * self.batch)
        drawn, labels = (part[own] for part in self._digits)
        exact = self._run(Exact(), drawn)
        by_exact = self._probe.read(exact.result)
        for one in wanted:
            found = self._run(one.build(case.n, case.grid), drawn)
            read = self._probe.read(found.result)
            scores = {
                name: float((read == other).double().mean()) for name, other in (("right", labels), ("same", by_exact))
            }
            yield Measured(one.method, one.seed, scores, *found.over(exact))

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        return digits(self.fitted + self.inputs * self.batch, self.pixels)

    @cached_property
    def _probe(self) -> Probe:
        drawn, labels = (part[: self.fitted] for part in self._digits)
        return Probe.fit(self._run(Exact(), drawn).result, labels)

    @staticmethod
    def _run(method: Attention, drawn: Tensor) -> Run:
        model = dinov2_small()
        return Run.of(model.backbone, method, lambda: torch.stack([model(one).summary for one in drawn]))
