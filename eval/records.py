"""The folder of a run: its description (`run.json`) and one JSON line a measurement (`samples.jsonl`, or `.gz`)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wildcat_kv.files import replacing

MANIFEST = "run.json"
SAMPLES = "samples.jsonl"
PACKED = f"{SAMPLES}.gz"
# What may differ between the run that began and the one that resumes it.
_FREE = ("command", "started", "finished", "machine", "commit", "code", "verified")

Key = tuple[str, int, str, float | None, int | None]


class Folder:
    """A run's folder, in which several processes write shards that become one file at the end.

    Args:
        path: the folder.
        rank: number of this process.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self._rank = path, rank

    @property
    def manifest(self) -> dict[str, Any]:
        """The description of the run.

        Raises:
            ValueError: there is no run in the folder, or its description is damaged.
        """
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"output={str(self.path)!r} holds no run: {error}") from None

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that holds something else, or a run although `resume` is off.

        Raises:
            ValueError: see above, or the folder cannot be.
        """
        if (self.path / MANIFEST).exists():
            if not resume:
                raise ValueError(
                    f"output={str(self.path)!r} holds a run already; go on with it (--resume) or choose another folder"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"output={str(self.path)!r} is there and holds no run; choose another folder")
        above = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise ValueError(f"output={str(self.path)!r}: {above} is no folder; choose another")

    def compare(self, manifest: dict[str, Any]) -> None:
        """Refuse to go on with another run than this.

        Raises:
            ValueError: names what differs.
        """
        changed = _difference(self.manifest, manifest) if (self.path / MANIFEST).exists() else ""
        if changed:
            raise ValueError(f"output={str(self.path)!r} holds another run: {changed}; choose another folder")

    def begin(self, manifest: dict[str, Any]) -> None:
        """Start a new run, or go on with one whose last line may have been cut short.

        Packed samples are unpacked first, so that lines can be appended to them.
        """
        earlier = self.manifest if (self.path / MANIFEST).exists() else manifest
        self.path.mkdir(parents=True, exist_ok=True)
        for left_over in self.path.glob(".*.partial"):
            left_over.unlink()
        self._write({**earlier, "finished": None})
        self._unpack()
        for path in self._files():
            text = path.read_bytes()
            end = text.rfind(b"\n") + 1
            if end < len(text):  # the next one is to begin a line
                with path.open("r+b") as file:
                    file.truncate(end)

    def finish(self, when: str) -> dict[str, Any]:
        """Write down that all is measured; returns the manifest."""
        return self.note(finished=when)

    def note(self, **fields: Any) -> dict[str, Any]:
        """Write fields into the run's description; returns the manifest."""
        manifest = {**self.manifest, **fields}
        self._write(manifest)
        return manifest

    def records(self) -> list[dict[str, Any]]:
        """Read the measurements of every process; lines cut short by an interruption are left out."""
        return [record for path in self._files() for record in _whole_lines(path)]

    def append(self, record: dict[str, Any]) -> None:
        """Write a measurement of this process at once."""
        with self._shard().open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def merge(self, order: Iterable[Key]) -> None:
        """Make one file of all processes' in this order, unless it is that already."""
        shards, records, keys = self._files(), self.records(), list(order)
        by_key = {key_of(record): record for record in records}
        wanted = [by_key[key] for key in keys if key in by_key]
        if shards == [self.path / SAMPLES] and records == wanted:
            return
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in wanted]
        with replacing(self.path / SAMPLES) as whole:
            whole.write_text("".join(lines), encoding="utf-8")
        for shard in shards:
            if shard.name != SAMPLES:
                shard.unlink()

    def pack(self) -> None:
        """Compress the samples of a finished run; the same bytes for the same samples.

        Raises:
            ValueError: there is no run, or it has not finished.
        """
        if not self.manifest.get("finished"):
            raise ValueError(f"output={str(self.path)!r} holds a run that has not finished; finish it with --resume")
        plain = self.path / SAMPLES
        if plain.is_file():
            with replacing(self.path / PACKED) as packed:
                packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=9, mtime=0))
            plain.unlink()

    def _unpack(self) -> None:
        plain, packed = self.path / SAMPLES, self.path / PACKED
        if not packed.is_file():
            return
        if not plain.is_file():  # else an unpacking was interrupted after its last step but one
            text = _read(packed)
            with replacing(plain) as whole:
                whole.write_bytes(text)
        packed.unlink()

    def _shard(self) -> Path:
        return self.path / (SAMPLES if self._rank == 0 else f"samples.{self._rank}.jsonl")

    def _files(self) -> list[Path]:
        found = [path for path in sorted(self.path.glob("samples*.jsonl")) if path.is_file()]
        packed = self.path / PACKED
        return [packed, *found] if packed.is_file() and self.path / SAMPLES not in found else found

    def _write(self, manifest: dict[str, Any]) -> None:
        with replacing(self.path / MANIFEST) as new:
            new.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def key_of(record: dict[str, Any]) -> Key:
    """Make the key of a measurement, unique in a run."""
    return record["task"], record["sample"], record["method"], record["ratio"], record["max_tokens"]


def _difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first field in which two runs differ; empty if they are one.

    A field that is missing is one that is None: runs from before a field was there can be gone on with.
    """
    same = json.loads(json.dumps(now))
    for field in (*same, *earlier):
        if field in _FREE:
            continue
        old, new = earlier.get(field), same.get(field)
        if isinstance(old, dict) and isinstance(new, dict):
            changed = next((name for name in (*old, *new) if old.get(name) != new.get(name)), None)
            if changed is None:
                continue
            field, old, new = f"{field}.{changed}", old.get(changed), new.get(changed)
        if old != new:
            return f"{field} was {old!r} and is {new!r}"
    return ""


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = _read(path).decode("utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another folder") from None


def _read(path: Path) -> bytes:
    """Read a file of samples, packed or not."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; choose another folder") from None
