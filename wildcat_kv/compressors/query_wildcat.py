"""Query WildCat: WildCat on what the queries to come are not seen to need one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.compressors.base import Compressed, KVBlock, SharingCompressor
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import take_items
from wildcat_kv.compressors.wildcat import WildCat
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.temperature import Temperature
from wildcat_kv.coreset.tensors import full_precision, saturate_, take_columns

# Share of the newest queries among the reference queries: one in so many.
_NEWEST = 3
# Entries that stand for all others in a query's normaliser; they hold most of its mass.
_NORMALISING = 16
# Positions of the queries whose followers are scored at once: they stay in a processor's cache.
_POSITIONS_AT_ONCE = 1024
# Shares of the items that are tried until a tolerance is met.
_TRIED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
_TINY = 1e-20
# Attention takes less than this share of a query's mass for none.
_LEAST_MASS = 1e-6
# Logarithm of the mass of padding: finite, for numbers that stay so.
_NOTHING = -1e4
# Logarithm of a share that adds nothing; its square is still a normal number, which processors multiply much faster.
_NEGLIGIBLE = -40.0


class Asked(NamedTuple):
    """Some reference queries of a layer, and what they get: q of each key head, those of a query head side by side.

    Attributes:
        queries: float32 (rows, heads, q, d), scaled.
        log_total: float32 (rows, heads, q), logarithm of what each pays to all entries.
        items: float32 (rows, heads, q, d_v + 1), what it gets from the items, and their mass, over its total.
        others: float32 (rows, heads, q, d_v), what it gets from all other entries.
    """

    queries: Tensor
    log_total: Tensor
    items: Tensor
    others: Tensor


class Survey(NamedTuple):
    """What queries to come are expected to attend to, in one layer.

    Attributes:
        attention: float32 (rows, heads, m), root-mean-square attention to each of the m items; -inf for padding.
        recall: float32 (rows, heads, m), in [0, 1]: attention to the item of a query that repeats the token before it.
        fitted: reference queries that weights and values are fitted to.
        judges: others, which neither `attention` nor the fit knows.
        group: query heads that share a key head.
    """

    attention: Tensor
    recall: Tensor
    fitted: Asked
    judges: Asked
    group: int


@dataclass(frozen=True)
class QueryWildCat(SharingCompressor):
    """Keep what queries to come attend to, wherever it is; WildCat for the rest.

    WildCat's kernel is what attention looks like to queries that may point anywhere. Real ones do not. Three parts of
    the budget answer three questions about queries to come, asked of the prompt's own queries, without a causal mask:

    1. What do they attend to as a rule? The items of highest root-mean-square attention of some of these queries, moved
       to the position behind the text.
    2. What would they attend to if they repeated the text? The query of each token, and the key behind it, far apart.
    3. Anything else: WildCat of the items that are left, in bins, weighted.

    Items of the first two parts keep their keys and stand for themselves. Layers compete for them; within a layer all
    heads keep equally many, so that what is counted is what is stored. At last weights and values of all slots are
    moved a little, by ridge regression, to what half of the reference queries got. Other queries estimate the error:
    neither the first part nor the fit knows what they attend to.
    Sinks are found like other tokens: a `sink` of 4 leaves more slots for the rest.

    Needs queries (as many as there are tokens since the last fold, for as long as the layer's survey takes), and the
    model's rotary positions. Costs WildCat's, and O(n d (q + 16)) for each query head with q reference queries.

    Attributes:
        bin_rank: as in WildCat.
        temperature: likewise.
        weights: likewise.
        seed: likewise.
        queries: reference queries of a query head, the newest among them.
        judges: other queries of a query head, evenly spread, that estimate the error.
        attended: share of the budget for the first part.
        recalled: share of the budget for the second part.
        ahead: how far behind the text the reference queries are moved, in tokens.
        apart: how far a token's query is moved from the token behind it, in tokens: beyond what heads look back for
            by habit.
        carried: queries kept from one fold to the next.
        ridge: how much the fit is drawn to WildCat's own weights and values; 0 for no fit.
        tolerance: the estimated error of a layer, on average over its heads, that it may have; None for a budget that
            the layers share.

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
    carried: int = 64
    ridge: float = 0.3
    tolerance: float | None = None

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

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """The method with the parameters that `settings` give WildCat."""
        own = settings.bin_rank, settings.temperature, settings.weights, settings.seed
        return cls(*own, tolerance=settings.tolerance)

    @property
    def observation(self) -> Observation:
        """All queries since the last fold, and some from before."""
        return Observation(latest=None, carried=self.carried)

    # What a layer finds

    def survey(self, block: KVBlock) -> Survey:
        """See `SharingCompressor`."""
        with torch.no_grad(), full_precision(block.keys.device):
            parts = self._places(block)
            queries, mass = self._moved(block, torch.cat(parts)), _mass(block)
            counts = [len(part) for part in parts]
            found = [_attend(block, head, queries[:, head], counts, mass) for head in range(mass.shape[1])]
            attention, mean = (torch.stack(scores, dim=1) for scores in zip(*(each[:2] for each in found), strict=True))
            fitted, judges = (
                Asked(*(torch.stack(tensors, dim=1) for tensors in zip(*(each[place] for each in found), strict=True)))
                for place in (2, 3)
            )
            recall, inside = self._recall(block, mean, mass), block.slice_items(block.valid)
            attention, recall = (
                block.slice_items(scores).masked_fill(~inside, -torch.inf) for scores in (attention, recall)
            )
        return Survey(attention, recall, fitted, judges, queries.shape[2])

    def _recall(self, block: KVBlock, mean: Tensor, mass: Tensor) -> Tensor:
        """How the query of each token would attend to the token behind it from afar.

        Args:
            block: entries.
            mean: float32 (rows, heads, n), what the reference queries pay to each entry, up to a factor.
            mass: float32 (rows, heads, n), of `_mass`.

        Returns:
            float32 (rows, heads, n).
        """
        assert block.queries is not None and block.rotation is not None
        rows, heads, n = mean.shape
        likely = mean.topk(min(_NORMALISING, n), dim=-1).indices
        level = mass.gather(-1, likely).log_()[:, :, None, None]
        reference = (take_columns(block.keys, likely).to(torch.float32) * block.scale).mT.unsqueeze(2)
        recall = torch.zeros_like(mean)
        # Query -j and key -j are of one token. Keys step back: there are fewer of them than of queries.
        queries = block.queries.unflatten(1, (heads, -1))
        back = torch.full((rows, 1), -self.apart, device=mean.device)
        for behind in range(min(block.exact, queries.shape[3]) - 1, 0, -_POSITIONS_AT_ONCE):
            length = min(_POSITIONS_AT_ONCE, behind)
            asking = queries.narrow(3, queries.shape[3] - behind - 1, length).to(torch.float32)
            follower = block.keys.narrow(2, n - behind, length).to(torch.float32)
            follower = block.rotation.forward(follower, back).transpose(1, 2).unsqueeze(-1)
            # As products of matrices, one a token and head: queries of a head are far apart in memory.
            own = torch.matmul(asking.permute(0, 3, 1, 2, 4), follower).squeeze(-1).mul_(block.scale)
            others = torch.matmul(asking, reference).add_(level).logsumexp(-1)
            score = own.permute(0, 2, 3, 1).sub(others).sigmoid_().amax(2)
            recall.narrow(2, n - behind, length).copy_(score)
        return recall

    def _places(self, block: KVBlock) -> list[Tensor]:
        """Choose the reference queries that are fitted to, those that are not, and those that judge.

        The first two are the newest ones, and others evenly spread over those before; the judges are evenly spread over
        all.

        Returns:
            Three int64 (q,), places among the queries.
        """
        assert block.queries is not None
        total, device = block.queries.shape[2], block.queries.device
        newest = min(total, -(-self.queries // _NEWEST))
        spread, judges = min(total, self.queries) - newest, min(total, self.judges)
        between = newest + torch.arange(spread, device=device) * (total - newest) // max(spread, 1)
        back = torch.cat((torch.arange(newest, device=device), between))
        judge = (2 * torch.arange(judges, device=device) + 1) * total // max(2 * judges, 1)
        return [total - 1 - places for places in (back[::2], back[1::2], judge)]

    def _moved(self, block: KVBlock, places: Tensor) -> Tensor:
        """Queries at `places` int64 (q,), asked from behind the text: float32 (rows, heads, g, q, d), scaled."""
        assert block.queries is not None and block.rotation is not None
        queries = block.queries.index_select(2, places).to(torch.float32)
        ahead = self.ahead + block.queries.shape[2] - places
        queries = block.rotation.forward(queries, ahead.expand(queries.shape[0], -1))
        return queries.unflatten(1, (block.keys.shape[1], -1)).mul_(block.scale)

    # What becomes of it

    def deal(self, surveys: Sequence[Survey], rank: int) -> list[tuple[Tensor, Survey]]:
        """For each layer bool (rows, heads, m), the items that stay as they are, and its survey.

        With a tolerance no layer has to do with others, and finds in `compress_share` what it needs.
        """
        if self.tolerance is not None:
            return [(survey.attention > -torch.inf, survey) for survey in surveys]
        return list(zip(self._choose(surveys, rank), surveys, strict=True))

    def _choose(self, surveys: Sequence[Survey], rank: int) -> list[Tensor]:
        """The items of each layer that stay as they are, where the layers share."""
        attended = int(rank * self.attended)
        kept = _best_by_layer([survey.attention for survey in surveys], attended)
        rest = [survey.recall.masked_fill(taken, -torch.inf) for survey, taken in zip(surveys, kept, strict=True)]
        recalled = _best_by_layer(rest, self._kept(rank) - attended)
        return [first | second for first, second in zip(kept, recalled, strict=True)]

    def compress_share(self, block: KVBlock, rank: int, share: tuple[Tensor, Survey]) -> Compressed:
        """See `SharingCompressor`."""
        kept, survey = share
        if self.tolerance is None:
            return self._compress(block, rank, kept, survey)
        # Each row takes the first rank that meets the tolerance, so that it keeps what it would keep alone.
        found: Compressed | None = None
        for tried in dict.fromkeys(int(block.items * part) for part in _TRIED):
            if not tried:
                continue
            if tried < block.items:
                [chosen] = self._choose([survey], tried)
                new = self._compress(block, tried, chosen, survey)
            else:
                new = self._compress(block, 0, kept, survey)
            found = new if found is None else _first_within(self.tolerance, found, new)
            assert found.error is not None
            if bool((found.error.mean(-1) <= self.tolerance).all()):
                break
        assert found is not None
        return found

    def _compress(self, block: KVBlock, rank: int, kept: Tensor, survey: Survey) -> Compressed:
        """The items to keep and, of the others, as many slots as are left of `rank`; 0 where all items are kept."""
        parts = [_take(block, kept)]
        if rest := rank - self._kept(rank):
            wildcat = WildCat(self.bin_rank, self.temperature, self.weights, self.seed)
            parts.append(wildcat.compress_some(block, rest, block.slice_items(block.valid) & ~kept))
        coreset, columns = _merge(parts)
        with torch.no_grad(), full_precision(block.keys.device):
            if self.ridge and rank:
                coreset = _fit(coreset, survey.fitted, self.ridge)
            return Compressed(coreset, columns, error=_error(coreset, survey.judges, survey.group))

    def _kept(self, rank: int) -> int:
        """How many of `rank` slots are for items that stay as they are."""
        return int(rank * (self.attended + self.recalled))


def _attend(
    block: KVBlock, head: int, queries: Tensor, counts: Sequence[int], mass: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the reference queries of one key head pay and get; its memory is O(q n).

    Args:
        block: entries.
        head: index of the key head.
        queries: float32 (rows, g, q, d), scaled.
        counts: how many of the q are fitted to, are not, and judge.
        mass: float32 (rows, heads, n), of `_mass`.

    Returns:
        Root-mean-square and summed attention to each entry, both (rows, n), of those that do not judge; and this head's
        part of `Asked` for those that are fitted to, and for those that judge.
    """
    keys, values, mass = (tensor[:, head].to(torch.float32) for tensor in (block.keys, block.values, mass))
    group, learners = queries.shape[1], counts[0] + counts[1]
    # Empty entries get a large negative score, not -inf.
    scores = torch.matmul(queries.flatten(1, 2), keys.mT).add_(mass.log().clamp_min_(_NOTHING).unsqueeze(1))
    most = scores.amax(-1, keepdim=True)
    # softmax is torch's fastest exp.
    terms = torch.maximum(scores, most + _NEGLIGIBLE, out=scores).softmax(-1)
    log_total = most.sub_(terms.amax(-1, keepdim=True).log_()).view(queries.shape[:3])
    terms = terms.unflatten(1, (group, -1))
    # Values of slots are numerators: what a slot gives is its numerator over its mass.
    there = (mass > 0).to(torch.float32).unsqueeze(-1)
    paid = torch.cat((values * (there / mass.clamp_min(_TINY).unsqueeze(-1)), there), dim=-1).unsqueeze(1)
    offered, kept = block.slice_items(paid).squeeze(1), block.without_items(paid).squeeze(1)[..., :-1]

    def asked(part: slice) -> tuple[Tensor, ...]:
        by_entry = terms[:, :, part].flatten(1, 2).mT.unsqueeze(1)
        items = torch.matmul(block.slice_items(by_entry).squeeze(1).mT, offered)
        others = torch.matmul(block.without_items(by_entry).squeeze(1).mT, kept)
        return queries[:, :, part].flatten(1, 2), log_total[:, :, part].flatten(1), items, others

    found = asked(slice(0, counts[0])), asked(slice(learners, None))
    learning = terms[:, :, :learners].flatten(1, 2)
    mean = learning.sum(1)
    return learning.square_().sum(1).div_(max(1, learners * group)).sqrt_(), mean, *found


def _mass(block: KVBlock) -> Tensor:
    """float32 (rows, heads, n): the weights of what is held, 1 for exact tokens; 0 for padding and below 0."""
    return block.valid.to(torch.float32) if block.weights is None else block.weights.clamp_min(0.0) * block.valid


def _fit(coreset: Coreset, asked: Asked, ridge: float) -> Coreset:
    """Numerators and weights nearer to what some reference queries got from all items.

    Least squares, drawn to what they are: with E (q, r) of entries e^(b q.k_s) over the query's total and the residual
    R of [output, mass], the change is E^T (E E^T + ridge * mean(diag(E E^T)))^-1 R.
    """
    held = torch.cat((coreset.values.to(torch.float32), coreset.weights.unsqueeze(-1)), dim=-1)
    terms = _terms(coreset, asked)
    rest = asked.items - torch.matmul(terms, held)
    gram = torch.matmul(terms, terms.mT)
    level = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).div_(max(1, gram.shape[-1]))
    level = level.mul_(ridge).clamp_min_(_TINY)
    gram.diagonal(dim1=-2, dim2=-1).add_(level)
    change = torch.cholesky_solve(rest, torch.linalg.cholesky_ex(gram).L)
    held = torch.addcmul(held, torch.matmul(terms.mT, change), coreset.valid.unsqueeze(-1).to(held.dtype))
    return replace(coreset, values=saturate_(held[..., :-1].clone(), coreset.values.dtype), weights=held[..., -1])


def _error(coreset: Coreset, judges: Asked, group: int) -> Tensor:
    """float32 (rows, query_heads): ||o' - o|| / ||o|| over the queries that judge."""
    held = torch.cat((coreset.values.to(torch.float32), coreset.weights.unsqueeze(-1)), dim=-1)
    instead = torch.matmul(_terms(coreset, judges), held) - judges.items
    whole = judges.items[..., :-1] + judges.others
    mass = 1 + instead[..., -1:]
    # Attention gives 0 where the mass is not positive.
    found = torch.where(mass > _LEAST_MASS, (whole + instead[..., :-1]) / mass.clamp_min(_LEAST_MASS), 0.0)
    difference, whole = (tensor.unflatten(2, (group, -1)).flatten(3).norm(dim=-1) for tensor in (found - whole, whole))
    return (difference / whole.clamp_min(_TINY)).flatten(1)


def _terms(coreset: Coreset, asked: Asked) -> Tensor:
    """e^(b q.k_s) over each query's total, (rows, heads, q, r); 0 for padding."""
    scores = torch.matmul(asked.queries, coreset.keys.to(torch.float32).mT).sub_(asked.log_total.unsqueeze(-1))
    there = coreset.valid.unsqueeze(2)
    # Before the exponential: a padding slot's key of zeros can overflow it.
    return scores.masked_fill_(~there, -torch.inf).clamp_min_(_NEGLIGIBLE).exp_().mul_(there)


def _best_by_layer(scores: Sequence[Tensor], slots: int) -> list[Tensor]:
    """The best items of all layers, the same number for all heads of a layer.

    A layer's k-th slot is worth what its heads' k-th best items are, on average.

    Args:
        scores: (rows, heads, n) of each layer, comparable between layers; -inf for what cannot be taken.
        slots: items to take in a head of a layer, on average.

    Returns:
        Bool (rows, heads, n) of each layer.
    """
    # Padding slots differ between heads: what one of them lacks counts as nothing.
    ordered = [layer.sort(dim=-1, descending=True, stable=True) for layer in scores]
    home = scores[0].device  # layers may be spread over devices
    width = max(layer.shape[-1] for layer in scores)  # layers that shared unequally before hold unequally many
    wide = [
        F.pad(layer.values.clamp_min(0.0).mean(1), (0, width - layer.values.shape[-1])).to(home) for layer in ordered
    ]
    worth = torch.stack(wide, dim=1)
    most = torch.stack([(layer > -torch.inf).sum(-1).amax(-1).to(home) for layer in scores], dim=1)  # (rows, layers)
    there = torch.arange(width, device=home) < most.unsqueeze(-1)
    worth = worth.masked_fill_(~there, -torch.inf)
    total = slots * len(scores)
    # The least that is taken, and of what is worth just that the earlier layers'.
    best = worth.flatten(1).topk(min(max(total, 1), worth[0].numel()), dim=-1).values
    least = best[:, -1:].unsqueeze(-1)
    more, equal = (worth > least).sum(-1), ((worth == least) & there).sum(-1)
    left = total - more.sum(-1, keepdim=True) - (equal.cumsum(-1) - equal)
    counts = more + torch.minimum(left.clamp_min(0), equal)
    kept = []
    for index, layer in enumerate(ordered):
        count = counts[:, index, None, None].to(layer.values.device)
        best = torch.arange(layer.values.shape[-1], device=count.device) < count
        best = best & (layer.values > -torch.inf)
        kept.append(torch.zeros_like(best).scatter_(-1, layer.indices, best))
    return kept


def _take(block: KVBlock, kept: Tensor) -> tuple[Coreset, Tensor]:
    """The items of a mask (rows, heads, items) as they are, right-aligned; and int64, which item each slot is."""
    counts, place = kept.sum(-1, keepdim=True), torch.arange(kept.shape[-1], device=kept.device)
    width = int(counts.max())
    # A place for each, and one behind them for what is not kept: much faster than sorting.
    target = torch.where(kept, kept.cumsum(-1) + (width - 1 - counts), width)
    index = counts.new_zeros(*kept.shape[:2], width + 1).scatter_(-1, target, place.expand_as(target))[..., :width]
    return take_items(block, index, place[:width] >= width - counts).coreset, index


def _merge(parts: Sequence[tuple[Coreset, Tensor]]) -> tuple[Coreset, list[int]]:
    """Join coresets of different items of one block, in the order of their positions, padding slots first.

    Args:
        parts: coresets, and int64 (rows, heads, c), the item of each slot.

    Returns:
        The coreset, and the columns that each row takes.
    """
    valid = torch.cat([part.valid for part, _ in parts], dim=2)
    source = torch.cat([source for _, source in parts], dim=2).masked_fill(~valid, -1)
    counts = valid.sum(-1).amax(-1).tolist()
    order = source.argsort(dim=-1, stable=True)[..., source.shape[-1] - max(counts) :]

    def merged(name: str) -> Tensor:
        wide = {getattr(part, name).dtype for part, _ in parts}
        dtype = torch.float32 if len(wide) > 1 else wide.pop()
        return take_columns(torch.cat([getattr(part, name).to(dtype) for part, _ in parts], dim=2), order)

    coreset = Coreset(merged("keys"), merged("values"), merged("weights"), merged("valid"))
    return coreset, counts


def _first_within(tolerance: float, first: Compressed, second: Compressed) -> Compressed:
    """The first one in the rows whose estimated error is within the tolerance, the second in the others."""
    assert first.error is not None and second.error is not None
    assert first.columns is not None and second.columns is not None
    met = first.error.mean(-1) <= tolerance
    width = max(first.coreset.valid.shape[-1], second.coreset.valid.shape[-1])

    def chosen(name: str) -> Tensor:
        one, other = (_widened(getattr(each.coreset, name), width) for each in (first, second))
        return torch.where(met.view(-1, *[1] * (one.dim() - 1)), one, other)

    coreset = Coreset(chosen("keys"), chosen("values"), chosen("weights"), chosen("valid"))
    columns = [a if kept else b for a, b, kept in zip(first.columns, second.columns, met.tolist(), strict=True)]
    return Compressed(coreset, columns, error=torch.where(met.unsqueeze(-1), first.error, second.error))


def _widened(slots: Tensor, width: int) -> Tensor:
    """Slots (rows, heads, c, ...) behind zeros, `width` in all."""
    return torch.cat((slots.new_zeros(*slots.shape[:2], width - slots.shape[2], *slots.shape[3:]), slots), dim=2)
