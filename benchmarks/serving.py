"""Serving one long context to many: vLLM with the context compressed, and vLLM that reads the text.

In the environment of `make test-vllm`. Each engine runs in a process of its own, one after the other.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.records import Label, Record, Run, now
from eval.machine import commit, machine
from wildcat_kv import compress_context
from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.data import haystack
from wildcat_kv.integrations.vllm.export import BLOCK, export_context
from wildcat_kv.integrations.vllm.prompts import prompt_ids
from wildcat_kv.models import default_model, default_model_path
from wildcat_kv.models.shipped import SMOLLM2

NAME = "serving"
COMPRESSED, TEXT, NO_CACHE = "compressed", "text", "text, no prefix cache"
_SUBJECTS = ("startups", "painting", "programming", "schools", "cities", "money", "writing", "history")
_ASKED = (
    "What does the author say about {}?",
    "Does the author like {}?",
    "Name one thing about {} in the text.",
    "Why are {} mentioned?",
)
# For answers, beside the text.
_RESERVE = 160


@dataclass(frozen=True)
class Load:
    """Load on one engine.

    Attributes:
        contender: name of the engine.
        prompts: prompts of each round, as token ids.
        contexts: folder of exported contexts; None for an engine without our connector.
        prefix_cache: True to share blocks of equal prefixes.
        answer: tokens of an answer.
        threads: threads of the engine.
    """

    contender: str
    prompts: list[list[list[int]]]
    contexts: str | None
    prefix_cache: bool
    answer: int
    threads: int


@dataclass(frozen=True)
class Round:
    """One round of questions, all sent at once.

    Attributes:
        seconds: time until the last answer.
        first_tokens: seconds to each request's first token.
        blocks: most blocks of the cache in use.
    """

    seconds: float
    first_tokens: list[float]
    blocks: float


def questions(count: int) -> list[str]:
    """Make different questions."""
    made = [asked.format(subject) for asked in _ASKED for subject in _SUBJECTS]
    return [made[number % len(made)] for number in range(count)]


def run_load(load: Load) -> list[Round]:
    """Start an engine and put the load on it, round by round."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="4", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="WARNING")
    os.environ["OMP_NUM_THREADS"] = str(load.threads)
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if load.contexts is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "WildCatConnector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"contexts": load.contexts},
        }
    engine = LLM(
        str(default_model_path()),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        enable_prefix_caching=load.prefix_cache,
        disable_log_stats=False,
        **options,
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True)
    engine_blocks = engine.vllm_config.cache_config.num_gpu_blocks
    return [
        _round(engine, prompts, sampling, engine_blocks, str(number)) for number, prompts in enumerate(load.prompts)
    ]


def _round(engine: Any, prompts: Sequence[list[int]], sampling: Any, all_blocks: int, name: str) -> Round:
    """Send all prompts at once, and wait for all answers."""
    seen: dict[str, float] = {}
    start, share = time.perf_counter(), 0.0
    for number, ids in enumerate(prompts):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids:
                seen.setdefault(output.request_id, time.perf_counter() - start)
        used = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:kv_cache_usage_perc"]
        share = max([share, *used])
    return Round(time.perf_counter() - start, sorted(seen.values()), share * all_blocks)


def records(load: Load, rounds: Sequence[Round]) -> list[Record]:
    """Make the records of one engine."""
    found = []
    for number, one in enumerate(rounds):
        name = ("cold", "warm")[number]
        labels: dict[str, Label] = {
            "contender": load.contender,
            "round": name,
            "requests": len(load.prompts[number]),
        }
        found += [
            Record(quantity="seconds", unit="s", labels=labels, samples=(one.seconds,)),
            Record(quantity="first_token", unit="s", labels=labels, samples=tuple(one.first_tokens)),
            Record(quantity="blocks", unit=f"blocks of {BLOCK}", labels=labels, samples=(one.blocks,)),
        ]
    return found


def summary(run: Run) -> str:
    """Write a run as Markdown."""
    lines = [
        "# Serving one context to many",
        "",
        f"`{run.command}`, {run.started[:10]}, {run.model} in float32 on {run.threads} thread(s) of the CPU.",
        "",
        "| engine | round | requests | requests a second | first token, median | first token, last | blocks in use |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_labels: dict[tuple[Any, ...], dict[str, tuple[float, ...]]] = {}
    for record in run.records:
        by_labels.setdefault(tuple(record.labels.values()), {})[record.quantity] = record.samples
    for (contender, name, requests), found in by_labels.items():
        first = found["first_token"]
        cells = (
            str(contender),
            str(name),
            str(requests),
            f"{int(requests) / found['seconds'][0]:.2f}",
            f"{statistics.median(first):.2f} s",
            f"{max(first):.2f} s",
            f"{found['blocks'][0]:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *run.notes, ""])


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=500)] = 8000,
    ratio: Annotated[float, typer.Option(help="Share of the tokens to keep.")] = 0.25,
    requests: Annotated[int, typer.Option(help="Questions of a round.", min=1)] = 32,
    uncached: Annotated[int, typer.Option(help="Questions without a prefix cache; each reads the text.", min=0)] = 4,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 24,
    method: Annotated[str, typer.Option(help="Method of compression.")] = "wildcat",
    threads: Annotated[int, typer.Option(help="Threads of each engine.", min=1)] = 1,
) -> None:
    """Serve one text to many questions: compressed, and read by vLLM. Needs vLLM, see `make test-vllm`."""
    output.mkdir(parents=True, exist_ok=True)
    options = {
        "tokens": tokens,
        "ratio": ratio,
        "requests": requests,
        "uncached": uncached,
        "answer": answer,
        "method": method,
    }
    run = Run(
        benchmark=NAME,
        command=shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        commit=commit(),
        started=now(),
        model=SMOLLM2.name,
        device="cpu",
        threads=threads,
        machine=machine(),
        versions=_versions(),
        options=options,
        notes=[
            "cold: the engine has seen nothing; it loads the context, or reads the text. warm: the same questions "
            "again. All requests of a round come at once."
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        for load in _loads(Path(folder), options, threads):
            run.records += records(load, _run_apart(load))
            run.write(output)
    run.finished = now()
    run.write(output)
    (output / f"{NAME}.md").write_text(summary(run), encoding="utf-8")
    print(summary(run))


def _run_apart(load: Load) -> list[Round]:
    """Run a load in a process of its own; what it prints goes to stderr."""
    code = "import sys; from benchmarks.serving import answer_load; answer_load(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "load.json"), Path(folder, "rounds.json")
        asked.write_text(json.dumps(asdict(load)), encoding="utf-8")
        subprocess.run([sys.executable, "-c", code, str(asked), str(told)], check=True, stdout=sys.stderr)
        return [Round(**fields) for fields in json.loads(told.read_text(encoding="utf-8"))]


def answer_load(asked: str, told: str) -> None:
    """Run the load of one file, and write its rounds to another."""
    load = Load(**json.loads(Path(asked).read_text(encoding="utf-8")))
    rounds = [asdict(one) for one in run_load(load)]
    Path(told).write_text(json.dumps(rounds), encoding="utf-8")


def _versions() -> dict[str, str]:
    """List the versions of Python and of the packages that matter here."""
    import vllm

    packages = {name: version(name) for name in ("wildcat-kv", "torch", "transformers")}
    return {"python": platform.python_version(), **packages, "vllm": vllm.__version__}


def _loads(folder: Path, options: dict[str, Any], threads: int) -> list[Load]:
    """Compress and export the text, and make the prompts of each engine."""
    torch.set_num_threads(threads)
    model, tokenizer = default_model()
    ids = tokenizer(haystack.essays()[: options["tokens"] * 8]).input_ids[: options["tokens"]]
    with torch.no_grad():
        context = compress_context(
            model,
            tokenizer,
            tokenizer.decode(ids),
            compressor=options["method"],
            ratio=options["ratio"],
            reserve=_RESERVE,
        )
        stored = export_context(context, folder / "context").stored
    following = [encode_follow_up(tokenizer, asked)[0].tolist() for asked in questions(options["requests"])]
    text = context.ids[0].tolist()
    short = [prompt_ids(stored, ids) for ids in following]
    long = [[*text, *ids] for ids in following]
    common: dict[str, Any] = {"answer": options["answer"], "threads": threads}
    loads = [
        Load(COMPRESSED, [short, short], str(folder), True, **common),
        Load(TEXT, [long, long], None, True, **common),
    ]
    if options["uncached"]:
        loads.append(Load(NO_CACHE, [long[: options["uncached"]]], None, False, **common))
    return loads


if __name__ == "__main__":
    typer.run(main)
