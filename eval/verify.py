"""Make a few samples of a finished run anew with today's code, and compare every number with the record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from eval.attention import config as attention_config
from eval.attention import run as attention_run
from eval.attention.tasks import Wanted
from eval.cells import code_of
from eval.config import RunConfig
from eval.machine import commit, machine
from eval.markdown import markdown_table
from eval.progress import progress
from eval.records import Folder, key_of
from eval.run import device_of, key_for, plan_samples, record_of
from wildcat_kv.models import ModelError, load_model

T = TypeVar("T")
Record = dict[str, Any]
Pairs = Iterator[tuple[Record, Record]]

# A smaller number counts as this much: a divergence of 0.001 need not agree to its third digit.
FLOOR = 0.1
# The part of a number by which processors may differ, by the dtype of the run.
TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}


class Difference(NamedTuple):
    """A number that was made anew.

    Attributes:
        method: name of the method in tables.
        place: task, sample and budget.
        score: name of the number.
        recorded: number in the record.
        found: number of today's code.
    """

    method: str
    place: str
    score: str
    recorded: float
    found: float

    @property
    def size(self) -> float:
        """Part of the number in the record by which the two differ."""
        return abs(self.found - self.recorded) / max(abs(self.recorded), FLOOR)


class Verification(NamedTuple):
    """The comparison of a run with today's code.

    Attributes:
        samples: samples that were made anew.
        differences: every number that was made anew, the largest difference first.
        tolerance: largest difference that passes.
    """

    samples: int
    differences: list[Difference]
    tolerance: float

    @property
    def agrees(self) -> bool:
        """True if no number differs by more than the tolerance."""
        return self.differences[0].size <= self.tolerance

    def table(self, title: str) -> str:
        """Write a line for each method: its numbers, those that differ, and the largest difference."""
        rows = []
        for method in dict.fromkeys(one.method for one in self.differences):
            own = [one for one in self.differences if one.method == method]
            differ, worst = sum(one.size > self.tolerance for one in own), own[0]
            where = f"{worst.place}, {worst.score}: {worst.recorded:.6g} was recorded, {worst.found:.6g} found"
            rows.append([method, str(len(own)), str(differ), f"{worst.size:.1e}", where])
        says = "all agree" if self.agrees else "they do not agree, so nothing is noted"
        notes = f"{self.samples} samples, differences over {self.tolerance:g} count: {says}."
        header = ["method", "numbers", "differ", "largest", "where"]
        return markdown_table(title, notes, header, rows, right=[False, True, True, True, False])


def verify_all(paths: Iterable[Path], samples: int, show: Callable[[str], None]) -> bool:
    """Verify runs one after the other; one that cannot be verified does not stop the others.

    Args:
        paths: folders of the runs.
        samples: most samples of each task.
        show: function that prints a text.

    Returns:
        True if every run was verified and agrees.
    """
    agree = []
    for path in paths:
        try:
            verification = verify(path, samples)
        except (ValueError, OSError, ImportError, ModelError) as error:
            show(f"{path}: not verified: {' '.join(str(error).split())}\n")
            agree.append(False)
        else:
            show(verification.table(str(path)))
            agree.append(verification.agrees)
    return all(agree)


def verify(path: Path, samples: int) -> Verification:
    """Make samples of a run anew. If all numbers agree, note that in `run.json`, with today's fingerprints.

    Shares, such as that of answers found, are left out: greedy decoding makes them from the likelihoods, which are
    compared, and one tie changes them.

    Args:
        path: folder of the run.
        samples: most samples of each task, the first and the last among them.

    Raises:
        ValueError: there is no run, it cannot be made any more, or there is no sample to compare with.
        ModelError: the model cannot be loaded.
    """
    folder = Folder(path)
    manifest = folder.manifest
    again = _attention_again if "tasks" in manifest else _again
    code, dtype, pairs = again(manifest["config"], folder.records(), samples)
    made = list(pairs)
    differences = [one for recorded, found in made for one in _compare(recorded, found, manifest.get("metrics", {}))]
    if not differences:
        raise ValueError("no sample of the run is complete")
    differences.sort(key=lambda one: -one.size)
    count = len({_sample(found) for _, found in made})
    verification = Verification(count, differences, TOLERANCE[dtype])
    if verification.agrees:
        folder.note(code=code, verified=_note(verification, manifest))
    return verification


def _note(verification: Verification, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "processor": machine()["processor"],
        "record_processor": manifest["machine"]["processor"],
        "samples": verification.samples,
        "numbers": len(verification.differences),
        "largest_difference": float(f"{verification.differences[0].size:.2g}"),
    }


def _again(fields: dict[str, Any], records: list[Record], samples: int) -> tuple[dict[str, str], str, Pairs]:
    """Prepare a run of compressors: fingerprints, dtype, and each record with what it is today."""
    config = RunConfig(**fields)
    cells, tasks = config.cells(), config.make_tasks()
    known = {key_of(record): record for record in records}
    model, tokenizer = load_model(config.model, getattr(torch, config.dtype), device_of(config), config.device_map)
    planned = plan_samples(config, tasks, model, tokenizer, show=False)
    whole = [pair for pair in planned if all(key_for(*pair, cell) in known for cell in cells)]
    chosen = _spread(whole, samples, lambda pair: pair[0].name)
    changed = next(
        (pair for pair in chosen if known[key_for(*pair, cells[0])]["prompt_hash"] != pair[1].prompt_hash), None
    )
    if changed is not None:
        raise ValueError(f"task={changed[0].name!r}, sample {changed[1].index}: the record has another prompt")

    def measure() -> Pairs:
        with progress(len(chosen) * len(cells), show=True) as shown, torch.no_grad():
            for task, sample in chosen:
                measured = sample.open(model, tokenizer)
                for cell in cells:
                    yield known[key_for(task, sample, cell)], record_of(config, task, sample, cell, measured(cell))
                    shown.advance(task.name, str(cell))
                del measured  # two contexts at once may be more than a device holds

    return code_of(cells), config.dtype, measure()


def _attention_again(fields: dict[str, Any], records: list[Record], samples: int) -> tuple[dict[str, str], str, Pairs]:
    """Prepare a run of attention methods, with the first seed of each."""
    config = attention_config.RunConfig(**fields)
    known = {attention_run.key_of(record): record for record in records}
    wanted = [Wanted(one.name, config.seeds[0], attention_run.builder(one, config.seeds[0])) for one in config.methods]
    planned = [(task, case) for task in config.tasks for case in task.cases()]
    chosen = _spread(planned, samples, lambda pair: pair[0].task)

    def measure() -> Pairs:
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads)
        try:
            with progress(len(chosen) * len(wanted), show=True) as shown:
                for task, case in chosen:
                    for measured in task.measure(case, wanted):
                        found = attention_run.record_of(task, case, measured)
                        yield known[attention_run.key_of(found)], found
                        shown.advance(f"{task.task}: {case.group}", measured.method)
        finally:
            torch.set_num_threads(threads)

    return attention_run.code_of(config), "float32", measure()


def _spread(items: Sequence[T], count: int, group: Callable[[T], str]) -> list[T]:
    """Choose at most `count` items of each group, evenly spread, the first and the last among them."""
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[group(item)].append(item)
    steps = range(count)
    return [
        members[place]
        for members in groups.values()
        for place in sorted({step * (len(members) - 1) // max(1, count - 1) for step in steps})
    ]


def _compare(recorded: Record, found: Record, metrics: Mapping[str, Any]) -> Iterator[Difference]:
    """List the numbers of a measurement; what the record lacks is left out."""
    sizes = ("stored_tokens", "memory_bytes")
    before = {**recorded["scores"], **{name: recorded.get(name) for name in sizes}}
    now = {**found["scores"], **{name: found.get(name) for name in sizes}}
    budget = [f"{name}={found[name]}" for name in ("ratio", "max_tokens") if found.get(name) is not None]
    place = " ".join([*map(str, _sample(found)), *budget])
    units = {name: metric["unit"] for name, metric in metrics.get(found["task"], {}).items()}
    for name, number in now.items():
        if number is not None and before.get(name) is not None and not units.get(name, "").startswith("share"):
            yield Difference(found["method"], place, name, before[name], number)


def _sample(record: Record) -> tuple[str | int, ...]:
    """Name the sample of a record: task and number, or task, group and input."""
    return tuple(record[name] for name in ("task", "group", "input", "sample") if name in record)
