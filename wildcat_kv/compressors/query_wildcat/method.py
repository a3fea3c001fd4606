"""The method: three parts of the budget.

The layers keep to a budget or to a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import Self, override

from wildcat_kv.compressors.base import Compressed, KVBlock, SharingCompressor
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.query_wildcat.fit import estimate_error, fit_slots
from wildcat_kv.compressors.query_wildcat.fitted_scorer import FittedScorer, load_scorer
from wildcat_kv.compressors.query_wildcat.fitted_scores import fitted_scores
from wildcat_kv.compressors.query_wildcat.profile import Profile, load_profile
from wildcat_kv.compressors.query_wildcat.sharing import Share, best_items, take_counted
from wildcat_kv.compressors.query_wildcat.slots import (
    Counts,
    first_within,
    merge_parts,
    narrowed,
    take_kept,
)
from wildcat_kv.compressors.query_wildcat.survey import Questions, Survey, survey_block
from wildcat_kv.compressors.wildcat import WildCat
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.slot_facts import SlotFacts
from wildcat_kv.coreset.temperature import Temperature
from wildcat_kv.coreset.tensors import full_precision

# Shares of the items that are tried until a tolerance is met.
_TRIED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


class Chosen(NamedTuple):
    """A layer's share of the slots.

    Attributes:
        kept: bool (rows, heads, m), True for items that stay as they are.
        survey: survey of the layer.
        counts: items of each head; None to be read.
    """

    kept: Tensor
    survey: Survey
    counts: Counts | None = None


@dataclass(frozen=True)
class QueryWildCat(SharingCompressor):
    """Keep what queries to come attend to, wherever it is; WildCat for the rest.

    WildCat's kernel is what attention looks like to queries that may point anywhere. Real ones do not. Three parts of
    the budget answer three questions about queries to come, asked of the prompt's own queries, without a causal mask:

    1. What do they attend to as a rule? The items of highest root-mean-square attention of some of these queries, moved
       to the position behind the text.
    2. What would they attend to if they repeated the text? The query of each token, and the key behind it, far apart.
    3. Anything else: WildCat of the items that are left, in bins, weighted.

    Items of the first two parts keep their keys and stand for themselves. All heads of all layers compete for them,
    or each has the share that a profile of the model gives it: then no layer waits for the others. At last weights and
    values of all slots are moved a little, by ridge regression, to what half of the reference queries got. Other
    queries estimate the error: neither the first part nor the fit knows what they attend to.
    Sinks are found like other tokens: a `sink` of 4 leaves more slots for the rest.

    Needs queries (as many as there are tokens since the last fold, for as long as the layer's survey takes), and the
    model's rotary positions. Costs WildCat's, and O(n d (q + 16)) for each query head with q reference queries.

    Attributes:
        bin_rank: slots of a bin, as in WildCat.
        temperature: rule for tau, as in WildCat.
        weights: "nystrom" (signed) or "clipped", as in WildCat.
        seed: seed of the pivots, as in WildCat.
        queries: reference queries of a query head, the newest among them.
        judges: other queries of a query head, evenly spread, that estimate the error.
        attended: share of the budget for the first part.
        recalled: share of the budget for the second part.
        ahead: tokens that the reference queries are moved to behind the text.
        apart: tokens that a token's query is moved away from the token behind it: beyond what heads look back for by
            habit.
        carried: queries kept from one fold to the next.
        ridge: pull of the fit to WildCat's own weights and values; 0 for no fit.
        tolerance: largest estimated error of a layer, on average over its heads; None for a budget that the layers
            share.
        share: "layers" where all heads of a layer keep equally many items, "heads" where each competes by itself,
            "equal" where all heads of all layers keep equally many, as serving engines want it. Then no layer waits.
        profile: shares of the model's layers, so that no layer waits for others: a `Profile`, the name of one that
            comes with the package (`profile_names()`), or a file of `wildcat-kv profile`. None to deal the slots out by
            what is found in each text. One that was measured with a scorer needs this scorer.
        scorer: weights fitted to the model; the larger of its score and the estimate is that of the second part. A
            `FittedScorer`, the name of one that comes with the package ("smollm2-135m"), or a file of `wildcat-kv
            fit-scorer`. None for the estimate alone.

    Source: this project, `docs/method.md`. WildCat is arXiv 2602.10056; that a model which repeats a text shows what it
    needs of it is arXiv 2505.23416, which reads it a second time.
    """

    paper: ClassVar[str] = "wildcat_kv"
    needs_rotation: ClassVar[bool] = True
    estimates: ClassVar[bool] = True

    bin_rank: int = 12
    temperature: Temperature = "released"
    weights: Weights = "nystrom"
    seed: int = 0
    queries: int = 16
    judges: int = 8
    attended: float = 0.125
    recalled: float = 0.375
    ahead: int = 64
    apart: int = 512
    carried: int = 1
    ridge: float = 0.3
    tolerance: float | None = None
    share: Share = "heads"
    profile: Profile | Mapping[str, Any] | str | Path | None = None
    scorer: FittedScorer | Mapping[str, Any] | str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "judges", "carried", "ahead", "apart"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge} must be at least 0; 0 leaves weights and values as they are")
        for name in ("attended", "recalled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1], a share of the budget")
        if self.attended + self.recalled > 1:
            raise ValueError(
                f"attended={self.attended} and recalled={self.recalled} are more than the budget; lower one of them"
            )
        if self.share not in get_args(Share):
            raise ValueError(f"share={self.share!r} must be one of {', '.join(map(repr, get_args(Share)))}")
        if self.share == "equal" and (self.profile is not None or self.tolerance is not None):
            name = "tolerance" if self.profile is None else "profile"
            raise ValueError(
                f"{name}={getattr(self, name)!r} with share='equal': a {name} gives layers shares of their own; leave "
                "one of them out"
            )
        if self.profile is not None:
            if self.tolerance is not None:
                raise ValueError(
                    f"profile={self.profile!r} with tolerance={self.tolerance}: a tolerance finds each layer's slots "
                    "by itself; leave one of them out"
                )
            object.__setattr__(self, "profile", load_profile(self.profile))
        if self.scorer is not None:
            object.__setattr__(self, "scorer", load_scorer(self.scorer))
        if isinstance(self.profile, Profile):
            self.profile.check_scorer(self.scorer if isinstance(self.scorer, FittedScorer) else None)

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """Build the method with the parameters that `settings` give WildCat."""
        own = settings.bin_rank, settings.temperature, settings.weights, settings.seed
        return cls(*own, tolerance=settings.tolerance)

    @property
    def observation(self) -> Observation:
        """All queries since the last fold, and some from before."""
        return Observation(latest=None, carried=self.carried)

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """True if the layers must deal the slots out: without a profile, a tolerance or equal shares."""
        return self.profile is None and self.tolerance is None and self.share != "equal"

    @override
    def check_model(self, decoder: Any, layers: int) -> None:
        if isinstance(self.profile, Profile):
            self.profile.check_model(decoder, layers)
        if isinstance(self.scorer, FittedScorer):
            self.scorer.check_model(decoder, layers)

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        if not isinstance(self.profile, Profile):
            return super().compress(block, rank)
        survey = self.survey(block)
        return self.compress_share(block, rank, self._profiled(self.profile, block, rank, survey))

    @override
    def survey(self, block: KVBlock) -> Survey:
        survey = survey_block(block, self.questions)
        if not isinstance(self.scorer, FittedScorer):
            return survey
        weights = self.scorer.layer_of(block)
        return survey if weights is None else survey._replace(recall=fitted_scores(block, survey.recall, weights))

    @property
    def questions(self) -> Questions:
        """Questions of a survey."""
        return Questions(self.queries, self.judges, self.ahead, self.apart)

    def deal(self, surveys: Sequence[Survey], rank: int) -> list[Chosen]:
        """Choose the items of each layer that stay as they are.

        With a tolerance no layer has to do with others, and finds in `compress_share` what it needs.
        """
        if self.tolerance is not None:
            return [Chosen(survey.attention > -torch.inf, survey) for survey in surveys]
        kept = self._choose(surveys, rank)
        counts = Counts.read(kept, [survey.attention > -torch.inf for survey in surveys])
        return [Chosen(*layer) for layer in zip(kept, surveys, counts, strict=True)]

    def _choose(self, surveys: Sequence[Survey], rank: int) -> list[Tensor]:
        """Choose the items of each layer that stay, of both parts."""
        return [first | second for first, second in zip(*self.choose(surveys, rank), strict=True)]

    def choose(self, surveys: Sequence[Survey], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the items that stay, where the layers share.

        Args:
            surveys: surveys of all layers.
            rank: slots of a head, on average.

        Returns:
            The items of the first part and of the second, bool (rows, heads, m) of each layer.
        """
        attended = int(rank * self.attended)
        kept = best_items([survey.attention for survey in surveys], attended, self.share)
        rest = [survey.recall.masked_fill(taken, -torch.inf) for survey, taken in zip(surveys, kept, strict=True)]
        recalled = best_items(rest, self.kept(rank) - attended, self.share)
        return kept, recalled

    def _profiled(self, profile: Profile, block: KVBlock, rank: int, survey: Survey) -> Chosen:
        """Choose the items of a layer that stay, as many as the profile says."""
        counts = _profiled_counts(self, profile, block.layer_index, block.sharing, block.item_tokens, rank)
        if len(counts[0]) not in (1, block.keys.shape[1]):  # a process has a share of the heads: their average
            counts = tuple([sum(part) // len(part)] for part in counts)  # type: ignore[assignment]
        kept = take_counted(survey.attention, counts[0])
        kept = kept | take_counted(survey.recall.masked_fill(kept, -torch.inf), counts[1])
        if block.weights is not None:  # some items may be padding
            return Chosen(kept, survey)
        rows, heads = kept.shape[:2]
        own = [min(sum(pair), block.items) for pair in zip(*counts, strict=True)] * (heads // len(counts[0]))
        return Chosen(kept, survey, Counts([own] * rows, [[block.items - count for count in own]] * rows))

    @override
    def expect_slots(self, place: int, sharing: Sequence[int], heads: int, items: int, rank: int) -> list[int]:
        if not isinstance(self.profile, Profile):
            return super().expect_slots(place, sharing, heads, items, rank)
        counts, rest = _profiled_counts(self, self.profile, place, sharing, items, rank), rank - self.kept(rank)
        own = [min(sum(pair), items) for pair in zip(*counts, strict=True)] * (heads // len(counts[0]))
        return [kept + min(rest, items - kept) for kept in own]

    @override
    def compress_share(self, block: KVBlock, rank: int, share: Chosen) -> Compressed:
        kept, survey = share.kept, share.survey
        if self.tolerance is None:
            return self._compress(block, rank, share)
        # Each row takes the first rank that meets the tolerance, so that it keeps what it would keep alone.
        found: Compressed | None = None
        for tried in dict.fromkeys(int(block.items * part) for part in _TRIED):
            if not tried:
                continue
            if tried < block.items:
                [chosen] = self._choose([survey], tried)
                new = self._compress(block, tried, Chosen(chosen, survey))
            else:
                new = self._compress(block, 0, Chosen(kept, survey))
            found = new if found is None else first_within(self.tolerance, found, new)
            assert found.error is not None
            if bool((found.error.mean(-1) <= self.tolerance).all()):
                break
        assert found is not None
        return found

    def _compress(self, block: KVBlock, rank: int, chosen: Chosen) -> Compressed:
        """Keep some items and make slots of the others.

        As many slots are made as are left of `rank`; 0 where all items are kept.
        """
        kept, survey, rest = chosen.kept, chosen.survey, rank - self.kept(rank)
        there = block.slice_items(block.valid)
        counts = Counts.of(kept, there) if chosen.counts is None else chosen.counts
        left = there & ~kept
        # Few that are left stay as they are: some bins would have fewer than their slots.
        few = left.sum(-1, keepdim=True) <= rest
        pairs = [pair for row in zip(*counts, strict=True) for pair in zip(*row, strict=True)]
        taken = max(own + (others if others <= rest else 0) for own, others in pairs)
        most = max(own + min(others, rest) for own, others in pairs)
        parts = [take_kept(block, kept | (left & few), taken)]
        if rest:
            wildcat = WildCat(self.bin_rank, self.temperature, self.weights, self.seed)
            parts.append(wildcat.compress_some(block, rest, left & ~few))
        coreset = merge_parts(parts, most)
        with torch.no_grad(), full_precision(block.keys.device):
            if self.ridge and rank:
                coreset = fit_slots(coreset, survey.fitted, self.ridge)
            error = estimate_error(coreset, survey.judges, survey.group)
        facts = SlotFacts.read(coreset.weights, coreset.valid)
        columns = [max(heads) for heads in facts.counts]
        return Compressed(narrowed(coreset, max(columns)), columns, error=error, facts=facts)

    def kept(self, rank: int) -> int:
        """Count the slots of `rank` for items that stay as they are."""
        return int(rank * (self.attended + self.recalled))


def _profiled_counts(
    method: QueryWildCat, profile: Profile, place: int, sharing: Sequence[int], tokens: int, rank: int
) -> tuple[list[int], list[int]]:
    """Count the items that a layer keeps by a profile, of both parts, for all heads or for each."""
    attended, both = int(rank * method.attended), method.kept(rank)
    # WildCat makes slots of what is left, as many of every head: a head that keeps more would leave it too little.
    room = tokens - (rank - both)
    return profile.counts(place, sharing, rank / tokens, (attended, both - attended), room)
