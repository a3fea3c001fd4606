"""One layer: error, time and operations of every method, on made-up and on recorded queries, keys and values."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from eval.attention.dinov2 import PATCH, dinov2_small
from eval.attention.methods import Recorded
from eval.attention.pictures import PICTURES, picture
from eval.attention.scores import output_errors
from eval.attention.tasks import Case, Measured, Metric, Task, Wanted
from wildcat_kv import compress_kv, weighted_attention
from wildcat_kv.attention import Attention, Exact, WildCatAttention, use
from wildcat_kv.coreset.guarantee import attention_error, error_bound


class Layer(NamedTuple):
    """Queries (1, heads, q, d), keys (1, heads, n, d) and values (1, heads, n, d_v) of a layer, and the scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class Source(BaseModel):
    """Source of layers; see the subclasses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def cases(self) -> list[Case]:
        """List the layers."""
        raise NotImplementedError

    def layer(self, case: Case) -> Layer:
        """Make a layer."""
        raise NotImplementedError


class Gaussian(Source):
    """Standard normal queries, keys and values.

    Args:
        source: "gaussian".
        n: numbers of keys, and of queries.
        d: channels.
        heads: number of heads.
        inputs: number of draws.
        dtype: floating type to compute in, "float32" or "float64".
    """

    source: Literal["gaussian"]
    n: list[int] = Field(min_length=1)
    dtype: Literal["float32", "float64"] = "float32"
    d: int = Field(default=64, ge=1)
    heads: int = Field(default=2, ge=1)
    inputs: int = Field(default=1, ge=1)

    def cases(self) -> list[Case]:
        """List every draw of every length."""
        return [
            Case(f"draw {number + 1}", f"Gaussian, n {n:,}, d {self.d}", n)
            for n in self.n
            for number in range(self.inputs)
        ]

    def layer(self, case: Case) -> Layer:
        """Draw a layer, the same for the same case."""
        query, key, value = self._normal(case)
        return Layer(query, key, value, self.d**-0.5)

    def _normal(self, case: Case) -> list[Tensor]:
        generator = torch.Generator().manual_seed(int(case.input.split()[1]) * 100_003 + case.n)
        shape, dtype = (1, self.heads, case.n, self.d), getattr(torch, self.dtype)
        return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


class Bounded(Gaussian):
    """Queries, keys and values of bounded norm, for which the theory holds: b R_Q R_K is `product`.

    Args:
        source: "bounded".
        product: b R_Q R_K.
        d: channels.
    """

    source: Literal["bounded"]  # type: ignore[assignment]
    product: float = Field(default=2.0, gt=0)
    d: int = Field(default=4, ge=1)

    def cases(self) -> list[Case]:
        """List every draw of every length."""
        return [case._replace(group=f"bounded, n {case.n:,}, d {self.d}") for case in super().cases()]

    def layer(self, case: Case) -> Layer:
        """Draw a layer: directions at random, norms of 1."""
        query, key, value = (F.normalize(part, dim=-1) for part in self._normal(case))
        return Layer(query, key, value, self.product)


class Captured(Source):
    """Queries, keys and values of DINOv2-S on photographs.

    Args:
        source: "dinov2".
        pixels: sides of the squares, multiples of 14.
        layers: numbers of the layers, from 0.
        inputs: number of pictures.
        shape: "whole" for a layer as it is; "biggan" for the paper's shape of BigGAN (queries of all patches, keys and
            values max-pooled two by two, 256 channels of values); "t2t" for that of T2T-ViT (one head, no class token).
    """

    source: Literal["dinov2"]
    pixels: list[int] = Field(min_length=1)
    layers: list[Annotated[int, Field(ge=0, lt=12)]] = Field(min_length=1)
    inputs: int = Field(default=1, ge=1, le=len(PICTURES))
    shape: Literal["whole", "biggan", "t2t"] = "whole"

    def cases(self) -> list[Case]:
        """List every layer of every picture."""
        found = []
        for side in self.pixels:
            grid = (side // PATCH, side // PATCH)
            n = grid[0] * grid[1] // (4 if self.shape == "biggan" else 1) + (self.shape == "whole")
            for layer in self.layers:
                for name in PICTURES[: self.inputs]:
                    title = f"DINOv2{'' if self.shape == 'whole' else f' as {self.shape}'}, n {n:,}, layer {layer}"
                    found.append(Case(name, title, n, grid if self.shape == "whole" else None))
        return found

    def layer(self, case: Case) -> Layer:
        """Record a layer of the exact model."""
        number = int(case.group.rpartition(" ")[2])
        tokens = case.n * (4 if self.shape == "biggan" else 1) - (self.shape == "whole")
        recorder, model = Recorded(Exact()), dinov2_small()
        with use(model.backbone, {number: recorder}):
            model(picture(case.input, math.isqrt(tokens) * PATCH))
        query, key, value, scale = recorder.calls[0]
        layer = Layer(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return {"whole": lambda whole: whole, "biggan": _like_biggan, "t2t": _like_t2t}[self.shape](layer)


def _like_t2t(layer: Layer) -> Layer:
    """Take the first head without its class token."""
    query, key, value = (part[:, :1, 1:] for part in (layer.query, layer.key, layer.value))
    return Layer(query, key, value, layer.scale)


def _like_biggan(layer: Layer) -> Layer:
    """Take the first head's queries, its keys pooled, and the pooled values of four heads side by side."""
    side = math.isqrt(layer.query.shape[2] - 1)

    def pooled(part: Tensor) -> Tensor:
        plane = part[:, :, 1:].transpose(2, 3).unflatten(3, (side, side)).flatten(0, 1)
        return F.max_pool2d(plane, 2).flatten(2).transpose(1, 2).unsqueeze(0)

    value = pooled(layer.value)[:, :4].transpose(1, 2).flatten(2).unsqueeze(1)
    return Layer(layer.query[:, :1, 1:], pooled(layer.key)[:, :1], value, layer.scale)


class Layers(Task):
    """Attend in one layer.

    Args:
        task: "layers".
        sources: where the layers come from.
        repeats: times that a call is made; the fastest counts.
    """

    title: ClassVar[str] = "One layer"
    metrics: ClassVar[dict[str, Metric]] = {
        "relative": Metric("relative error", False),
        "largest": Metric("largest error", False),
        "bounded": Metric("largest error over values", False),
    }

    task: Literal["layers"] = "layers"
    sources: list[Annotated[Gaussian | Bounded | Captured, Field(discriminator="source")]] = Field(min_length=1)
    repeats: int = Field(default=1, ge=1)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return {case.group: source for source in self.sources for case in source.cases()}

    def cases(self) -> list[Case]:
        """List the layers of all sources."""
        return [case for source in self.sources for case in source.cases()]

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare the outputs with exact ones."""
        layer = self._sources[case.group].layer(case)
        _, seconds = self._timed(Exact(), layer)
        work = _work(Exact(), layer)
        exact = Exact()(*(part.double() for part in layer[:3]), scale=layer.scale)
        for one in wanted:
            method = one.build(case.n, case.grid)
            output, took = self._timed(method, layer)
            shares = {"attention": took / seconds, "work": _work(method, layer) / work}
            yield Measured(one.method, one.seed, output_errors(output, exact, layer.value), {"attention": took}, shares)

    def _timed(self, method: Attention, layer: Layer) -> tuple[Tensor, float]:
        least = math.inf
        with torch.no_grad():
            for _ in range(self.repeats):
                start = time.process_time()
                output = method(*layer[:3], scale=layer.scale)
                least = min(least, time.process_time() - start)
        return output, least


class Guarantee(Layers):
    """Compare the error of a coreset with its bound and with an estimate, over ranks.

    The methods are "wildcat" with a rank and bins each. Coresets are drawn anew, so that bound and error are of the
    same one.

    Args:
        task: "guarantee".
        sources: where the layers come from.
        rows: exact rows of the estimate.
        queries: number of queries to bound, evenly spread.
    """

    title: ClassVar[str] = "Guarantee"
    metrics: ClassVar[dict[str, Metric]] = {
        "error": Metric("largest error", False),
        "estimate": Metric("largest of a few rows", False),
        "bound": Metric("bound", False),
    }

    task: Literal["guarantee"] = "guarantee"  # type: ignore[assignment]
    rows: int = Field(default=32, ge=1)
    queries: int = Field(default=512, ge=1)

    def measure(self, case: Case, wanted: Sequence[Wanted]) -> Iterator[Measured]:
        """Compare errors over the largest magnitude of a value, the largest of all heads."""
        query, key, value, scale = self._sources[case.group].layer(case)
        query = query[:, :, :: -(-query.shape[2] // self.queries)]
        exact = Exact()(query.double(), key.double(), value.double(), scale=scale)
        least, most = value.amin(2, keepdim=True), value.amax(2, keepdim=True)
        reach, norm = float(value.abs().max()), query.norm(dim=-1).amax(-1)
        for one in wanted:
            method = one.build(case.n, case.grid)
            if not isinstance(method, WildCatAttention) or method.rank is None:
                raise ValueError(f"methods: {one.method!r} has no guarantee; take wildcat with a rank")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(one.seed)
                setting = {"scale": scale, "query_norm": norm, "bins": method.bins}
                coreset = compress_kv(key, value, rank=min(method.rank, case.n), **setting)
                output = weighted_attention(
                    query, coreset.keys, coreset.values, coreset.weights, scale=scale, value_range=(least, most)
                )
            estimate = attention_error(query, key, value, output, rows=self.rows, scale=scale, seed=one.seed)
            bound = error_bound(query, key, coreset, **setting).amax(-1) * (most - least).squeeze(2).amax(-1)
            scores = {"error": (output - exact).abs().max(), "estimate": estimate.largest.max(), "bound": bound.max()}
            shares = {name: float(score) / reach for name, score in scores.items()}
            yield Measured(one.method, one.seed, shares, {}, {"slots": method.rank / case.n})


def _work(method: Attention, layer: Layer) -> int:
    (*_, queries, d), n, d_v = layer.query.shape, layer.key.shape[-2], layer.value.shape[-1]
    return method.cost(n, d, queries=queries, value_dim=d_v)
