"""The record of a benchmark: one JSON file with every sample, the machine and the versions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from wildcat_kv.files import replacing

Label = str | int | float


class Record(BaseModel):
    """One quantity of one thing.

    Attributes:
        quantity: name of the measure, such as "fold_seconds".
        unit: unit of the samples.
        labels: dtype, tokens, method and so on.
        samples: values, one a turn. Records that differ in nothing but the contender share their turns.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    quantity: str
    unit: str
    labels: dict[str, Label]
    samples: tuple[float, ...]


class Run(BaseModel):
    """One benchmark as it was run.

    Attributes:
        benchmark: its name.
        command: command line.
        commit: commit of the checkout, with a + if files differ from it; None outside a checkout.
        started: time, UTC.
        finished: time, UTC; None while it runs, or where it failed.
        model: name of the model.
        device: device that it ran on.
        threads: threads of torch.
        machine: processor, cores, memory, accelerators.
        versions: versions of Python and packages.
        options: all options, the defaults too.
        notes: remarks for the reader, such as a package that was not installed.
        records: measurements.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    benchmark: str
    command: str
    commit: str | None
    started: str
    finished: str | None = None
    model: str
    device: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    notes: list[str] = []
    records: list[Record] = []

    def write(self, folder: Path) -> None:
        """Write BENCHMARK.json, whole or not at all; one that is there is replaced."""
        path = folder / f"{self.benchmark}.json"
        with replacing(path) as new:
            new.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_runs(folder: Path, names: Sequence[str]) -> list[Run]:
    """Read the benchmarks of a folder, in the order of `names`.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    paths = [path for name in names if (path := folder / f"{name}.json").is_file()]
    if not paths:
        raise ValueError(f"output={str(folder)!r} holds no benchmark; run one into it first")
    return [_read(path) for path in paths]


def select(records: Sequence[Record], quantity: str, **labels: Label) -> list[Record]:
    """Pick the records of a quantity that have all of these labels."""
    return [record for record in records if record.quantity == quantity and labels.items() <= record.labels.items()]


def now() -> str:
    """Tell the time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read(path: Path) -> Run:
    try:
        return Run.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} is damaged: {reason}; run the benchmark again") from None
