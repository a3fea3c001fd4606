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
from pathlib import Path
from typing import Any

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

# Largest difference of two outputs, in parts of their root mean square. Sums in another order differ by 1e-5 at most;
# one key kept instead of another changes a logit by more than a hundredth.
TOLERANCE = 1e-3

Outputs = dict[str, dict[str, Output]]  # by run and cell


def probe_all(paths: Iterable[Path], show: Callable[[str], None]) -> bool:
    """Probe runs, those of one model and commit together, and note in `run.json` that all cells agree.

    Args:
        paths: folders of the runs.
        show: function that prints a text.

    Returns:
        True if every run agrees.
    """
    models: dict[tuple[bool, str | None], dict[str, dict[str, Any]]] = defaultdict(dict)
    agree = []
    for path in paths:
        try:
            manifest = Folder(path).manifest
        except ValueError as error:
            show(f"{path}: not verified: {error}")
            agree.append(False)
        else:
            models["tasks" in manifest, manifest["config"].get("model")][str(path)] = manifest
    for (attention, source), manifests in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                model = None if attention else _saved(source, Path(scratch) / "model")
                today = outputs(ROOT, model, manifests)
            except (ValueError, OSError, ModelError) as error:
                agree += [_refuse(run, error, show) for run in manifests]
                continue
            for commit in dict.fromkeys(manifest["commit"] for manifest in manifests.values()):
                own = {run: manifest for run, manifest in manifests.items() if manifest["commit"] == commit}
                try:
                    with checkout(commit) as tree:
                        then = outputs(tree, model, own)
                except (ValueError, OSError) as error:
                    agree += [_refuse(run, error, show) for run in own]
                    continue
                agree += [judge(Path(run), then[run], today[run], show) for run in own]
    return all(agree)


def outputs(tree: Path, model: Path | None, manifests: Mapping[str, Mapping[str, Any]]) -> Outputs:
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
            raise ValueError(f"the code of {tree} does not run: {(done.stderr.split(chr(10)) or [''])[-2:]}")
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


def judge(path: Path, then: Mapping[str, Output], today: Mapping[str, Output], show: Callable[[str], None]) -> bool:
    """Compare a run's outputs; if all agree, note it with today's fingerprints, else print the cells that do not."""
    folder = Folder(path)
    manifest = folder.manifest
    problems, largest = [], 0.0
    for cell in {**today, **then}:
        sides = {"then": then.get(cell, "not there"), "today": today.get(cell, "not there")}
        failed = [f"{when}: {output}" for when, output in sides.items() if isinstance(output, str)]
        if failed:
            problems.append(f"{cell} cannot be computed ({'; '.join(failed)})")
            continue
        size = distance(then[cell], today[cell])  # type: ignore[arg-type]
        largest = max(largest, size)
        if size > TOLERANCE:
            problems.append(f"{cell} differs by {size:.2g}")
    if problems or not today:
        show(f"{path}: since {manifest['commit']}, {'; '.join(problems) or 'no cells'}; nothing is noted")
        return False
    verified = {
        "by": "probe",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": todays_commit(),
        "record_commit": manifest["commit"],
        "cells": len(today),
        "largest_difference": float(f"{largest:.2g}"),
    }
    folder.note(code=_code(manifest), verified=verified)
    show(f"{path}: {len(today)} cells agree with {manifest['commit']}, largest difference {largest:.1g}")
    return True


def distance(then: torch.Tensor, today: torch.Tensor) -> float:
    """Compute the largest difference of two outputs, in parts of their root mean square; infinite if none can be."""
    if then.shape != today.shape:
        return float("inf")
    size = float((then - today).abs().max() / then.square().mean().sqrt())
    return size if size == size else float("inf")


def _refuse(run: str, error: Exception, show: Callable[[str], None]) -> bool:
    show(f"{run}: not verified: {' '.join(str(error).split())}")
    return False


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
