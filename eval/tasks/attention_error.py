"""The error of the attention's output, by layer and head, for queries after the compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import scipy.stats
import torch
from pydantic import Field

from eval.cells import Cell
from eval.tasks.asking import Clock, held_by
from eval.tasks.base import Measure, Metric, Outcome, Sample, Setting
from eval.tasks.essays import EssayTask, Stretch
from wildcat_kv import CompressedCache, Context, weighted_attention
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.contexts.reading import read


class AttentionError(EssayTask):
    """Relative error of every head's output over a continuation, with a compressed context.

    Every layer gets the queries that the exact cache gives it: errors of earlier layers do not add up.

    Args:
        lengths: tokens of the beginning, which is compressed.
        repeats: texts of each length; the run's limit may lower it.
        limit: most texts of each length, instead of the run's limit.
        tokens: tokens of the continuation.
    """

    task: Literal["attention_error"] = "attention_error"
    tokens: int = Field(64, ge=1)
    repeats: int = Field(4, ge=1)

    @property
    def name(self) -> str:
        """The task's name."""
        return "attention_error"

    @property
    def metrics(self) -> dict[str, Metric]:
        """The mean over layers and heads; rank correlation and mean of a method's own estimate."""
        return {
            "error": Metric(False, "of the output's norm", 3),
            "rank_correlation": Metric(True, "Spearman's, of estimate and error", 3),
            "estimate": Metric(False, "of the output's norm", 3),
        }

    def check_model(self, model_config: Any) -> None:
        """Refuse models whose attention is more than keys, values and a scale."""
        config = model_config.get_text_config(decoder=True)
        if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss":
            raise ValueError(
                f"task='attention_error' compares plain attention, and {config.model_type} caps its scores or has "
                "learned sinks; leave the task out"
            )

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length."""
        return [_Error(**fields) for fields in self.stretches(setting, self.tokens)]


@dataclass(frozen=True, kw_only=True)
class _Error(Stretch):
    def open(self, model: Any, tokenizer: Any) -> Measure:
        ids = self.ids.to(model.device)
        context = Context(model, ids[:, : self.length])
        whole = context.exact.clone()
        read(model, whole, ids)

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            with clock("compress", model.device):
                cache = cell.compress(context, tokenizer)
            held = held_by(cache, cell)
            with clock("answer", model.device):
                errors = attention_errors(whole, cache, ids.shape[1] - self.length)
            scores, layers = {"error": float(torch.tensor(errors).mean())}, {"error": _rounded(errors)}
            if (
                cache.compressor.estimates and held["stored_tokens"] < self.length
            ):  # of what is exact there is no estimate
                estimates = [error[0].tolist() for error in cache.error_report().errors.values()]
                layers["estimate"] = _rounded(estimates)
                scores["estimate"] = float(torch.tensor(estimates).mean())
                if len(estimates) == len(errors):  # no layer was left exact
                    scores["rank_correlation"] = rank_correlation(estimates, errors)
            return Outcome(scores, seen_tokens=self.length, layers=layers, seconds=clock, **held)

        return measure


def rank_correlation(estimates: list[list[float]], errors: list[list[float]]) -> float:
    """Compute Spearman's rank correlation of estimates and errors, over all layers and heads."""
    flat = (torch.tensor(numbers).flatten().numpy() for numbers in (estimates, errors))
    return float(scipy.stats.spearmanr(*flat).statistic)


def _rounded(numbers: list[list[float]]) -> list[list[float]]:
    return [[round(number, 4) for number in layer] for layer in numbers]


def attention_errors(whole: CompressedCache, compressed: CompressedCache, after: int) -> list[list[float]]:
    """Compute the relative error of the attention's output, ||o' - o|| / ||o||, over the newest tokens.

    Args:
        whole: the exact cache of one row of text, with its queries, as `Context` has it.
        compressed: the cache of the same text without its newest tokens.
        after: number of these tokens.

    Returns:
        For each compressed layer, an error for each query head.
    """
    errors = []
    for exact, ours in zip(whole.layers, compressed.layers, strict=True):
        if not isinstance(ours, WildCatLayer):
            continue
        assert ours.state.storage is not None
        state, entries = exact.state, ours.state.storage.entries
        keys, values = state.storage.view()
        queries, scale = state.log.recent()[:, :, -after:], state.progress.scale
        expected = weighted_attention(queries, keys, values, scale=scale, causal=True)
        new = torch.ones_like(keys[:, :, -after:, 0])
        clip = (values.amin(-2, keepdim=True).float(), values.amax(-2, keepdim=True).float())
        found = weighted_attention(
            queries,
            torch.cat((entries.keys, keys[:, :, -after:]), dim=-2),
            torch.cat((entries.numerators(), values[:, :, -after:].float()), dim=-2),
            torch.cat((entries.weights, new.float()), dim=-1),
            scale=scale,
            valid=torch.cat((entries.valid, new.bool()), dim=-1),
            causal=True,
            value_range=clip,
        )
        difference = (found - expected).float().norm(dim=(-2, -1)) / expected.float().norm(dim=(-2, -1))
        errors.append(difference[0].tolist())
    return errors
