"""The figures of the documentation, made anew from the records in results.

Run it from a checkout that has the extra `eval` (matplotlib comes with it); nothing is measured, it takes seconds:

    python -m docs.figures            # writes docs/images/*.svg
    python -m docs.figures --png DIR  # also as PNG, to be looked at

The same records give the same bytes. `budget-short.svg` and `travel.svg` are computed from the budget's arithmetic,
`questions.svg` is drawn, `kept.svg` and `coreset.svg` show one text; all others show means or medians of the samples on
disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs import attention_pictures, coreset_example, first_figure, kept_tokens, questions_picture, travel_picture
from eval.attention.views import side_by_side, view_path
from eval.frontier import frontier_points
from eval.frontier_plot import frontier_plot
from eval.records import Folder
from eval.style import BLUE, GREEN, GREY, GRID, ORANGE, PALE_BLUE, PINK, house_style, save
from wildcat_kv import WildCatConfig
from wildcat_kv.cache.budget import Row, plan_fold

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_SMOKE = _ROOT / "results" / "eval" / "smoke"
_SMOKE_OURS = _ROOT / "results" / "eval" / "smoke_query_wildcat"
_EXACT_LAYERS = _ROOT / "results" / "eval" / "exact_layers"
_FRONTIER = _ROOT / "results" / "eval" / "frontier"
# Runs of one frontier: the default, all methods without what was measured of the model, and RULER.
_PARTS = ("frontier_default", "frontier", "frontier_ruler")
_BENCHMARKS = _ROOT / "results" / "benchmarks"
_DINOV2 = _ROOT / "results" / "attention" / "dinov2"
# Methods of that run, by their names in the figure.
_SEEN = {
    "exact": "exact",
    "uniform, 1,024 keys": "uniform rank 1024",
    "stratified, 1,024 keys": "stratified rank 1024",
    "WildCat as published": "wildcat rank 256 bins 16",
    "Performer": "performer features 256",
    "ScatterBrain": "scatterbrain band 64 features 128",
    "Reformer": "reformer chunk 64 rounds 4",
    "KDEformer": "kdeformer block 64 samples 128",
    "HyperAttention": "hyperattention block 256 samples 256 exact_below 0",
    "Thinformer": "thinformer g 3",
    "NearWildCat, A+B": "near_wildcat A+B 512",
    "NearWildCat, A+B+C+D": "near_wildcat A+B+C+D 512",
}

_OURS, _SECOND, _THIRD, _FOURTH, _GREY = BLUE, ORANGE, GREEN, PINK, GREY


def main() -> None:
    """Write every figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--png", type=Path, metavar="DIR", help="write PNG files as well, to this folder")
    folder = parser.parse_args().png
    figures: dict[str, Callable[[], Figure]] = {
        "answers": first_figure.first_figure,
        "methods": methods,
        "exact-layers": exact_layers,
        "memory": memory,
        "speed": speed,
        "budget-short": budget_short,
        "travel": travel_picture.picture,
        "coreset": coreset_example.picture,
        "questions": questions_picture.picture,
        "kept": kept_tokens.picture,
        "guarantee": attention_pictures.guarantee,
        "near-wildcat": attention_pictures.near,
        "views": views,
    }
    for suffix in ("", "_qwen"):
        if (_FRONTIER.parent / f"frontier{suffix}").is_dir():
            figures[f"frontier{suffix.replace('_', '-')}"] = partial(frontier, suffix)
    (_HERE / "images").mkdir(exist_ok=True)
    with house_style():
        for name, make in figures.items():
            figure = make()
            path = _HERE / "images" / f"{name}.svg"
            save(figure, path, small=name.startswith(("answers", "coreset", "frontier")))
            print(path)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                save(figure, folder / f"{name}.png")


# Encoders


def views() -> Figure:
    """Draw what DINOv2 sees of a photograph by every method."""
    group, name = "896 px, 4,097 tokens", "china"
    paths = {title: view_path(_DINOV2, group, name, method) for title, method in _SEEN.items()}
    return side_by_side(f"{name}, {group}", paths, columns=4)


# Accuracy


def methods() -> Figure:
    """Draw needle and drift of every method at a quarter and a tenth."""
    samples = _samples(_SMOKE)
    # A later run on the same samples; WildCat is in both.
    samples += [sample for sample in _samples(_SMOKE_OURS) if sample["method"].startswith(("query_wildcat", "default"))]
    panels = (
        ("needle", "nll", "needle: negative log-likelihood of the\nnumber, nats a digit"),
        ("drift", "kl", "drift: divergence from the exact cache's\npredictions, nats a token"),
    )
    names = sorted(
        {sample["method"] for sample in samples} - {"exact"},
        key=lambda name: (-_mean(samples, "needle", "nll", name, 0.25), name),
    )
    figure = Figure(figsize=(8.2, 4.9))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (task, metric, label) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            quarter, tenth = (_mean(samples, task, metric, name, ratio) for ratio in (0.25, 0.1))
            axis.plot([quarter, tenth], [place, place], color="#cccccc", zorder=1)
            axis.plot(quarter, place, "o", color=_OURS, zorder=2)
            axis.plot(tenth, place, "s", color=_SECOND, mfc="white", zorder=2)
        axis.set_xlabel(f"{label}, n = {_count(samples, task)} (lower is better)", fontsize=8)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="x", color=GRID)
    axes[0].set_yticks(range(len(names)), names)
    for label in axes[0].get_yticklabels():
        ours = any(word in label.get_text() for word in ("wildcat", "default"))
        label.set_fontweight("bold" if ours else "normal")
    axes[0].plot([], [], "o", color=_OURS, label="a quarter kept")
    axes[0].plot([], [], "s", color=_SECOND, mfc="white", label="a tenth kept")
    axes[0].legend(loc="lower left", frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct, float32, 1,000 tokens compressed before the question is known", fontsize=9)
    figure.tight_layout()
    return figure


def frontier(suffix: str = "") -> Figure:
    """Draw scores over the bytes held: needle, drift, and RULER where there is a run of it.

    Args:
        suffix: end of the runs' names, such as "_qwen".
    """
    folders = [folder for name in _PARTS if (folder := _FRONTIER.parent / f"{name}{suffix}").is_dir()]
    runs = [Folder(folder) for folder in folders]
    model = runs[0].manifest["model"]
    points = [point for run in runs for point in frontier_points(run.manifest, run.records())]
    figure = frontier_plot(points, title=model["name"], bytes_of=model["dtype"])
    assert figure is not None
    return figure


def exact_layers() -> Figure:
    """Draw needle and drift with one layer more left exact, for each layer."""
    samples = _samples(_EXACT_LAYERS)
    layers = sorted(
        int(name.split()[1]) for name in {sample["method"] for sample in samples} if name.startswith("exact ")
    )
    figure = Figure(figsize=(8.2, 4.2))
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (task, metric, label) in zip(
        axes, (("needle", "nll", "needle,\nnats a digit"), ("drift", "kl", "drift,\nnats a token")), strict=True
    ):
        base = _mean(samples, task, metric, "wildcat", 0.25)
        axis.bar(layers, [_mean(samples, task, metric, f"exact {layer}", 0.25) for layer in layers], color=_OURS)
        axis.axhline(base, color=_SECOND, linewidth=1, label=f"all layers compressed: {base:.2f}")
        axis.set_ylabel(f"{label}, n = {_count(samples, task)}")
        axis.set_ylim(0, base * 1.35)
        axis.legend(loc="upper left", frameon=False, ncols=2)
    axes[1].set_xticks(layers)
    axes[1].set_xlabel("the one layer that is left exact (lower bars are better; the other 29 keep a quarter)")
    figure.suptitle("SmolLM2-135M-Instruct, float32, context of 1,000 tokens, WildCat, ratio 0.25", fontsize=9)
    figure.tight_layout()
    return figure


# Cost


def memory() -> Figure:
    """Draw bytes held after a prefill and the peak while it ran."""
    records = _records("memory")
    caches = ("DynamicCache", "StaticCache", "QuantizedCache, fp8", "wildcat")
    figure = Figure(figsize=(8.2, 2.7))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        rows = [
            [
                _median(records, quantity, dtype=dtype, contender=cache) / 2**20
                for quantity in ("held_bytes", "peak_bytes")
            ]
            for cache in caches
        ]
        _paired_bars(axis, caches, rows, ("held afterwards", "peak of the prefill"))
        axis.set_xlabel(f"MiB, {dtype} (lower is better)")
    axes[0].legend(loc="upper right", frameon=False, fontsize=8)
    figure.suptitle("A prompt of 8,000 tokens, SmolLM2-135M-Instruct, CPU, one thread, ratio 0.25", fontsize=9)
    figure.tight_layout()
    return figure


def speed() -> Figure:
    """Draw tokens per second after a long context."""
    records = _records("decode")
    caches = ("DynamicCache", "StaticCache", "QuantizedCache, fp8", "DynamicCache of the stored length", "wildcat")
    figure = Figure(figsize=(8.2, 2.9))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        rows = []
        for cache in caches:
            steps = [_median(records, "seconds_per_step", dtype=dtype, contender=cache, rows=count) for count in (1, 4)]
            rows.append([count / step if step else 0.0 for count, step in zip((1, 4), steps, strict=True)])
        _paired_bars(axis, caches, rows, ("1 row", "4 rows together"))
        axis.set_xlabel(f"tokens per second, {dtype}")
    axes[0].legend(loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(
        "After 8,000 tokens, SmolLM2-135M-Instruct, two CPU cores, ratio 0.25 (higher is better; no bar: not measured)",
        fontsize=9,
    )
    figure.tight_layout()
    return figure


def _paired_bars(axis: Axes, names: Sequence[str], rows: Sequence[Sequence[float]], labels: tuple[str, str]) -> None:
    for place, values in enumerate(rows):
        for index, value in enumerate(values):
            if value:
                at = place + (0.2, -0.2)[index]
                axis.barh(at, value, 0.36, color=(_OURS, PALE_BLUE)[index])
                axis.text(value, at, f" {value:,.0f}", va="center", fontsize=8)
    for label, colour in zip(labels, (_OURS, PALE_BLUE), strict=True):
        axis.barh(0, 0, color=colour, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.15 * max(max(row) for row in rows))


# What is computed


def budget_short() -> Figure:
    """Draw a prompt's sink, slots and window by its length, and the entries stored at a ratio or limit."""
    figure = Figure(figsize=(8.2, 3.1))
    left, right = figure.subplots(1, 2)
    lengths = list(range(8, 641, 4))
    parts = [_after_prompt(length, WildCatConfig(ratio=0.25, sink=32)) for length in lengths]
    left.stackplot(
        lengths,
        [row.sink for row in parts],
        [row.slots for row in parts],
        [row.exact for row in parts],
        colors=(_THIRD, _OURS, _FOURTH),
        labels=("sink, exact", "slots of the coreset", "window, exact"),
    )
    left.axvline(304, color=_GREY, linestyle=":", linewidth=1)
    left.text(300, 148, "shorter prompts:\nsink and window shrink", ha="right", va="top", color=_GREY, fontsize=8)
    left.set_xlabel("tokens of the prompt")
    left.set_ylabel("entries stored in a layer and head")
    left.set_title("ratio=0.25", fontsize=9)
    left.legend(loc="upper left", frameon=False, fontsize=8, reverse=True, bbox_to_anchor=(0, 0.72))
    lengths = list(range(16, 6001, 16))
    for settings, colour, line in (
        (WildCatConfig(ratio=0.5, sink=32), _SECOND, "--"),
        (WildCatConfig(ratio=0.25, sink=32), _SECOND, "-"),
        (WildCatConfig(max_tokens=1024, sink=32), _OURS, "-"),
    ):
        stored = [_after_prompt(length, settings).stored for length in lengths]
        right.plot(lengths, stored, line, color=colour)
    right.plot(lengths, lengths, ":", color=_GREY)
    right.set_ylim(0, 3000)
    right.set_xlabel("tokens of the prompt")
    right.set_ylabel("entries after the prompt")
    right.set_title("a share, or a limit", fontsize=9)
    for text, x, y, colour in (
        ("exact", 2250, 2600, _GREY),
        ("ratio=0.5", 4250, 2500, _SECOND),
        ("ratio=0.25", 4700, 1360, _SECOND),
        ("max_tokens=1024", 4150, 830, _OURS),
    ):
        right.text(x, y, text, color=colour, fontsize=8, ha="right" if y > 1000 else "left")
    figure.tight_layout()
    return figure


def _after_prompt(tokens: int, settings: WildCatConfig) -> Row:
    row = Row().append(tokens)
    fold = plan_fold(row, settings, prefill=True)
    return row if fold is None else fold.apply(row)


# Records


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Read the samples of an evaluation run."""
    return Folder(folder).records()


def _mean(samples: Sequence[dict[str, Any]], task: str, metric: str, method: str, ratio: float) -> float:
    return statistics.fmean(
        sample["scores"][metric]
        for sample in samples
        if (sample["task"], sample["method"], sample["ratio"]) == (task, method, ratio)
    )


def _count(samples: Sequence[dict[str, Any]], task: str) -> int:
    """Count the samples that every method has got of a task."""
    return sum(sample["task"] == task and sample["method"] == "exact" for sample in samples)


def _records(benchmark: str) -> list[dict[str, Any]]:
    return json.loads((_BENCHMARKS / f"{benchmark}.json").read_text(encoding="utf-8"))["records"]


def _median(records: Sequence[dict[str, Any]], quantity: str, **labels: Any) -> float:
    """Take the median of a benchmark's samples; 0 where there are none."""
    found = [
        record["samples"]
        for record in records
        if record["quantity"] == quantity and labels.items() <= record["labels"].items()
    ]
    return statistics.median(found[0]) if found else 0.0


if __name__ == "__main__":
    main()
