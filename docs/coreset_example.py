"""Record one bin of one head of the default model, and its coreset, for the picture in docs/how-it-works.md.

    python -m docs.coreset_example    # writes results/method/coreset.json

The mathematics is that of `coreset/reference.py`. The text is that of the demo, 400 tokens of an essay; the bin is 48
consecutive tokens, of which 12 slots are made, as at a quarter by default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from eval.style import BLUE, GREY, GRID, ORANGE
from wildcat_kv import WildCatCache
from wildcat_kv.compressors import KVBlock, Observation, Scorer
from wildcat_kv.coreset import reference
from wildcat_kv.coreset.noise import gumbel_noise
from wildcat_kv.data.haystack import build_context, make_needles
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model

RECORD = Path(__file__).resolve().parent.parent / "results" / "method" / "coreset.json"
TOKENS, SINK, START, BIN, SLOTS, QUERIES = 400, 4, 100, 48, 12, 64
# The head that is drawn, and the dropped token that is followed.
LAYER, HEAD, FOLLOWED = 28, 0, " think"


@dataclass(frozen=True)
class _Recorder(Scorer):
    """A method that remembers what it is given."""

    blocks: list[KVBlock] = field(default_factory=list, compare=False)

    @property
    def observation(self) -> Observation:
        """The queries of the last tokens, which stand for those to come."""
        return Observation(latest=QUERIES, carried=0)

    @override
    def score(self, block: KVBlock) -> Tensor:
        self.blocks.append(block)
        return torch.zeros(block.keys.shape[:3])


@dataclass(frozen=True)
class _Bin:
    """One head's coreset of the bin.

    Attributes:
        keys: scaled keys, centred at the mean of the head's items, (48, d).
        pivots: places in the bin, in the order of their draws.
        weights: W, (12, 48).
        held: mass of the bin for each later query, (queries, 3): of all tokens, of the slots, of the pivots alone.
    """

    keys: Tensor
    pivots: list[int]
    weights: Tensor
    held: Tensor


def main() -> None:
    """Read the text, compress the bin in every head, and write what the picture needs."""
    model, tokenizer = default_model()
    text = build_context(tokenizer, TOKENS, make_needles(1, seed=1), seed=1)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    recorder = _Recorder()
    with torch.no_grad():
        model(tokens, **{CACHE: WildCatCache(model.config, compressor=recorder, ratio=0.25, sink=SINK)})
    heads = [[_compress(block, head) for head in range(block.keys.shape[1])] for block in recorder.blocks]
    words = [tokenizer.decode([token]) for token in tokens[0, START : START + BIN].tolist()]
    drawn = heads[LAYER][HEAD]
    centred = drawn.keys - drawn.keys.mean(0)
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2] * directions[:2].sum(-1, keepdim=True).sign()  # svd leaves the sign open
    record: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "layer": LAYER,
        "head": HEAD,
        "tokens": words,
        "points": _rounded(centred @ directions.T),
        "variance": round(float((strengths[:2] ** 2).sum() / (strengths**2).sum()), 3),
        "pivots": drawn.pivots,
        "weights": _rounded(drawn.weights.sum(-1)),
        "followed": words.index(FOLLOWED),
        "followed_weights": _rounded(drawn.weights[:, words.index(FOLLOWED)]),
        "held": _rounded(drawn.held),
        # By layer and head: the median over queries of what the slots and the pivots alone hold of the bin's mass.
        "shares": [[_rounded((one.held[:, 1:] / one.held[:, :1]).median(0).values) for one in row] for row in heads],
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(RECORD)
    slots, alone = zip(*(share for layer in record["shares"] for share in layer), strict=True)
    print(
        f"median head: slots hold {median(slots):.0%} of the mass, pivots alone {median(alone):.0%}; "
        f"slots hold less than 5% in {sum(share < 0.05 for share in slots)} of {len(slots)} heads"
    )


def _compress(block: KVBlock, head: int) -> _Bin:
    keys, scale = block.keys[0, head].double(), block.scale
    within = slice(START, START + BIN)
    centred = (keys - block.slice_items(block.keys)[0, head].double().mean(0))[within]
    scaled = centred * scale**0.5 / reference.temperature(centred, scale, None, "released")
    noise = gumbel_noise(0, torch.arange(SLOTS)[:, None], torch.arange(BIN)).double()
    pivots, weights = reference.rpnys(reference.kernel(scaled), noise)
    assert block.queries is not None
    group = block.queries.shape[1] // block.keys.shape[1]
    queries = block.queries[0, group * head : group * (head + 1)].flatten(0, 1).double()
    terms = (scale * queries @ keys[within].T).exp()
    slots, alone = terms[:, pivots] @ weights.sum(-1), terms[:, pivots].sum(-1)
    return _Bin(scaled, pivots, weights, torch.stack((terms.sum(-1), slots, alone), dim=-1))


def _rounded(values: Tensor) -> Any:
    """Give numbers of four digits, so that the record is the same on other machines."""
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{float(values):.4g}")


# The picture


def picture() -> Figure:
    """Draw the keys of the bin and its slots, and what later queries still find of the bin."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8.6, 7.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.75, 1), hspace=0.28, wspace=0.25)
    _draw_keys(figure.add_subplot(grid[0, :]), record)
    _draw_mass(figure.add_subplot(grid[1, 0]), record["held"])
    _draw_heads(figure.add_subplot(grid[1, 1]), record)
    return figure


def _draw_keys(axes: Axes, record: dict[str, Any]) -> None:
    points, pivots, words = record["points"], record["pivots"], [_shown(word) for word in record["tokens"]]
    followed = record["followed"]
    for place, word in enumerate(words):
        if place not in pivots and place != followed:
            axes.plot(*points[place], "o", markersize=4, color="#b5b5b5", zorder=3)
            _label(axes, word, points[place], (4, 3), fontsize=7, color=GREY)
    for pivot, weight, share in zip(pivots, record["weights"], record["followed_weights"], strict=True):
        axes.scatter(*points[pivot], s=60 * max(weight, 0.1), color=BLUE, alpha=0.85, zorder=2, linewidths=0)
        beside = (3 + 4 * weight**0.5, -3)
        look = {"fontsize": 8.5, "color": BLUE, "weight": "bold"}
        _label(axes, f"{words[pivot]}  {weight:.1f}", points[pivot], beside, zorder=6, **look)
        if abs(share) >= 0.05:
            ends = list(zip(points[followed], points[pivot], strict=True))
            axes.plot(*ends, color=ORANGE, linewidth=7 * abs(share), alpha=0.6, zorder=1, solid_capstyle="round")
    axes.plot(*points[followed], "o", markersize=6, color=ORANGE, zorder=4)
    _label(axes, words[followed], points[followed], (-6, -3), fontsize=9, color=ORANGE, weight="bold", ha="right")
    parts = sorted(zip(record["followed_weights"], pivots, strict=True), key=lambda part: -abs(part[0]))[:4]
    told = " ".join(f"{'+' if share > 0 else '−'} {abs(share):.2f} “{words[pivot]}”" for share, pivot in parts)
    axes.set_title(
        f"{len(words)} tokens become {len(pivots)} slots: the pivots (blue), with weights (area and number).\n"
        f"A token that is dropped lives on in them: “{words[followed]}” ≈ {told.lstrip('+ ')} …",
        fontsize=9,
        loc="left",
    )
    axes.set_xlabel(
        f"keys in their two main directions, {record['variance']:.0%} of the variance "
        f"({record['model']}, layer {record['layer']}, key head {record['head']})",
        fontsize=8,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.09, 0.1)


def _label(
    axes: Axes, text: str, at: Sequence[float], shift: tuple[float, float], zorder: float = 2.5, **look: Any
) -> None:
    behind = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.4}
    axes.annotate(text, at, xytext=shift, textcoords="offset points", zorder=zorder, bbox=behind, **look)


def _draw_mass(axes: Axes, held: Sequence[Sequence[float]]) -> None:
    whole, slots, alone = zip(*held, strict=True)
    ends = (min(min(whole), min(alone)) * 0.7, max(max(whole), max(slots)) * 1.4)
    axes.plot(ends, ends, color=GREY, linewidth=0.8)
    axes.plot(whole, alone, ".", color=ORANGE, markersize=4, label="pivots alone, weight 1")
    axes.plot(whole, slots, ".", color=BLUE, markersize=4, label="slots")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Σ exp(b q·k) over the 48 tokens, 192 later queries", fontsize=8)
    axes.set_ylabel("the same of what is kept", fontsize=8)
    axes.set_title("this head: the mass is held by the weights", fontsize=9, loc="left")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.grid(color=GRID)


def _draw_heads(axes: Axes, record: dict[str, Any]) -> None:
    shares = sorted((share for layer in record["shares"] for share in layer), key=lambda share: share[0])
    places = range(len(shares))
    axes.fill_between(places, [slots for slots, _ in shares], step="mid", color=BLUE, linewidth=0, label="slots")
    axes.plot(places, [alone for _, alone in shares], ".", color=ORANGE, markersize=4, label="pivots alone")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel(f"the {len(shares)} key heads, sorted", fontsize=8)
    axes.set_ylabel("share of the mass held (median)", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_title("all heads: some keys stand too far apart", fontsize=9, loc="left")
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def _shown(word: str) -> str:
    return word.strip(" ").replace("\n", "↵") or "␣"


if __name__ == "__main__":
    main()
