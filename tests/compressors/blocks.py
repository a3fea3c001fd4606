"""Blocks to compress in tests, and one head of one row in float64: what the definitions are written in."""

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from wildcat_kv.compressors import KVBlock
from wildcat_kv.compressors.rotation import Rotation

HEADS, GROUP, D, DV, SCALE = 2, 2, 6, 5, 0.4


@dataclass(frozen=True)
class Size:
    """Contents of a row: sinks, slots, exact tokens, a window; `whole` if old slots are compressed again."""

    sink: int = 2
    slots: int = 0
    recent: int = 12
    window: int = 3
    whole: bool = True
    queried: int = 5

    @property
    def held(self):
        return self.sink + self.slots + self.recent

    @property
    def head(self):
        return self.sink + (0 if self.whole else self.slots)

    @property
    def items(self):
        return self.held - self.head - self.window


@st.composite
def sizes(draw, slots=5):
    """Rows with at least two items and one query."""
    recent = draw(st.integers(2, 16))
    size = Size(
        sink=draw(st.integers(0, 2)),
        slots=draw(st.integers(0, slots)),
        recent=recent,
        window=draw(st.integers(0, recent - 2)),
        whole=draw(st.booleans()),
        queried=draw(st.integers(1, 12)),
    )
    return replace(size, queried=min(size.queried, size.held))


def make(size, seed=0, *, rows=1, padding=True, powers=False, dtype=torch.float32, group=GROUP, state=0, **fields):
    """A block of rows that hold as much as `size` says; some old slots are padding."""
    generator = torch.Generator().manual_seed(seed)
    n = size.held

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = 1.5 * normal(rows, HEADS, n, D), normal(rows, HEADS, n, DV)
    valid = torch.ones(rows, HEADS, n, dtype=torch.bool)
    weights = torch.ones(rows, HEADS, n)
    old = slice(size.sink, n - size.recent)
    for b in range(rows):
        if padding and size.slots > 1:
            valid[b, :, old] = torch.rand(HEADS, size.slots, generator=generator) < 0.7
            valid[b, :, n - size.recent - 1] = True
        if powers:
            chosen = 2.0 ** torch.randint(0, 3, (size.slots,), generator=generator)
            weights[b, :, old] = chosen
            values[b, :, old] *= chosen.unsqueeze(-1)
    keys[~valid], values[~valid], weights[~valid] = 0, 0, 0
    given_fields = {
        "layer_index": 1,
        "sharing": range(3),
        "weights": weights,
        "queries": (1.5 * normal(rows, HEADS * group, size.queried, D)).to(dtype),
        "carried_state": normal(rows, HEADS, n, state).abs(),
        "rotation": ROTATION,
        "output_projection": torch.randn(HEADS * group, DV, 7, generator=torch.Generator().manual_seed(7)),
        "seen": n + 3 * size.slots,
        **fields,
    }
    return KVBlock(
        keys=keys.to(dtype),
        values=values.to(dtype),
        valid=valid,
        items=size.items,
        window=size.window,
        exact=size.recent + (size.sink if not size.slots else 0),
        scale=SCALE,
        value_bound=torch.full((rows, HEADS), 9.0),
        **given_fields,
    )


def half(block):
    return max(1, block.items // 2)


class Head:
    """One head of one row, in float64: what the definitions are written in."""

    def __init__(self, block, b, h):
        self.n, self.exact, self.seen, self.scale = block.keys.shape[2], block.exact, block.seen, block.scale
        self.k, self.v = block.keys[b, h].double(), block.values[b, h].double()
        self.valid = block.valid[b, h].tolist()
        self.state = block.carried_state[b, h].double()
        group = block.queries.shape[1] // HEADS
        self.queries = block.queries[b, h * group : (h + 1) * group].double()
        self.m = block.queries.shape[2]
        self.first = self.n - block.window - block.items
        self.items = range(self.first, self.n - block.window)

    def probabilities(self, query_head, back):
        """Compute what a query gives each entry; `back` is its place from the end, 1 the newest."""
        query, scores = self.queries[query_head, self.m - back], []
        for entry in range(self.n):
            age = self.n - entry
            later = age < back and age <= self.exact
            hidden = later or not self.valid[entry]
            scores.append(-math.inf if hidden else self.scale * float(query @ self.k[entry]))
        top = max(scores)
        terms = [math.exp(score - top) for score in scores]
        return [term / sum(terms) for term in terms]


def heads(block):
    for b in range(len(block.keys)):
        for h in range(HEADS):
            yield b, h, Head(block, b, h)


def kept_entries(block, found, b, h):
    """Which entries of the row the slots of what a method found are; they must be there as they were."""
    head, kept, coreset = Head(block, b, h), [], found.coreset
    assert not coreset.keys[b, h][~coreset.valid[b, h]].any() and not coreset.values[b, h][~coreset.valid[b, h]].any()
    for key, value in zip(coreset.keys[b, h].double(), coreset.values[b, h].double(), strict=True):
        for entry in range(head.n):
            if head.valid[entry] and torch.equal(key, head.k[entry]) and torch.equal(value, head.v[entry]):
                kept.append(entry)
    assert len(kept) == coreset.valid[b, h].sum() and kept == sorted(set(kept))
    assert set(kept) <= set(head.items)
    return kept


def assert_best(block, found, b, h, scores, rank):
    """The `rank` best items are kept, or all that are valid; what ties to float32 may be either."""
    head = Head(block, b, h)
    kept = kept_entries(block, found, b, h)
    candidates = [entry for entry in head.items if head.valid[entry]]
    assert len(kept) == min(rank, len(candidates))
    dropped = [scores[entry] for entry in candidates if entry not in kept]
    if kept and dropped:
        worst, best = min(scores[entry] for entry in kept), max(dropped)
        assert worst >= best or worst >= best - 1e-5 * abs(best)  # both may be infinite


FREQUENCIES = torch.tensor([1.0, 0.3, 0.05])


def _angles(positions):
    angle = positions.unsqueeze(-1) * FREQUENCIES
    return torch.cat((angle, angle), -1).cos() * 1.1, torch.cat((angle, angle), -1).sin() * 1.1


def _turn(vectors, cos, sin):
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


ROTATION = Rotation(_angles, _turn)


def rotation_matrix(position):
    """Build the matrix behind ROTATION; it stretches by 1.1."""
    matrix = torch.zeros(D, D, dtype=torch.float64)
    for i, frequency in enumerate(FREQUENCIES.double().tolist()):
        cos, sin, j = 1.1 * math.cos(position * frequency), 1.1 * math.sin(position * frequency), i + D // 2
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix
