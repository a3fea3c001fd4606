"""Bytes that a cache holds, and the peak while a prompt is read, each in its own process."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import Cache

from benchmarks.caches import WILDCAT, held_bytes, theirs
from benchmarks.options import Options, Subject
from benchmarks.records import Label, Record
from benchmarks.turns import take_turns
from wildcat_kv import CompressedCache
from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.hook.keyword import CACHE

TOKENS = (8000,)
OURS = ("query_wildcat", AUTO)  # measured beside WildCat where they are asked for
_WARM_UP_TOKENS = 16
_PROC = Path("/proc/self")
# glibc raises this threshold as a process frees large tensors, and keeps what it frees below it: by chance, twice as
# much as was in use. Set to where it begins, it stays, and what is freed goes back at once.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def measure(options: Options) -> Iterator[Record]:
    """Measure the bytes held after a prefill, and its peak above what was there before."""
    for dtype in options.dtypes:
        for tokens in options.lengths(*TOKENS):
            # The peak of Query WildCat depends on a profile, which the default has where the package knows the model.
            names = [*theirs(None, tokens), WILDCAT, *(name for name in OURS if name in options.methods)]
            contenders = {name: _child(options, dtype, tokens, name) for name in names}
            turns = take_turns(contenders, options.turns, warm_ups=0, title=f"memory, {dtype}, {tokens} tokens")
            for name, quantities in turns.items():
                labels: dict[str, Label] = {"dtype": dtype, "tokens": tokens, "contender": name}
                for quantity, samples in quantities.items():
                    yield Record(quantity=quantity, unit="B", labels=labels, samples=tuple(samples))


def _child(options: Options, dtype: str, tokens: int, name: str) -> Callable[[], dict[str, float]]:
    """Measure in a fresh process: memory that an allocator kept from earlier work hides the peak."""
    request = json.dumps({"options": asdict(options), "dtype": dtype, "tokens": tokens, "name": name})

    def run() -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.memory", request]
        environment, folder = _ALLOCATOR | os.environ, Path(__file__).parents[1]
        child = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"memory of {name}, {dtype}, {tokens} tokens: {reason}")
        return json.loads(child.stdout.splitlines()[-1])

    return run


@torch.no_grad()
def prefill_memory(options: Options, dtype: str, tokens: int, name: str) -> dict[str, float]:
    """Bytes of one prefill in this process.

    Returns:
        "held_bytes" of the cache after it, and "peak_bytes" above what the process (on CUDA, torch) held before.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    subject = Subject.load(options, dtype)
    ids = subject.prompt(tokens)
    subject.model(ids[:, :_WARM_UP_TOKENS], **{CACHE: _make(subject.model.config, options, tokens, name)})
    gc.collect()
    before = _start(subject.device)
    cache = _make(subject.model.config, options, tokens, name)
    subject.model(ids, **{CACHE: cache}, logits_to_keep=1)
    return {"held_bytes": held_bytes(cache), "peak_bytes": _peak(subject.device) - before}


def _make(config: Any, options: Options, tokens: int, name: str) -> Cache:
    if name in (WILDCAT, *OURS):
        return CompressedCache(config, options.settings, compressor=name)
    return theirs(config, tokens)[name]()


def _start(device: torch.device) -> int:
    """Begin to look for the peak; return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Loading the model took more than it holds now, which would hide the beginning of the prefill.
    if (_PROC / "clear_refs").exists():
        (_PROC / "clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Read the most bytes since `_start`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's where there is a choice: that of a child begins at its parent's.
    if (_PROC / "status").exists():
        lines = (_PROC / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _answer(request: str) -> None:
    """Answer a request, in the child process: print the bytes."""
    asked = json.loads(request)
    options = TypeAdapter(Options).validate_python(asked.pop("options"))
    print(json.dumps(prefill_memory(options, **asked)))


if __name__ == "__main__":
    _answer(sys.argv[1])
