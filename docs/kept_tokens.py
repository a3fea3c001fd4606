"""Record which tokens Query WildCat keeps in each head of the default model, for the picture in docs/method.md.

    python -m docs.kept_tokens    # writes results/method/kept_tokens.json.gz

The text is that of the demo: essays of 1,000 tokens that hold five-digit numbers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from typing_extensions import override

from eval.style import BLUE, GREY, ORANGE, PINK
from wildcat_kv import WildCatCache
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat.survey import Survey
from wildcat_kv.data.haystack import build_context, make_needles
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model

RECORD = Path(__file__).resolve().parent.parent / "results" / "method" / "kept_tokens.json.gz"
TOKENS, RATIO, SINK, NEEDLES = 1000, 0.25, 4, 3


@dataclass(frozen=True)
class _Recorder(QueryWildCat):
    """Query WildCat that remembers what it chose."""

    chosen: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    @override
    def choose(self, surveys: Sequence[Survey], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        attended, recalled = super().choose(surveys, rank)
        self.chosen.extend(zip(attended, recalled, strict=True))
        return attended, recalled


def main() -> None:
    """Read the text, and write positions for each head of each layer."""
    model, tokenizer = default_model()
    needles = make_needles(NEEDLES, seed=1)
    text = build_context(tokenizer, TOKENS, needles, seed=1)
    encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=False)
    recorder = _Recorder()
    cache = WildCatCache(model.config, compressor=recorder, ratio=RATIO, sink=SINK)
    with torch.no_grad():
        model(encoding.input_ids, **{CACHE: cache})
    spans = [(text.index(needle.sentence), text.index(needle.sentence) + len(needle.sentence)) for needle in needles]
    offsets = encoding.offset_mapping[0].tolist()
    record = {
        "model": "SmolLM2-135M-Instruct",
        "tokens": encoding.input_ids.shape[1],
        "ratio": RATIO,
        "sink": SINK,
        "window": cache.settings.window,
        "needles": [[at for at, (start, end) in enumerate(offsets) if start < b and end > a] for a, b in spans],
        # By layer and head, positions in the text; the first item is the one behind the sink.
        "attended": [_positions(first) for first, _ in recorder.chosen],
        "recalled": [_positions(second) for _, second in recorder.chosen],
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    print(RECORD)


def picture() -> Figure:
    """Draw what the first two parts keep: a line for each head, a column for each token."""
    record = json.loads(gzip.decompress(RECORD.read_bytes()))
    lines = [
        (kept, again)
        for layer, second in zip(record["attended"], record["recalled"], strict=True)
        for kept, again in zip(layer, second, strict=True)
    ]
    image = np.zeros((len(lines), record["tokens"]), dtype=int)
    for line, (attended, recalled) in enumerate(lines):
        image[line, recalled] = 1
        image[line, attended] = 2
    image[:, : record["sink"]] = image[:, -record["window"] :] = 3
    figure = Figure(figsize=(8.2, 4.6))
    axis, shares = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    colours = ListedColormap(["#f4f4f4", BLUE, ORANGE, GREY])
    axis.imshow(image, aspect="auto", cmap=colours, vmin=0, vmax=3, interpolation="nearest")
    for needle in record["needles"]:
        axis.axvspan(needle[0] - 0.5, needle[-1] + 0.5, ymin=1, ymax=1.03, color=PINK, clip_on=False)
    heads = len(record["attended"][0])
    axis.set_yticks([heads * layer + (heads - 1) / 2 for layer in range(0, len(lines) // heads, 5)])
    axis.set_yticklabels([str(layer) for layer in range(0, len(lines) // heads, 5)])
    axis.set_ylabel(f"layer, {heads} heads each")
    axis.set_xlabel("token")
    counts = [[len(part) for part in line] for line in lines]
    recalled_share, attended_share = ([line[at] / record["tokens"] for line in counts] for at in (1, 0))
    places = range(len(lines))
    shares.barh(places, attended_share, height=1, color=ORANGE)
    shares.barh(places, recalled_share, height=1, left=attended_share, color=BLUE)
    shares.set_xlabel("share of the tokens")
    shares.set_xlim(0, 1)
    shares.xaxis.set_major_formatter(PercentFormatter(1))
    labels = [
        Patch(color=ORANGE, label="1: attended to"),
        Patch(color=BLUE, label="2: looked up"),
        Patch(color="#e4e4e4", label="3: left to WildCat"),
        Patch(color=GREY, label="sink and window"),
        Patch(color=PINK, label="planted number"),
    ]
    figure.legend(handles=labels, loc="upper center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def _positions(kept: Tensor) -> list[list[int]]:
    return [(head.nonzero().flatten() + SINK).tolist() for head in kept[0]]


if __name__ == "__main__":
    main()
