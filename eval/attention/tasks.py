"""Measure pictures and speech through real encoders. Each task lists cases and measures methods on one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from eval.attention.dinov2 import PATCH, Features, dinov2_small
from eval.attention.methods import Clocked, Grid
from eval.attention.minilm import LONGEST, minilm
from eval.attention.pictures import PICTURES, picture
from eval.attention.scores import correlation, cosine, same_neighbours
from eval.attention.speech import Clip, clips, passages
from eval.attention.whisper import whisper_tiny, word_errors
from wildcat_kv.attention import Attention, Exact, use

Build = Callable[[int, Grid | None], Attention]


class Metric(NamedTuple):
    """How a score is shown.

    Attributes:
        title: head of its column.
        rising: True if more is better.
    """

    title: str
    rising: bool


class Case(NamedTuple):
    """An input of an evaluation.

    Attributes:
        input: name of the input.
        group: what inputs are averaged over, such as "896 px"; one table each.
        n: number of keys.
        grid: rows and columns of a picture's patches.
    """

    input: str
    group: str
    n: int
    grid: Grid | None = None


class Wanted(NamedTuple):
    """A measurement to make: a method of some name and seed."""

    method: str
    seed: int
    build: Build


@dataclass(frozen=True)
class Measured:
    """Scores and times of a method on a case.

    Attributes:
        method: name of the method.
        seed: its seed.
        scores: scores by metric.
        seconds: attention's and the whole model's seconds of processor time.
        shares: times, or operations, over those of exact attention.
        view: uint8 (height, width, 3), a picture of what the model saw; None for none.
    """

    method: str
    seed: int
    scores: dict[str, float]
    seconds: dict[str, float]
    shares: dict[str, float]
    view: np.ndarray | None = None


class Task(BaseModel):
    """Something to measure; see the subclasses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: ClassVar[dict[str, Metric]]
    title: ClassVar[str]

    def cases(self) -> list[Case]:
        """List the inputs, in the order of the records."""
        raise NotImplementedError

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Measure methods on an input; exact attention is run once before."""
        raise NotImplementedError


class Run(NamedTuple):
    """A run of a model with a method.

    Attributes:
        result: what the model gave.
        attention: seconds of processor time in attention.
        forward: seconds of processor time in all.
    """

    result: Any
    attention: float
    forward: float

    @staticmethod
    def of(encoder: Any, method: Attention, call: Callable[[], Any]) -> Run:
        """Run `call` while the encoder attends by a method."""
        clock = Clocked(method)
        start = time.process_time()
        with use(encoder, clock):
            result = call()
        return Run(result, sum(clock.seconds), time.process_time() - start)

    def over(self, exact: Run) -> tuple[dict[str, float], dict[str, float]]:
        """Give the seconds, and their shares of exact attention's."""
        seconds = {"attention": self.attention, "forward": self.forward}
        return seconds, {"attention": self.attention / exact.attention, "forward": self.forward / exact.forward}


class Pictures(Task):
    """Look at photographs with DINOv2-S: all layers attend by the method.

    Args:
        task: "pictures".
        pixels: sides of the squares, multiples of 14: 518 makes 1,370 tokens, 896 4,097, 1,344 9,217, 1,792 16,385.
        inputs: number of pictures, the first ones of `PICTURES`.
        shown: number of pictures, the first ones, of which a figure shows the saliency map and the patches' features.
    """

    title: ClassVar[str] = "DINOv2-S"
    metrics: ClassVar[dict[str, Metric]] = {
        "summary": Metric("class token", True),
        "patches": Metric("patches", True),
        "saliency": Metric("saliency", True),
        "neighbours": Metric("same neighbour", True),
    }

    task: Literal["pictures"] = "pictures"
    pixels: list[int] = Field(default=[518], min_length=1)
    inputs: int = Field(default=len(PICTURES), ge=1, le=len(PICTURES))
    shown: int = Field(default=2, ge=0)

    def cases(self) -> list[Case]:
        """List every picture at every size, the smallest first."""
        for side in self.pixels:
            if side < PATCH or side % PATCH:
                raise ValueError(f"pixels={side} must be a multiple of {PATCH}")
        grids = [(side // PATCH, side // PATCH) for side in sorted(self.pixels)]
        return [
            Case(name, f"{grid[0] * PATCH} px, {grid[0] * grid[1] + 1:,} tokens", grid[0] * grid[1] + 1, grid)
            for grid in grids
            for name in PICTURES[: self.inputs]
        ]

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare the features with those of exact attention."""
        assert case.grid is not None
        pixels, model = picture(case.input, case.grid[0] * PATCH), dinov2_small()

        def run(method: Attention) -> Run:
            return Run.of(model.backbone, method, lambda: model(pixels))

        exact = run(Exact())
        shown = set(PICTURES[: self.shown])
        for one in wanted:
            found = run(one.build(case.n, case.grid))
            seen = view(found.result, exact.result) if case.input in shown else None
            yield Measured(one.method, one.seed, self._scores(found.result, exact.result), *found.over(exact), seen)

    @staticmethod
    def _scores(found: Features, exact: Features) -> dict[str, float]:
        return {
            "summary": cosine(found.summary, exact.summary),
            "patches": cosine(found.patches, exact.patches),
            "saliency": correlation(found.saliency, exact.saliency),
            "neighbours": same_neighbours(found.patches.flatten(0, 1), exact.patches.flatten(0, 1)),
        }


def view(found: Features, exact: Features) -> np.ndarray:
    """Draw a saliency map and, beside it, the features of the patches.

    Three principal components of the exact features are red, green and blue, in both runs with the same range.

    Returns:
        uint8 (rows, 2 * columns, 3), a dot a patch.
    """
    rows, columns, channels = exact.patches.shape
    flat = exact.patches.reshape(-1, channels).double()
    mean = flat.mean(0)
    directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T
    directions = directions * directions.sum(0).sign()  # a singular vector's sign is anyone's choice
    low, high = ((flat - mean) @ directions).quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((found.patches.double() - mean) @ directions - low) / (high - low)
    saliency = F.adaptive_avg_pool2d(found.saliency[None, None], (rows, columns))[0, 0]
    both = torch.cat((saliency.double().unsqueeze(-1).expand(-1, -1, 3), colours), dim=1)
    return both.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


class Speech(Task):
    """Write down speech with Whisper tiny.en: all layers of its encoder attend by the method.

    Args:
        task: "speech".
        inputs: number of clips of up to 30 seconds: a recording, and passages that `flite` reads.
    """

    title: ClassVar[str] = "Whisper tiny.en"
    metrics: ClassVar[dict[str, Metric]] = {
        "to_exact": Metric("word errors to exact", False),
        "to_truth": Metric("word errors to the truth", False),
        "states": Metric("encoder states", True),
    }

    task: Literal["speech"] = "speech"
    inputs: int = Field(default=13, ge=1, le=60)

    @cached_property
    def _clips(self) -> dict[str, Clip]:
        return {clip.name: clip for clip in clips(self.inputs)}

    def cases(self) -> list[Case]:
        """List the clips."""
        return [Case(name, "1,500 tokens", 1500) for name in self._clips]

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare the texts with the truth, and with that of exact attention."""
        clip, model = self._clips[case.input], whisper_tiny()

        def run(method: Attention) -> Run:
            return Run.of(model.model.model.encoder, method, lambda: model.hear(clip.sound))

        exact = run(Exact())
        text = model.write(exact.result)
        for one in wanted:
            found = run(one.build(case.n, None))
            written = model.write(found.result)
            scores = {"to_exact": _error_rate(text, written), "to_truth": _error_rate(clip.text, written)}
            scores["states"] = cosine(found.result, exact.result)
            yield Measured(one.method, one.seed, scores, *found.over(exact))


class Texts(Task):
    """Rank passages for questions with all-MiniLM-L6-v2: all layers attend by the method.

    A batch has passages of 60 to 400 words, padded to the longest. A passage's question is the sentence before it.

    Args:
        task: "texts".
        inputs: number of batches.
        passages: passages of a batch.
    """

    title: ClassVar[str] = "all-MiniLM-L6-v2"
    metrics: ClassVar[dict[str, Metric]] = {
        "embeddings": Metric("embeddings", True),
        "ranking": Metric("rank correlation", True),
        "first": Metric("same first passage", True),
    }

    task: Literal["texts"] = "texts"
    inputs: int = Field(default=9, ge=1, le=50)
    passages: int = Field(default=12, ge=2, le=40)

    def cases(self) -> list[Case]:
        """List the batches."""
        return [Case(f"batch {number + 1}", f"up to {LONGEST} tokens", LONGEST) for number in range(self.inputs)]

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare the embeddings, and how they rank the passages, with those of exact attention."""
        model, number = minilm(), int(case.input.split()[1]) - 1
        lengths = torch.linspace(60, 400, self.passages).int().tolist()
        whole = passages(self.inputs * self.passages, 440)[number :: self.inputs]
        questions = [text.split(". ")[0] for text in whole]
        texts = [" ".join(text.split(". ", 1)[1].split()[:words]) for text, words in zip(whole, lengths, strict=True)]

        def run(method: Attention) -> Run:
            return Run.of(model.model, method, lambda: (model.embed(texts), model.embed(questions)))

        exact = run(Exact())
        for one in wanted:
            found = run(one.build(case.n, None))
            yield Measured(one.method, one.seed, self._scores(found.result, exact.result), *found.over(exact))

    @staticmethod
    def _scores(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
        near, wanted = (questions @ texts.T for texts, questions in (found, exact))
        ranks = [scores.argsort(-1).argsort(-1).double() for scores in (near, wanted)]
        return {
            "embeddings": cosine(found[0], exact[0]),
            "ranking": sum(correlation(*pair) for pair in zip(*ranks, strict=True)) / len(near),
            "first": float((near.argmax(-1) == wanted.argmax(-1)).double().mean()),
        }


def _error_rate(said: str, written: str) -> float:
    errors, words = word_errors(said, written)
    return errors / max(1, words)
