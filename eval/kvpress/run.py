"""Both sides on the same texts: ours here, theirs in a process of their environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eval.kvpress.budgets import NAMES, OURS, THEIRS, Ours, Theirs, jobs, shares
from eval.kvpress.ours import measure as measure_ours
from eval.kvpress.table import summary
from eval.kvpress.texts import Text, make_texts, write_texts
from eval.machine import commit, machine, versions
from eval.progress import progress
from eval.records import Folder
from eval.report import SUMMARY
from wildcat_kv.files import replacing
from wildcat_kv.models import default_model_path, load_model
from wildcat_kv.models.shipped import SMOLLM2, shipped

_HERE = Path(__file__).parents[2]
_TELL = "import json, platform, importlib.metadata as m; print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in ('kvpress', 'transformers', 'torch', 'optimum-quanto')}}))"  # noqa: E501
Place = tuple[str, int]


@dataclass(frozen=True)
class Plan:
    """The texts of a comparison, and where the other side is.

    Attributes:
        reference: python of the environment with kvpress.
        model: name of a model, or a folder; None for the default one.
        length: tokens of a text.
        needles: number of essays with four numbers each.
        lookups: number of texts with three questions each.
        threads: threads of torch, on both sides.
        dtype: dtype of the weights.
    """

    reference: Path
    model: str | None = None
    length: int = 1500
    needles: int = 10
    lookups: int = 6
    threads: int = 1
    dtype: str = "bfloat16"


def run(plan: Plan, output: Path, *, command: str, resume: bool) -> None:
    """Measure both sides, and write records and tables into a folder.

    Raises:
        ValueError: the other environment lacks something, or the folder holds another run.
        RuntimeError: the other side failed.
    """
    theirs = _versions_of(plan.reference)
    folder = Folder(output)
    folder.check(resume=resume)
    torch.set_num_threads(plan.threads)
    model, tokenizer = load_model(plan.model, getattr(torch, plan.dtype))
    texts = make_texts(tokenizer, plan.length, plan.needles, plan.lookups)
    manifest = _manifest(plan, command, model, theirs)
    folder.compare(manifest)
    folder.begin(manifest)
    hashes = {(text.task, text.sample): text.prompt_hash for text in texts}
    with progress(len(texts) * len(NAMES), show=True) as shown:

        def missing(cells: Sequence[Ours | Theirs]) -> list[Text]:
            done = whole(folder.records(), [cell.name for cell in cells])
            left = [text for text in texts if (text.task, text.sample) not in done]
            shown.skip((len(texts) - len(left)) * len(cells))
            return left

        def write(side: str, source: Iterable[dict[str, Any]]) -> None:
            for found in source:
                folder.append(record_of(found, side, hashes[found["task"], found["sample"]]))
                shown.advance(found["task"], f"{side}, {found['cell']}")

        write("wildcat_kv", _ours(model, tokenizer, missing(OURS)))
        write("kvpress", _theirs(plan, missing(THEIRS), jobs(shares(folder.records()))))
    folder.merge((text.task, text.sample, name, None, None) for text in texts for name in NAMES)
    finished = folder.finish(_now())
    with replacing(output / SUMMARY) as new:
        new.write_text(summary(finished, folder.records()), encoding="utf-8")


def record_of(found: Mapping[str, Any], side: str, prompt_hash: str) -> dict[str, Any]:
    """Make the record of one cell on one text, as the evaluation's records are."""
    answers = found["answers"]
    return {
        "task": found["task"],
        "sample": found["sample"],
        "method": found["cell"],
        "side": side,
        "ratio": None,
        "max_tokens": None,
        "dropped": found.get("dropped"),
        "protocol": "context-only",
        "prompt_hash": prompt_hash,
        "scores": {
            "nll": sum(each["nll"] for each in answers) / len(answers),
            "exact_match": sum(each["found"] for each in answers) / len(answers),
        },
        "answers": answers,
        "stored_tokens": round(found["stored_tokens"], 4),
        "memory_bytes": found["memory_bytes"],
        "held_bytes": found["held_bytes"],
        "seconds": {"compress": round(found["seconds"], 4)},
    }


def whole(records: Iterable[Mapping[str, Any]], cells: Sequence[str]) -> set[Place]:
    """List the texts on which all of these cells were measured."""
    found: dict[Place, set[str]] = {}
    for record in records:
        found.setdefault((record["task"], record["sample"]), set()).add(record["method"])
    return {place for place, names in found.items() if names >= set(cells)}


def _ours(model: Any, tokenizer: Any, texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
    for text in texts:
        yield from measure_ours(model, tokenizer, text)


def _theirs(plan: Plan, texts: Sequence[Text], cells: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the other side measures, as it comes."""
    if not texts:
        return
    with tempfile.TemporaryDirectory() as temporary:
        job, lines = Path(temporary) / "job.json", Path(temporary) / "texts.jsonl"
        write_texts(lines, texts)
        description = {
            "model": str(model_folder(plan.model)),
            "dtype": plan.dtype,
            "threads": plan.threads,
            "texts": str(lines),
            "cells": cells,
        }
        job.write_text(json.dumps(description), encoding="utf-8")
        yield from _lines_of([plan.reference, "-m", "eval.kvpress.theirs", job], plan.threads)


def _lines_of(command: Sequence[Any], threads: int) -> Iterator[dict[str, Any]]:
    """Run a command in the checkout, and read a JSON line at a time from it.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_HERE)}
    with subprocess.Popen(command, cwd=_HERE, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"reference={str(command[0])!r} failed with status {child.returncode}; its error is above")


def model_folder(model: str | None) -> Path:
    """Return the folder of a model that is loaded by name, or the folder itself.

    Raises:
        ValueError: neither.
    """
    if model is None:
        return default_model_path()
    if (found := shipped(model)) is not None:
        return found.path()
    if not Path(model).is_dir():
        raise ValueError(f"model={model!r} is no folder; both sides read the same files, so give the folder of a model")
    return Path(model)


def _versions_of(reference: Path) -> dict[str, str]:
    """Ask the other environment for its versions.

    Raises:
        ValueError: it is none, or lacks a package.
    """
    try:
        told = subprocess.run([reference, "-c", _TELL], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise ValueError(
            f"reference={str(reference)!r} is no python with kvpress and optimum-quanto ({reason}); "
            "`make compare-kvpress` builds one"
        ) from None
    versions: dict[str, str] = json.loads(told.stdout)
    return versions


def _manifest(plan: Plan, command: str, model: Any, theirs: Mapping[str, str]) -> dict[str, Any]:
    name = plan.model or SMOLLM2.name
    return {
        "name": f"kvpress, {name}",
        "command": command,
        "started": _now(),
        "finished": None,
        "protocol": "context-only",
        "model": {"name": name, "parameters": model.num_parameters(), "dtype": plan.dtype},
        "methods": NAMES,
        "versions": versions(),
        "reference_versions": dict(theirs),
        "commit": commit(),
        "machine": {**machine(), "processes": 1},
        "config": {**asdict(plan), "reference": None},
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
