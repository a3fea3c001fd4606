"""Paired differences of two methods on the same samples, with bootstrap intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
FEWEST = 3  # pairs; with fewer there is nothing to resample
_ROUNDING = 1e-12  # of the largest score: 0.1 + 0.2 and 0.3 are the same, and no finding

Scores = Mapping[Any, float]  # a method's score of each sample


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs of samples, and how sure it is.

    Attributes:
        mean: mean of the differences; NaN without pairs.
        low: lower end of the 95 % interval; None with fewer than three pairs.
        high: its upper end, or None.
        n: pairs that count.
        left_out: pairs that do not, since a score of theirs is NaN or infinite.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    left_out: int = 0

    @property
    def tie(self) -> bool:
        """True if the interval contains 0; False without an interval."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high

    @property
    def finding(self) -> bool:
        """True if the interval excludes 0; False without an interval, which is no tie either."""
        return self.low is not None and not self.tie


def paired_difference(scores: Scores, baseline: Scores) -> Difference:
    """Average `scores` minus `baseline` over the samples that both have.

    The interval is the bias-corrected and accelerated bootstrap (BCa) of the mean. It is the percentile bootstrap where
    BCa is not defined, which is where all differences are the same; it is then a single point: the data say nothing
    about how far other samples would differ. The same differences give the same interval in any order. With few pairs
    the bootstrap is too narrow: without a difference, about one interval in ten excludes 0 with 10 pairs, and one in
    four with 3.

    Args:
        scores: by sample.
        baseline: by sample.

    Returns:
        The difference in the unit of the scores.
    """
    return average_difference([(scores, baseline)])


def average_difference(pairs: Sequence[tuple[Scores, Scores]]) -> Difference:
    """Average the mean paired differences of several tasks; every task counts the same.

    Samples are resampled within their task. There is no interval if a task has fewer than three pairs, and no mean if
    it has none.

    Args:
        pairs: scores and baseline of each task, each by sample.

    Returns:
        The difference in the unit of the scores; `n` and `left_out` count pairs of all tasks.

    Raises:
        ValueError: no tasks.
    """
    if not pairs:
        raise ValueError("pairs=[]: give the scores of at least one task")
    tasks, left_out, largest = [], 0, 0.0
    for scores, baseline in pairs:
        both = [(scores[sample], baseline[sample]) for sample in scores.keys() & baseline.keys()]
        finite = [pair for pair in both if all(map(math.isfinite, pair))]
        left_out += len(both) - len(finite)
        largest = max(largest, *(abs(score) for pair in finite for score in pair), 0.0)
        tasks.append(np.array(sorted(score - base for score, base in finite), dtype=np.float64))
    sizes = [len(task) for task in tasks]
    mean = float(_mean(*tasks)) if min(sizes) else math.nan
    low, high = _interval(tasks, _ROUNDING * largest) if min(sizes) >= FEWEST else (None, None)
    return Difference(mean, low, high, sum(sizes), left_out)


def _mean(*tasks: np.ndarray, axis: int = -1) -> Any:
    return sum(task.mean(axis=axis) for task in tasks) / len(tasks)


def _interval(tasks: list[np.ndarray], nothing: float) -> tuple[float, float]:
    """Compute the bootstrap interval, with its own generator; ends within `nothing` of 0 are 0."""
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where BCa is not defined, it says so and returns NaN
            found = scipy.stats.bootstrap(
                tasks,
                _mean,
                confidence_level=CONFIDENCE,
                method=method,
                vectorized=True,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    low, high = (0.0 if abs(end) <= nothing else float(end) for end in (found.low, found.high))
    return low, high
