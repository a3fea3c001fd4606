"""Both sides on the same texts: ours here, theirs in a process of their environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from eval.kvpress.budgets import NAMES, jobs
from eval.kvpress.ours import measure
from eval.kvpress.table import summary, whole
from eval.kvpress.texts import Text, make_texts
from eval.machine import commit, machine, versions
from eval.progress import progress
from eval.records import Folder
from eval.report import SUMMARY
from wildcat_kv.files import replacing
from wildcat_kv.models import default_model_path, load_model
from wildcat_kv.models.shipped import SMOLLM2, shipped

_HERE = Path(__file__).parents[2]
_TELL = """
import json, platform
from importlib.metadata import version
names = ("kvpress", "transformers", "torch", "optimum-quanto")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


@dataclass(frozen=True)
class Plan:
    """Plan of a comparison, and where the other side is.

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
    done = whole(folder.records())
    left = [text for text in texts if (text.task, text.sample) not in done]
    with progress(len(texts) * len(NAMES), show=True) as shown, Reference(plan) as reference:
        shown.skip((len(texts) - len(left)) * len(NAMES))
        for text in left:
            held = {}
            for found in measure(model, tokenizer, text):
                folder.append(record_of(text, found, "wildcat_kv"))
                held[found["cell"]] = found["memory_bytes"]
                shown.advance(text.task, f"wildcat_kv, {found['cell']}")
            for found in reference.measure(text, jobs(held)):
                folder.append(record_of(text, found, "kvpress"))
                shown.advance(text.task, f"kvpress, {found['cell']}")
    folder.merge((text.task, text.sample, name, None, None) for text in texts for name in NAMES)
    finished = folder.finish(_now())
    with replacing(output / SUMMARY) as new:
        new.write_text(summary(finished, folder.records()), encoding="utf-8")


def record_of(text: Text, found: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Make the record of one cell on one text, as the evaluation's records are."""
    answers = found["answers"]
    return {
        "task": text.task,
        "sample": text.sample,
        "method": found["cell"],
        "side": side,
        "ratio": None,
        "max_tokens": None,
        "dropped": found.get("dropped"),
        "protocol": "context-only",
        "prompt_hash": text.prompt_hash,
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


class Reference:
    """kvpress in a process of its environment, which gets a text a line and answers with a line a cell.

    Args:
        plan: plan of the comparison.
    """

    def __init__(self, plan: Plan) -> None:
        setting = {"model": str(model_folder(plan.model)), "dtype": plan.dtype, "threads": plan.threads}
        self._command = [str(plan.reference), "-m", "eval.kvpress.theirs", json.dumps(setting)]
        self._threads = plan.threads

    def __enter__(self) -> Self:
        there = {"OMP_NUM_THREADS": str(self._threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_HERE)}
        self._child = subprocess.Popen(
            self._command,
            cwd=_HERE,
            env=os.environ | there,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def measure(self, text: Text, cells: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Measure cells on a text.

        Raises:
            RuntimeError: the process has ended; its own error is on standard error.
        """
        asked, answered = self._child.stdin, self._child.stdout
        assert asked is not None and answered is not None
        try:
            asked.write(json.dumps({"text": asdict(text), "cells": cells}) + "\n")
            asked.flush()
        except BrokenPipeError:
            raise self._ended() from None
        for _ in cells:
            if not (line := answered.readline()):
                raise self._ended()
            yield json.loads(line)

    def _ended(self) -> RuntimeError:
        return RuntimeError(
            f"reference={self._command[0]!r} ended with status {self._child.wait()}; its error is above"
        )


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
    found: dict[str, str] = json.loads(told.stdout)
    return found


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
