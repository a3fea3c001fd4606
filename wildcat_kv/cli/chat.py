"""`wildcat-kv chat`: a conversation over a compressed document, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.cli import options
from wildcat_kv.cli.streaming import TextStream, layers_seen, steps
from wildcat_kv.cli.timing import TimedStreamer, Timing
from wildcat_kv.config import DROPPED
from wildcat_kv.contexts.compressed_context import CompressedContext, compress_context
from wildcat_kv.contexts.context import reads_twice

_HELP = """\
[bold]/ratio[/bold] R      read the document again, keeping a share R of its tokens
[bold]/save[/bold] FILE    write the compressed document to a .safetensors file
[bold]/load[/bold] FILE    go on with another one: a saved document, or a text file
[bold]/new[/bold]          forget the conversation, not the document
[bold]/quit[/bold]         leave; so does Ctrl-D. Ctrl-C ends an answer."""


def chat(
    context: Annotated[Path, typer.Option(help="A text file, or a compressed document saved before.")],
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    preset: options.PresetOption = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens to read at once, where memory is short.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
) -> None:
    """Talk about a document that was read once and compressed."""
    twice = reads_twice(method or "")  # of a method that only contexts have
    fields = {"ratio": ratio, "compression_ratio": compression_ratio, "max_tokens": max_tokens, "seed": seed}
    choice = options.chosen(preset, None if twice else method, **fields)
    choice["compressor"] = method
    if not _is_saved(context):
        options.read_text(context, "context")  # before a model is loaded
    loaded, tokenizer = options.load(model, dtype, device)
    console = Console(highlight=False)
    session = Session(console, loaded, tokenizer, choice, chunk_tokens, max_new_tokens)
    session.open(context)
    console.print("Ask about it; [bold]/help[/bold] lists the commands.", style="dim")
    session.run()


class Session:
    """A document, a conversation about it, and the commands that change them."""

    def __init__(
        self,
        console: Console,
        model: Any,
        tokenizer: Any,
        choice: dict[str, Any],
        chunk_tokens: int | None,
        max_new_tokens: int,
    ) -> None:
        self._console = console
        self._model = model
        self._tokenizer = tokenizer
        self._choice = choice
        self._chunk_tokens = chunk_tokens
        self._max_new_tokens = max_new_tokens
        self._text: str | None = None
        self._commands = {
            "/ratio": self._ratio,
            "/save": self._save,
            "/load": self.open,
            "/new": self._new,
            "/help": self._help,
        }

    def open(self, path: str | Path) -> None:
        """Go on with a saved document, or with a text file, which is read and compressed.

        Raises:
            ValueError, OSError: it cannot be read. What was open stays.
        """
        path = Path(_given(path, "a file")).expanduser()
        if _is_saved(path):
            context, text = CompressedContext.load(path, self._model, self._tokenizer), None
        else:
            text = options.read_text(path, "context")
            context = self._compress(text, self._choice)
        self._take(context, text)

    def run(self) -> None:
        """Answer and obey until the end of the input."""
        while True:
            try:
                line = self._console.input("\n[bold cyan]>[/bold cyan] ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    name, _, argument = line.partition(" ")
                    self._command(name)(argument.strip())
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:
                self._console.print("\n[dim]stopped; this question and its answer are forgotten[/dim]")
            except (ValueError, OSError, RuntimeError) as error:
                self._console.print(f"[red]{escape(' '.join(str(error).split()))}[/red]", soft_wrap=True)

    def _command(self, name: str) -> Any:
        if name not in self._commands:
            raise ValueError(f"{name}: no such command; there are {', '.join(self._commands)}, /quit")
        return self._commands[name]

    def _answer(self, question: str) -> None:
        text = TextStream(self._tokenizer, lambda piece: self._console.out(piece, end="", highlight=False))
        streamer = TimedStreamer(text.put)
        self._conversation.ask(question, max_new_tokens=self._max_new_tokens, streamer=streamer)
        self._console.print()
        self._status(streamer.timing)

    def _ratio(self, argument: str) -> None:
        given = _given(argument, "a ratio")
        try:
            ratio = float(given)
        except ValueError:
            raise ValueError(f"ratio={argument!r} must be a number in (0, 1], for example /ratio 0.25") from None
        if self._text is None:
            raise ValueError("the document was loaded compressed, its text is not at hand; /load the text file first")
        kept = {name: value for name, value in self._choice.items() if name not in ("max_tokens", DROPPED)}
        choice = {**kept, "ratio": ratio}
        self._take(self._compress(self._text, choice), self._text)
        self._choice = choice

    def _save(self, argument: str) -> None:
        path = Path(_given(argument, "a file")).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(f"path={str(path)!r} must end in .safetensors")
        self._context.save(path)
        self._console.print(f"saved to {escape(str(path))}, {path.stat().st_size / 2**20:.1f} MiB", style="dim")

    def _new(self, argument: str) -> None:
        self._conversation = self._context.conversation()
        self._status()

    def _help(self, argument: str) -> None:
        self._console.print(_HELP)

    def _compress(self, text: str, choice: dict[str, Any]) -> CompressedContext:
        with steps() as progress:
            task = progress.add_task("reading", total=None)
            with layers_seen(self._model, progress, task):
                return compress_context(self._model, self._tokenizer, text, chunk_tokens=self._chunk_tokens, **choice)

    def _take(self, context: CompressedContext, text: str | None) -> None:
        """Let this be the document; a conversation about it begins."""
        self._context, self._text = context, text
        self._conversation = context.conversation()
        self._status()

    def _status(self, timing: Timing | None = None) -> None:
        """One line: what was read, what is held of it, and how fast the last answer came."""
        cache = self._conversation.cache
        seen = self._context.tokens + cache.get_seq_length() - self._context.cache.get_seq_length()
        parts = [
            f"{seen:,} tokens seen",
            f"{stored_tokens(cache):,.0f} stored",
            f"{cache.memory_bytes() / 2**20:.1f} MiB",
        ]
        if timing is not None:
            parts.append(f"{timing.tokens_per_second:.1f} tokens/s")
        self._console.print(" · ".join(parts), style="dim")


def _is_saved(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _given(argument: Any, what: str) -> Any:
    if not str(argument).strip():
        raise ValueError(f"give {what}; /help shows how")
    return argument
