"""Which families work: every family of the installed Transformers, by a tiny random model and the checks.

python -m tests.survey writes docs/families.md, and exits with 1 if a family is neither refused nor works.
After a crash, --resume goes on with the families that are left.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests import zoo
from wildcat_kv.integrations.model_checks import Result, run_checks
from wildcat_kv.models.modeling_source import INSTEAD
from wildcat_kv.models.support import cache_layers, decoder_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
RECORD = ROOT / "build" / f"survey-{tf.__version__}.jsonl"

WORKS, PARTLY, REFUSED, FAILED, UNBUILT = "works", "partly", "refused", "fails", "not built"
_BESIDE = {
    "DynamicSlidingWindowLayer": "those with a window keep it",
    "LinearAttentionLayer": "linear ones keep their state",
    "DummyLayer": "others keep nothing",
}
_ONLY_WINDOWS = "all layers are DynamicSlidingWindowLayer;"
_TITLES = {
    WORKS: "All layers are compressed",
    PARTLY: "Some layers are compressed",
    REFUSED: "Refused when the cache is built",
    FAILED: "Neither works nor is refused",
    UNBUILT: "Not checked: no tiny model",
}


@dataclass(frozen=True)
class Row:
    """Says what became of one family.

    Attributes:
        image: whether the model answers images and text.
        name: the family's `model_type`.
        status: one of `_TITLES`.
        config: the name of its config class.
        note: what is compressed, why it is refused, or why it was not checked.
    """

    image: bool
    name: str
    status: str
    config: str
    note: str


def survey(image: bool, name: str) -> Row:
    """Build a family's tiny model and check it."""
    config = getattr(zoo.CONFIG_MAPPING[name], "__name__", "")
    try:
        tiny = zoo.tiny(name, image=image)
        note = ""
        if reason := _refusal(tiny.model.config):
            other = _without_windows(image, name) if _ONLY_WINDOWS in reason else None
            if other is None:
                return Row(image, name, REFUSED, config, reason)
            tiny, note = other, "without a window; with one in every layer there is nothing to compress"
    except zoo.NotBuiltError as error:
        return Row(image, name, UNBUILT, config, str(error))
    return _checked(image, name, config, tiny, note)


def _checked(image: bool, name: str, config: str, tiny: zoo.Tiny, note: str) -> Row:
    results = list(run_checks(tiny.model))
    unread = next((result for result in results if result.reason.startswith("fails with DynamicCache too")), None)
    if unread is not None and results[1].status != "passed":
        return Row(
            image, name, UNBUILT, config, unread.reason.replace("fails with DynamicCache too", "no inputs for it")
        )
    if failed := [result for result in results if result.status == "failed"]:
        return Row(image, name, FAILED, config, f"{failed[0].name}: {failed[0].reason}")
    status, compressed = _compressed(tiny.model.config)
    notes = [compressed, note, *_limits(results), *(_pictures(tiny) if image else ())]
    return Row(image, name, status, config, "; ".join(filter(None, notes)))


def _refusal(config: Any) -> str | None:
    try:
        cache_layers(decoder_config(config))
    except ValueError as error:
        return str(error).partition(": ")[2]
    return None


def _without_windows(image: bool, name: str) -> zoo.Tiny | None:
    """The same family without sliding windows, if it can be had so and is not refused then."""
    config = zoo.small_config(name).get_text_config(decoder=True)
    if image or getattr(config, "sliding_window", None) is None:
        return None
    try:
        tiny = zoo.tiny(name, sliding_window=None)
    except zoo.NotBuiltError:
        return None
    return None if _refusal(tiny.model.config) else tiny


def _compressed(config: Any) -> tuple[str, str]:
    """The status, and which layers are compressed."""
    layers, full = cache_layers(decoder_config(config))
    kinds = {type(layer).__name__ for index, layer in enumerate(layers) if index not in full}
    if not kinds:
        return WORKS, ""
    return PARTLY, "; ".join(_BESIDE[kind] for kind in sorted(kinds))


def _limits(results: Iterable[Result]) -> list[str]:
    """List the checks that do not apply to a family that works."""
    short = {
        "prompt lookup is exact at ratio 1": "no prompt lookup",
        "tokens taken back leave no trace": "no tokens taken back",
        "a padded row answers as the row alone": "a padded row differs from the row alone",
        "rotary positions are understood": "not for methods that need positions",
    }
    return [
        short.get(result.name, f"{result.name}: {result.reason}")
        for result in results
        if result.status == "not applicable"
    ]


def _pictures(tiny: zoo.Tiny) -> list[str]:
    """Say whether the model works with an image too."""
    if tiny.picture is None:
        return ["checked with text alone"]
    failed = [result for result in run_checks(tiny.model, tiny.inputs(160)) if result.status == "failed"]
    if not failed:
        return ["with images"]
    return ["images are refused when they are read" if "DynamicCache for this input" in failed[0].reason else "FAILS"]


def page(rows: list[Row]) -> str:
    """The page of the documentation."""
    text = [row for row in rows if not row.image]
    counts = {status: sum(row.status == status for row in text) for status in _TITLES}
    lines = [
        "# Model families",
        "",
        *textwrap.wrap(
            f"Transformers {tf.__version__} has {len(text)} families of causal language models, and "
            f"{len(rows) - len(text)} that answer images and text. A tiny random model of each was checked. At ratio 1 "
            "it must be bit-equal to `DynamicCache`: prompts, chunks, decoding, beams, prompt lookup. With a quarter "
            "of the tokens the budget, padding, saving, rollback and `enable()` are checked.",
            width=118,
        ),
        "",
        "| causal language models | families |",
        "| --- | ---: |",
        *(f"| {_TITLES[status]} | {count} |" for status, count in counts.items() if count),
        "",
        "`wildcat-kv check MODEL` makes the same checks with a model of yours. `python -m tests.survey` writes this",
        "page. Where nothing else is said, use `DynamicCache(config=model.config)` for a family that is refused. What",
        "a row says does not work, such as prompt lookup, does not work with `DynamicCache` either.",
    ]
    for image, title in ((False, "Causal language models"), (True, "Images and text")):
        lines += ["", f"## {title}"]
        for status, heading in _TITLES.items():
            chosen = [row for row in rows if row.image == image and row.status == status]
            if chosen:
                lines += ["", f"### {heading} {{ #{'images' if image else 'texts'}-{status.replace(' ', '-')} }}", ""]
                lines += ["| family | config | |", "| --- | --- | --- |", *map(_line, chosen)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    note = row.note.removesuffix(f"; {INSTEAD}").replace("|", "/")
    return f"| `{row.name}` | `{row.config}` | {note} |"


def _known() -> dict[tuple[bool, str], Row]:
    """The rows that an earlier run has left."""
    rows = [Row(**json.loads(line)) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    return {(row.image, row.name): row for row in rows}


def main() -> int:
    """Survey all families, write the page; 1 if one of them fails."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start, known = time.perf_counter(), _known() if "--resume" in sys.argv[1:] else {}
    RECORD.parent.mkdir(exist_ok=True)
    names = [*((False, name) for name in zoo.text_families()), *((True, name) for name in zoo.image_families())]
    with RECORD.open("a" if known else "w") as record:
        for image, name in names:
            if (image, name) in known:
                continue
            try:
                row = survey(image, name)
            except Exception as error:  # one family must not stop the others
                row = Row(image, name, FAILED, "", f"{type(error).__name__}: {error}")
            known[image, name] = row
            record.write(json.dumps(asdict(row)) + "\n")
            record.flush()
    rows = [known[key] for key in names]
    PAGE.write_text(page(rows), encoding="utf-8")
    failed = [row for row in rows if row.status == FAILED or row.note.endswith("FAILS")]
    for row in failed:
        print(f"{row.name}: {row.note}", file=sys.stderr)
    print(f"{len(rows)} families, {len(failed)} of them fail, in {time.perf_counter() - start:.0f} s; see {PAGE}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
