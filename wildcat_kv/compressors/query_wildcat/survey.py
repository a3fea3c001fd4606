"""Survey of one layer: what the prompt's own queries attend to.

They are asked from behind the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.fitting import spread_evenly
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.tensors import full_precision, take_columns

# Share of the newest queries among the reference queries: one in so many.
_NEWEST = 3
# Entries that stand for all others in a query's normaliser; they hold most of its mass.
_NORMALISING = 16
# Positions of the queries whose followers are scored at once: they stay in a processor's cache, and a device has room.
_POSITIONS_AT_ONCE, _POSITIONS_ON_DEVICE = 1024, 8192
# Scores of reference queries that a device holds at once: 64 MiB, and about four times that beside them.
_SCORES_ON_DEVICE = 2**24
_TINY = 1e-20
# Logarithm of the mass of padding: finite, for numbers that stay so.
_NOTHING = -1e4
# Logarithm of a share that adds nothing; its square is still a normal number, which processors multiply much faster.
NEGLIGIBLE = -40.0


class Asked(NamedTuple):
    """Some reference queries of a layer, and what they get.

    There are q for each key head; those of a query head are side by side.

    Attributes:
        queries: float32 (rows, heads, q, d), scaled.
        log_total: float32 (rows, heads, q), logarithm of what each pays to all entries.
        items: float32 (rows, heads, q, d_v + 1), what it gets from the items, and their mass, over its total.
        others: float32 (rows, heads, q, d_v), what it gets from all other entries; a judge from newer tokens too.
    """

    queries: Tensor
    log_total: Tensor
    items: Tensor
    others: Tensor


class Survey(NamedTuple):
    """The attention that one layer expects of queries to come.

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


class Questions(NamedTuple):
    """The queries that a layer is asked, and from where.

    Attributes:
        references: reference queries of a query head, the newest among them.
        judges: other queries of a query head, evenly spread.
        ahead: tokens that these queries are moved to behind the text.
        apart: tokens that the query of each token is moved away from the token behind it.
    """

    references: int
    judges: int
    ahead: int
    apart: int


def survey_block(block: KVBlock, questions: Questions, recall: Tensor | None = None) -> Survey:
    """Ask the layer's own queries what they attend to.

    Args:
        block: entries.
        questions: queries to ask.
        recall: float32 (rows, heads, n), attention to each entry as the text is repeated; estimated by default.
    """
    with torch.no_grad(), full_precision(block.keys.device):
        parts = _places(block, questions)
        queries, mass = _moved(block, torch.cat(parts), questions.ahead), _mass(block)
        counts = [len(part) for part in parts]
        found = [_attend(block, heads, queries[:, heads], counts, mass) for heads in _spans(queries, mass)]
        attention, mean = (_joined(scores) for scores in zip(*(each[:2] for each in found), strict=True))
        fitted, judges = (
            Asked(*(_joined(tensors) for tensors in zip(*(each[place] for each in found), strict=True)))
            for place in (2, 3)
        )
        judges = _with_company(block, judges, parts[2], mass, questions.ahead)
        recall, inside = (
            _recall(block, mean, mass, questions.apart) if recall is None else recall,
            block.slice_items(block.valid),
        )
        attention, recall = (
            block.slice_items(scores).masked_fill(~inside, -torch.inf) for scores in (attention, recall)
        )
    return Survey(attention, recall, fitted, judges, queries.shape[2])


def _recall(block: KVBlock, mean: Tensor, mass: Tensor, apart: int) -> Tensor:
    """Estimate how each token's query attends to the next token.

    The query is asked from afar.

    Args:
        block: entries.
        mean: float32 (rows, heads, n), what the reference queries pay to each entry, up to a factor.
        mass: float32 (rows, heads, n), of `_mass`.
        apart: tokens, as in `Questions`.

    Returns:
        float32 (rows, heads, n).
    """
    assert block.queries is not None and block.rotation is not None
    rows, heads, n = mean.shape
    likely = mean.topk(min(_NORMALISING, n), dim=-1).indices
    level = mass.gather(-1, likely).log_()[:, :, None, :, None]
    reference = (take_columns(block.keys, likely).to(torch.float32) * block.scale).unsqueeze(2)
    recall = torch.zeros_like(mean)
    # Query -j and key -j are of one token. Keys step back: there are fewer of them than of queries.
    queries = block.queries.unflatten(1, (heads, -1))
    step_back = block.rotation.forwarding(torch.full((rows, 1), -apart, device=mean.device))
    at_once = _POSITIONS_ON_DEVICE if is_launched(mean.device) else _POSITIONS_AT_ONCE
    for behind in range(min(block.exact, queries.shape[3]) - 1, 0, -at_once):
        length = min(at_once, behind)
        asking = queries.narrow(3, queries.shape[3] - behind - 1, length).to(torch.float32)
        follower = block.keys.narrow(2, n - behind, length).to(torch.float32)
        follower = step_back(follower).transpose(1, 2).unsqueeze(-1)
        # As products of matrices, one a token and head: queries of a head are far apart in memory.
        own = torch.matmul(asking.permute(0, 3, 1, 2, 4), follower).squeeze(-1).mul_(block.scale)
        # Positions last: sums over the few others are then sums of whole rows.
        others = torch.matmul(reference, asking.mT).add_(level).logsumexp(-2)
        score = own.permute(0, 2, 3, 1).sub(others).amax(2).sigmoid_()
        recall.narrow(2, n - behind, length).copy_(score)
    return recall


def _places(block: KVBlock, questions: Questions) -> list[Tensor]:
    """Choose the reference queries: fitted to, not fitted to, and judges.

    The first two are the newest ones, and others evenly spread over those before; the judges are evenly spread over
    all.

    Returns:
        Three int64 (q,), places among the queries.
    """
    assert block.queries is not None
    total, device = block.queries.shape[2], block.queries.device
    newest = min(total, -(-questions.references // _NEWEST))
    spread, judges = min(total, questions.references) - newest, min(total, questions.judges)
    between = newest + spread_evenly(total - newest, spread, device)
    back = torch.cat((torch.arange(newest, device=device), between))
    judge = spread_evenly(total, judges, device, centred=True)
    return [total - 1 - places for places in (back[::2], back[1::2], judge)]


def _moved(block: KVBlock, places: Tensor, ahead: int) -> Tensor:
    """Move queries at `places`, int64 (q,), behind the text.

    Returns float32 (rows, heads, g, q, d), scaled.
    """
    assert block.queries is not None and block.rotation is not None
    queries = block.queries.index_select(2, places).to(torch.float32)
    by = ahead + block.queries.shape[2] - places
    queries = block.rotation.forward(queries, by.expand(queries.shape[0], -1))
    return queries.unflatten(1, (block.keys.shape[1], -1)).mul_(block.scale)


def _spans(queries: Tensor, mass: Tensor) -> list[slice]:
    """Choose the key heads to ask at once: one on a host, as many as there is room for on a device.

    Args:
        queries: float32 (rows, heads, g, q, d).
        mass: float32 (rows, heads, n).
    """
    rows, heads, group, count, _ = queries.shape
    scores = rows * group * count * mass.shape[2]
    most = max(1, _SCORES_ON_DEVICE // max(1, scores)) if is_launched(mass.device) else 1
    return [slice(start, min(start + most, heads)) for start in range(0, heads, most)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join what was found of some heads each, (rows, some, ...)."""
    return torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0]


def _attend(
    block: KVBlock, heads: slice, queries: Tensor, counts: Sequence[int], mass: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute what some key heads' reference queries pay and get.

    Memory is O(q n) a head.

    Args:
        block: entries.
        heads: key heads, h of them.
        queries: float32 (rows, h, g, q, d), scaled.
        counts: numbers of the q that are fitted to, that are not, and that judge.
        mass: float32 (rows, heads, n), of `_mass`.

    Returns:
        Root-mean-square and summed attention to each entry, both (rows, h, n), of those that do not judge; and these
        heads' part of `Asked` for those that are fitted to, and for those that judge.
    """
    keys, values, mass = (tensor[:, heads].to(torch.float32) for tensor in (block.keys, block.values, mass))
    group, learners = queries.shape[2], counts[0] + counts[1]
    # Empty entries get a large negative score, not -inf.
    scores = torch.matmul(queries.flatten(2, 3), keys.mT).add_(mass.log().clamp_min_(_NOTHING).unsqueeze(2))
    most = scores.amax(-1, keepdim=True)
    # softmax is torch's fastest exp.
    terms = torch.maximum(scores, most + NEGLIGIBLE, out=scores).softmax(-1)
    log_total = most.sub_(terms.amax(-1, keepdim=True).log_()).view(queries.shape[:4])
    terms = terms.unflatten(2, (group, -1))
    # Values of slots are numerators: what a slot gives is its numerator over its mass.
    there = (mass > 0).to(torch.float32).unsqueeze(-1)
    paid = torch.cat((values * (there / mass.clamp_min(_TINY).unsqueeze(-1)), there), dim=-1)
    offered, kept = block.slice_items(paid), block.without_items(paid)[..., :-1]

    def asked(part: slice) -> tuple[Tensor, ...]:
        by_entry = terms[:, :, :, part].flatten(2, 3).mT
        items = torch.matmul(block.slice_items(by_entry).mT, offered)
        others = torch.matmul(block.without_items(by_entry).mT, kept)
        return queries[:, :, :, part].flatten(2, 3), log_total[:, :, :, part].flatten(2), items, others

    found = asked(slice(0, counts[0])), asked(slice(learners, None))
    learning = terms[:, :, :, :learners].flatten(2, 3)
    mean = learning.sum(2)
    return learning.square_().sum(2).div_(max(1, learners * group)).sqrt_(), mean, *found


def _with_company(block: KVBlock, judges: Asked, places: Tensor, mass: Tensor, ahead: int) -> Asked:
    """Give the judges the tokens that stand between the text and them.

    Queries of the next `ahead` tokens see half as many newer tokens on average, their own among them, and all of these
    are exact. What a judge pays to them, it has paid to the tokens before it where it stood.

    Args:
        block: entries.
        judges: what the judges pay and get without such tokens.
        places: int64 (q,), places of the judges among the queries.
        mass: float32 (rows, heads, n), of `_mass`.
        ahead: tokens, as in `Questions`.
    """
    assert block.queries is not None
    heads, n, total = mass.shape[1], mass.shape[2], block.queries.shape[2]
    # Newest first; only exact tokens have a place in the text.
    at = (n - total + places).unsqueeze(1) - torch.arange(min(-(-ahead // 2), block.exact), device=places.device)
    there = at >= n - block.exact
    at = at.clamp_min(0).flatten()
    keys, values, weights = (
        tensor.index_select(2, at).to(torch.float32).unflatten(2, (len(places), -1))
        for tensor in (block.keys, block.values, mass)
    )
    own = block.queries.index_select(2, places).to(torch.float32).unflatten(1, (heads, -1)).mul_(block.scale)
    scores = torch.matmul(own.permute(0, 1, 3, 2, 4), keys.mT).permute(0, 1, 3, 2, 4)  # (rows, heads, g, q, k)
    scores = scores.masked_fill_(~(there & (weights > 0)).unsqueeze(2), _NOTHING)
    log_company = scores.logsumexp(-1).flatten(2)
    got = torch.matmul(scores.softmax(-1).transpose(2, 3), values).transpose(2, 3).flatten(2, 3)
    log_total = torch.logaddexp(judges.log_total, log_company)
    share = (judges.log_total - log_total).exp_().unsqueeze(-1)
    return Asked(judges.queries, log_total, judges.items * share, torch.lerp(got, judges.others, share))


def _mass(block: KVBlock) -> Tensor:
    """Give the weights of what is held, float32 (rows, heads, n).

    They are 1 for exact tokens, and 0 for padding and where they are negative.
    """
    return block.valid.to(torch.float32) if block.weights is None else block.weights.clamp_min(0.0) * block.valid
