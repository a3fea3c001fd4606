"""Show that the code of a run's commit and today's compute the same, by running both on this machine.

Unlike `eval.verify` it reads no record: a run that another processor made, or that would take hours, can be shown so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.attention.config import RunConfig as AttentionConfig
from eval.attention.run import code_of as code_of_attention
from eval.cells import code_of, make_cells
from eval.machine import commit as todays_commit
from eval.probe_script import Output
from eval.records import Folder
from wildcat_kv.models import ModelError, load_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("probe_script.py")

# Largest difference of two outputs, in parts of their root mean square. Probes of this project's runs found 1e-5 at most
# where sums had been put in another order, and a tenth or more where a method had changed.
TOLERANCE = 1e-3

Manifests = dict[str, dict[str, Any]]  # by folder
Outputs = dict[str, dict[str, Output]]  # by folder and cell


class Verdict(NamedTuple):
    """The result for one run.

    Attributes:
        agrees: True if all its cells agree, and the note is written.
        text: a line to print.
    """

    agrees: bool
    text: str


def probe_all(paths: Iterable[Path], show: Callable[[str], None]) -> bool:
    """Probe runs, those of one model and commit together; one that cannot be probed does not stop the others.

    Args:
        paths: folders of the runs.
        show: function that prints a text.

    Returns:
        True if every run agrees.
    """
    groups: dict[tuple[bool, str | None], Manifests] = defaultdict(dict)
    verdicts: list[Verdict] = []
    for path in paths:
        try:
            manifest = Folder(path).manifest
            groups["tasks" in manifest, manifest["config"].get("model")][str(path)] = manifest
        except ValueError as error:
            verdicts += _refused([str(path)], error)
    agree = []
    for verdict in chain(verdicts, *(_probe(*key, manifests) for key, manifests in groups.items())):
        show(verdict.text)
        agree.append(verdict.agrees)
    return all(agree)


def _probe(of_attention: bool, source: str | None, manifests: Manifests) -> Iterator[Verdict]:
    """Probe runs of one model: today's code once, then that of every commit."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = None if of_attention else _saved(source, Path(scratch))
            today = outputs(ROOT, model, manifests)
        except (ValueError, OSError, ImportError, ModelError) as error:
            yield from _refused(manifests, error)
            return
        for commit in dict.fromkeys(manifest["commit"] for manifest in manifests.values()):
            own = {run: manifest for run, manifest in manifests.items() if manifest["commit"] == commit}
            try:
                with checkout(commit) as tree:
                    then = outputs(tree, model, own)
            except (ValueError, OSError) as error:
                yield from _refused(own, error)
            else:
                yield from (judge(Path(run), then[run], today[run]) for run in own)


def outputs(tree: Path, model: Path | None, manifests: Manifests) -> Outputs:
    """Compute the outputs of runs by the code of a checkout.

    Args:
        tree: folder of the checkout.
        model: folder of the runs' model; None for runs of attention methods.
        manifests: descriptions of the runs, by their folders.

    Raises:
        ValueError: the code does not run; its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, target = Path(scratch) / "job.json", Path(scratch) / "outputs.pt"
        runs = {run: manifest["config"] for run, manifest in manifests.items()}
        job.write_text(json.dumps({"model": None if model is None else str(model), "runs": runs}), encoding="utf-8")
        # Not by the script's path: its folder would be searched first, which is today's.
        command = [sys.executable, "-c", SCRIPT.read_text(encoding="utf-8"), str(job), str(target)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise ValueError(f"the code of {tree} does not run: {last}")
        found: Outputs = torch.load(target)
        return found


@contextmanager
def checkout(commit: str | None) -> Iterator[Path]:
    """Check a commit out into a folder, which is removed afterwards.

    Raises:
        ValueError: the run names no commit, or git does not know it.
    """
    if not commit:
        raise ValueError("its record names no commit")
    name = commit.rstrip("+")
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        added = _git("worktree", "add", "--quiet", "--detach", str(tree), name)
        if added.returncode:
            raise ValueError(f"commit={commit!r}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def judge(path: Path, then: Mapping[str, Output], today: Mapping[str, Output]) -> Verdict:
    """Compare a run's outputs. If all cells agree, note that in `run.json`, with today's fingerprints."""
    folder = Folder(path)
    manifest = folder.manifest
    sizes, wrong = [], []
    for cell, now in today.items():
        before = then.get(cell, "not there")
        if isinstance(before, str) or isinstance(now, str):
            wrong.append(f"{cell} cannot be computed ({before if isinstance(before, str) else now})")
            continue
        sizes.append(distance(before, now))
        if sizes[-1] > TOLERANCE:
            wrong.append(f"{cell} differs by {sizes[-1]:.2g}")
    if wrong:
        count = f"{len(wrong)} of {len(today)} cells"
        return Verdict(False, f"{path}: not verified: {count} since {manifest['commit']}: {'; '.join(wrong)}")
    largest = max(sizes)
    verified = {
        "by": "probe",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": todays_commit(),
        "record_commit": manifest["commit"],
        "cells": len(today),
        "largest_difference": float(f"{largest:.2g}"),
    }
    folder.note(code=_code(manifest), verified=verified)
    text = f"{path}: {len(today)} cells agree with {manifest['commit']}, largest difference {largest:.1g}"
    return Verdict(True, text)


def distance(then: torch.Tensor, today: torch.Tensor) -> float:
    """Compute the largest difference of two outputs, in parts of their root mean square; infinite if none can be."""
    if then.shape != today.shape:
        return float("inf")
    size = float((then - today).abs().max() / then.square().mean().sqrt())
    return size if size == size else float("inf")


def _refused(runs: Iterable[str], error: Exception) -> list[Verdict]:
    return [Verdict(False, f"{run}: not verified: {' '.join(str(error).split())}") for run in runs]


def _saved(source: str | None, folder: Path) -> Path:
    """Save a model in float32, so that both sides load the same by Transformers alone."""
    model, tokenizer = load_model(source, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _code(manifest: Mapping[str, Any]) -> dict[str, str]:
    """List today's fingerprints of a run's methods."""
    config = manifest["config"]
    if "tasks" in manifest:
        return code_of_attention(AttentionConfig(**config))
    settings = {"seed": config["seed"], **config["settings"]}
    return code_of(make_cells(config["methods"], config["ratios"], config["max_tokens"], settings))


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
