"""One case after the other until time runs out; all that was measured is on disk at every moment."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.lab import Lab
from benchmarks.gpu.plan import Case
from benchmarks.records import now
from eval.machine import commit, machine
from wildcat_kv.files import replacing

FILE = "gpu.json"
# Kept for the report, so that a run within N minutes ends within them.
_RESERVE = 6.0
_PACKAGES = ("torch", "transformers", "triton", "numpy")


class Journal:
    """The record of a run, written to a folder with every row.

    Args:
        folder: folder of the results.
        about: what was run, and on what.
    """

    def __init__(self, folder: Path, **about: Any) -> None:
        self._path = folder / FILE
        self._start = time.perf_counter()
        self.record: dict[str, Any] = {"benchmark": "gpu", **about, "finished": None, "cases": [], "rows": []}

    def row(self, case: Case, row: dict[str, Any]) -> None:
        """Add a row of a case."""
        found = {"part": case.part, **case.labels, **row, "at": round(time.perf_counter() - self._start, 1)}
        self.record["rows"].append(found)
        self.write()
        print(json.dumps(found)[:300], flush=True)

    def case(self, case: Case, state: str, seconds: float) -> None:
        """Note what became of a case: done, failed, or skipped."""
        self.record["cases"].append({"part": case.part, **case.labels, "state": state, "seconds": round(seconds, 2)})
        self.write()

    def finish(self) -> None:
        """Note that the run is over."""
        self.record["finished"] = now()
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with replacing(self._path) as new:
            new.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def measure(cases: Sequence[Case], lab: Lab, journal: Journal) -> None:
    """Run the cases in order; one without time is skipped, one that fails leaves its rows and its error."""
    for case in cases:
        if lab.left < case.seconds * _share(lab):
            journal.case(case, "skipped: time", 0.0)
            continue
        start = time.perf_counter()
        state = "done"
        try:
            for row in case.run(lab):
                journal.row(case, row)
        except Exception as error:  # whatever one case dies of, the others are worth having
            state = "failed"
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            journal.row(case, {"error": told, "where": traceback.format_exc()[-800:]})
        journal.case(case, state, time.perf_counter() - start)
        lab.sweep()


def deadline(minutes: float) -> float:
    """Reckon when the last case may begin, so that the report is written within the minutes."""
    return time.perf_counter() + max(1.0, 60 * minutes - _RESERVE)


def about(command: str, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Say what was run, and on what."""
    return {
        "command": command,
        "commit": commit(),
        "started": now(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": machine(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "options": options,
    }


def _share(lab: Lab) -> float:
    """Ask less time of tiny shapes, which are for rehearsals."""
    return 1.0 if lab.device.type == "cuda" else 0.2


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
