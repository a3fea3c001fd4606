"""Random tokens for the Triton kernel that compresses, and settings; imports no Triton."""

import random
from dataclasses import dataclass

import torch

from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens

WIDTHS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "random", "random", "duplicates", "constant", "far off", "one huge")


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one compression.

    Attributes:
        spread: standard deviation of the keys.
        kind: keys of a kind that leaves fewer points than slots, or that is hard to compute with.
        shown: share of the tokens that take part; 1 for no mask.
        weighted: True for tokens that are slots already.
        bounded: True for an importance by values, too.
        query_norm: bound on the queries, None for the default.
        given: True for noise that is given, False for noise of the kernel's own.
    """

    seed: int
    rows: int = 1
    heads: int = 1
    n: int = 20
    d: int = 64
    d_v: int = 64
    rank: int = 4
    bins: int = 1
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    kind: str = "random"
    shown: float = 1.0
    weighted: bool = False
    bounded: bool = False
    temperature: str = "released"
    weights: str = "nystrom"
    query_norm: float | None = None
    given: bool = False

    @staticmethod
    def draw(seed: int, programs: int = 1, **fixed) -> "Case":
        """Draw a case of some programs at most."""
        chance = random.Random(seed)
        bins = chance.randint(1, programs)
        heads = chance.randint(1, max(1, programs // bins))
        rank = chance.randint(bins, bins * chance.choice((2, 3, 4, 4, 8, 12)))
        n = chance.randint(max(bins, rank // 2), bins * chance.choice((8, 16, 24, 48, 64)))
        d = chance.choice(WIDTHS if chance.random() < 0.5 else WIDTHS[:2])
        made = {
            "rows": chance.randint(1, max(1, programs // (bins * heads))),
            "heads": heads,
            "n": max(n, bins),
            "d": d,
            "d_v": chance.choice((d, d, 16, 72)),
            "rank": rank,
            "bins": bins,
            "dtype": chance.choice(DTYPES),
            "spread": chance.choice((0.1, 0.5, 1.0, 1.0, 3.0)),
            "kind": chance.choice(KINDS),
            "temperature": chance.choice(("released", "released", "theory")),
            "weights": chance.choice(("nystrom", "clipped")),
            "query_norm": chance.choice((None, None, 3.0)),
            "given": chance.random() < 0.25,
        }
        return Case(seed, **(made | fixed))

    def tokens(self) -> WeightedTokens:
        """Make the tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.heads, self.n)
        keys = self.spread * torch.randn(*shape, self.d, generator=generator)
        if self.kind == "duplicates":
            keys = keys[..., torch.arange(self.n) % 3, :]
        elif self.kind == "constant":
            keys = keys[..., :1, :].expand_as(keys).contiguous()
        elif self.kind == "far off":
            keys = keys + 30
        elif self.kind == "one huge":
            keys[..., self.n // 2, :] *= 50
        values = torch.randn(*shape, self.d_v, generator=generator)
        weights = valid = bound = None
        if self.weighted:
            weights = torch.randn(shape, generator=generator) * 3
            weights[..., ::7] = 0.0
        if self.bounded:
            bound = values.square().amax(2).sum(-1) / 4
        if self.shown < 1:
            valid = torch.rand(shape, generator=generator) < self.shown
        return WeightedTokens(keys.to(self.dtype), values.to(self.dtype), weights, valid, bound)

    def options(self) -> KernelOptions:
        """Make the settings of the kernel."""
        norm = None if self.query_norm is None else torch.full((self.rows, self.heads), self.query_norm)
        return KernelOptions(self.d**-0.5, norm, self.temperature, self.weights)


@dataclass(frozen=True)
class Comparison:
    """Slots of the kernel beside others.

    Attributes:
        slots: slots that were compared.
        marks: slots marked otherwise than the others'.
        pivots: slots with another pivot.
        weights: largest difference of the weights, over the heaviest where that is above 1.
        values: largest difference of the values, over their largest.
    """

    slots: int
    marks: int
    pivots: int
    weights: float
    values: float
