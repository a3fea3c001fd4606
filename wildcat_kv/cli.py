"""The command `wildcat-kv`."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv.accounting import TimedStreamer, Timing, cache_bytes, stored_tokens
from wildcat_kv.cache import CompressedCache, WildCatCache
from wildcat_kv.compressors import available, resolve
from wildcat_kv.config import WildCatConfig
from wildcat_kv.haystack import build_context, make_needles
from wildcat_kv.models import load_model
from wildcat_kv.prompts import encode_prompt, encode_question

app = typer.Typer(
    help="Compress the KV cache of a language model into a small weighted coreset.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option(help="Hub id, local folder or GGUF file. Default: SmolLM2-135M-Instruct, from PyPI.")
]
MethodOption = Annotated[str, typer.Option(help="How to compress; `wildcat-kv methods` lists the names.")]
RatioOption = Annotated[float | None, typer.Option(help="Share of the tokens to keep, in (0, 1].")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: cuda if there is one.")]


@app.command()
def demo(
    ratio: RatioOption = 0.25,
    tokens: Annotated[int, typer.Option(help="Tokens of essays to read.", min=500)] = 4000,
    max_new_tokens: Annotated[int, typer.Option(help="Length of each answer.", min=1)] = 48,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Of the essays, the needle and the pivots.")] = 0,
) -> None:
    """Ask about a long text: with the exact cache, and with WildCat.

    The text is read and compressed before the questions are known.
    """
    settings = WildCatConfig(ratio=ratio, seed=seed)
    loaded, tokenizer = load_model(model, _dtype(dtype), _device(device))
    (needle,) = make_needles(1, seed)
    context = build_context(tokenizer, tokens, [needle], seed=seed)
    questions = [(needle.question, needle.sentence.split(" is ")[0] + " is "), ("What is this text about?", "")]
    caches: dict[str, Callable[[], Cache]] = {
        "exact": lambda: DynamicCache(config=loaded.config),
        f"WildCat {ratio:.0%}": lambda: WildCatCache(loaded.config, settings),
    }
    with _steps() as progress:
        runs = {
            name: _ask(loaded, tokenizer, make(), context, questions, max_new_tokens, progress, name)
            for name, make in caches.items()
        }
    console = Console(highlight=False)
    console.print(f"\n{tokens} tokens of essays hold the needle: [bold]{needle.sentence}[/bold]\n")
    console.print(_demo_table(questions, runs))


@app.command()
def methods() -> None:
    """List the compression methods, ours and those of installed packages."""
    table = Table("name", "what it does", "paper", "queries", "decodes", box=None, padding=(0, 2, 0, 0))
    for method in available():
        marks = ("yes" if has else "no" for has in (method.needs_queries, method.decodes))
        table.add_row(method.name, method.summary, method.paper.removeprefix("arXiv "), *marks)
    console = Console()
    console.print(table)
    console.print(
        "\npaper: on arXiv. queries: learns from queries, not from keys and values alone. decodes: compresses what is "
        "generated, too; one that does not reads a context by wildcat_kv.compress_context()."
    )


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, with the model `wildcat` in it; all arguments are lm-eval's."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import wildcat_kv.lm_eval_model  # noqa: F401  # registers itself
    except ImportError as error:
        raise ValueError(f"{error}; install what evaluations need: pip install 'wildcat-kv[eval]'") from None
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()


@app.command()
def generate(
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt; '-' for standard input.")],
    model: ModelOption = None,
    method: MethodOption = "wildcat",
    ratio: RatioOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to store, instead of a ratio.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.", min=1)] = 128,
    preset: Annotated[Path | None, typer.Option(help="YAML file of settings, such as configs/published.yaml.")] = None,
    chat: Annotated[bool, typer.Option(help="Send the prompt as a chat message if the model has a template.")] = True,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    seed: Annotated[int | None, typer.Option(help="Of the pivots; 0 unless the preset says otherwise.")] = None,
) -> None:
    """Answer a prompt with a compressed cache; the answer goes to stdout, the accounting to stderr."""
    settings = _settings(preset, ratio, max_tokens, seed)
    compressor = resolve(method, settings)
    prompt = _read(prompt_file)
    loaded, tokenizer = load_model(model, _dtype(dtype), _device(device))
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(loaded.device)
    cache = CompressedCache(loaded.config, settings, compressor=compressor)
    text = _TextStream(tokenizer, lambda piece: print(piece, end="", flush=True))
    with _steps() as progress:
        read = progress.add_task(f"reading {ids.shape[1]} tokens", total=None)
        with _layers_seen(loaded, progress, read):

            def on_token(token: int) -> None:
                progress.stop()
                text.put(token)

            timing = _generate(loaded, tokenizer, cache, ids, max_new_tokens, on_token)
    print()
    table = Table("tokens seen", "stored", "cache MiB", "first token s", "tokens/s", box=None)
    table.add_row(
        str(cache.get_seq_length()),
        f"{stored_tokens(cache):.0f}",
        f"{cache_bytes(cache) / 2**20:.1f}",
        f"{timing.first_token_seconds:.1f}",
        f"{timing.tokens_per_second:.1f}",
    )
    Console(stderr=True).print(table)


def main() -> None:
    """The command's entry point."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    run_app(app, "wildcat-kv")


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command; what a person can put right is one line on stderr and exit status 1."""
    try:
        sys.exit(app(standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's, or click's with an older typer
        if usage is None and not isinstance(error, (ValueError, RuntimeError, OSError)):
            raise
        message = usage() if usage is not None else str(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)


@dataclass(frozen=True)
class _Run:
    """Answers with one cache; the accounting is of the cache after the context, `stored` in entries a head."""

    answers: list[str]
    stored: float
    mebibytes: float
    prefill_seconds: float
    tokens_per_second: float


@torch.no_grad()
def _ask(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    context: str,
    questions: list[tuple[str, str]],
    max_new_tokens: int,
    progress: Progress,
    name: str,
) -> _Run:
    """Read `context` once, then answer each question (text, beginning of the answer) on a copy of the cache."""
    before, _ = encode_question(tokenizer, context, "")
    before = before.to(model.device)
    read = progress.add_task(f"{name}: reading {before.shape[1]} tokens", total=None)
    reading = TimedStreamer()
    with _layers_seen(model, progress, read):
        reading.put(before)
        logits = model(before, past_key_values=cache, logits_to_keep=1).logits
        reading.put(logits.argmax(-1))
    stored, mebibytes = stored_tokens(cache), cache_bytes(cache) / 2**20
    answers, speeds = [], []
    for question, beginning in questions:
        _, after = encode_question(tokenizer, context, question, beginning)
        ids = torch.cat((before, after.to(model.device)), dim=-1)
        writing = progress.add_task(f"{name}: {question}", total=max_new_tokens)
        pieces: list[str] = [beginning]
        text = _TextStream(tokenizer, pieces.append)

        def on_token(token: int, text: _TextStream = text, task: Any = writing) -> None:
            text.put(token)
            progress.advance(task)

        fork = copy.deepcopy(cache)
        timing = _generate(model, tokenizer, fork, ids, max_new_tokens, on_token, stop_strings=["\n"])
        progress.update(writing, completed=max_new_tokens)
        answers.append("".join(pieces).strip())
        speeds.append(timing.tokens_per_second)
    return _Run(answers, stored, mebibytes, reading.timing.first_token_seconds, sum(speeds) / len(speeds))


def _generate(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    ids: torch.Tensor,
    max_new_tokens: int,
    on_token: Callable[[int], None],
    stop_strings: list[str] | None = None,
) -> Timing:
    """Greedy decoding, each new token handed to `on_token` as it comes."""
    streamer = TimedStreamer(on_token)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        stop_strings=stop_strings,
        tokenizer=tokenizer if stop_strings else None,
    )
    return streamer.timing


class _TextStream:
    """Turns token ids into text as they come, whole characters only; special tokens are left out."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._shown = 0

    def put(self, token: int) -> None:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            self._on_text(text[self._shown :])
            self._shown = len(text)


@contextmanager
def _steps() -> Iterator[Progress]:
    """Progress bars on stderr, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress


@contextmanager
def _layers_seen(model: Any, progress: Progress, task: Any) -> Iterator[None]:
    """Let a progress bar follow a forward pass layer by layer."""
    layers = getattr(model.get_decoder(), "layers", ())
    progress.update(task, total=len(layers) or None)
    hooks = [layer.register_forward_hook(lambda *_: progress.advance(task)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _demo_table(questions: list[tuple[str, str]], runs: dict[str, _Run]) -> Table:
    """One column a cache: answers, then the accounting."""
    table = Table("", *runs, show_lines=True)
    for index, (question, _) in enumerate(questions):
        table.add_row(question, *(run.answers[index] for run in runs.values()))
    table.add_row("tokens stored", *(f"{run.stored:.0f}" for run in runs.values()))
    table.add_row("cache, MiB", *(f"{run.mebibytes:.1f}" for run in runs.values()))
    table.add_row("prefill, seconds", *(f"{run.prefill_seconds:.1f}" for run in runs.values()))
    table.add_row("tokens per second", *(f"{run.tokens_per_second:.1f}" for run in runs.values()))
    return table


def _settings(preset: Path | None, ratio: float | None, max_tokens: int | None, seed: int | None) -> WildCatConfig:
    given = {"ratio": ratio, "max_tokens": max_tokens, "seed": seed}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if preset is not None:
        return WildCatConfig.from_yaml(preset, **fields)
    return (
        WildCatConfig(**fields) if "ratio" in fields or "max_tokens" in fields else WildCatConfig(ratio=0.25, **fields)
    )


def _read(path: Path) -> str:
    text = sys.stdin.read() if str(path) == "-" else _read_file(path)
    if not text.strip():
        raise ValueError(f"prompt_file={str(path)!r} is empty; write the prompt into it")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file={str(path)!r} cannot be read as UTF-8 text: {error}") from None


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r} must be float32, bfloat16 or float16")
    return getattr(torch, name)


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name
