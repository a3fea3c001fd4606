"""A conversation over a compressed document, in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from wildcat_kv.cache.forecast import cache_size
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.cli.figures import MIB, short_text_note
from wildcat_kv.cli.prompting import typed_lines
from wildcat_kv.cli.streaming import TextStream, layers_seen, steps
from wildcat_kv.cli.timing import TimedStreamer, Timing
from wildcat_kv.config import BUDGETS, WildCatConfig
from wildcat_kv.contexts.compressed_context import CompressedContext, compress_context
from wildcat_kv.files import read_text

_HELP = """\
[bold]/ratio[/bold] R      read the document again, keeping a share R of its tokens: /ratio 0.25 keeps a quarter
[bold]/save[/bold] FILE    write the compressed document to a .safetensors file
[bold]/load[/bold] FILE    go on with another one: a saved document, or a text file
[bold]/new[/bold]          forget the conversation, not the document
[bold]/quit[/bold]         leave; so does Ctrl-D. Ctrl-C ends an answer."""


class Session:
    """A document, a conversation about it, and the commands that change them.

    Args:
        model: a Transformers decoder.
        tokenizer: the model's tokenizer.
        choice: keyword arguments of `compress_context`.
        chunk_tokens: tokens to read at once; None for all.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        choice: dict[str, Any],
        chunk_tokens: int | None,
        max_new_tokens: int,
    ) -> None:
        self._console = Console(highlight=False)
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
            "/quit": self._quit,
        }

    def open(self, path: str | Path) -> None:
        """Continue a saved document, or read and compress a text file.

        Args:
            path: a .safetensors file, or a text file.

        Raises:
            ValueError, OSError: a file that cannot be read. What was open stays.
        """
        path = Path(_given(path, "a file")).expanduser()
        if path.suffix == ".safetensors":
            context, text = CompressedContext.load(path, self._model, self._tokenizer), None
        else:
            text = read_text(path, "context", stdin=True)
            context = self._compress(text, self._choice)
        self._take(context, text)

    def run(self) -> None:
        """Answer questions and obey commands until the end of the input."""
        self._console.print("Ask about it; [bold]/help[/bold] lists the commands.", style="dim")
        for line in typed_lines(self._commands):
            try:
                if line.startswith("/"):
                    name, _, argument = line.partition(" ")
                    self._command(name)(argument.strip())
                else:
                    self._answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._console.print("\n[dim]stopped; this question and its answer are forgotten[/dim]")
            except (ValueError, OSError, RuntimeError) as error:
                self._console.print(f"[red]{escape(' '.join(str(error).split()))}[/red]", soft_wrap=True)

    def _command(self, name: str) -> Callable[[str], None]:
        if name not in self._commands:
            raise ValueError(f"{name}: no such command; there are {', '.join(self._commands)}")
        return self._commands[name]

    def _quit(self, argument: str) -> None:
        raise EOFError

    def _answer(self, question: str) -> None:
        text = TextStream(self._tokenizer, lambda piece: self._console.out(piece, end="", highlight=False))
        streamer = TimedStreamer(text)
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
        kept = {name: value for name, value in self._choice.items() if name not in BUDGETS}
        choice = {**kept, "ratio": ratio}
        self._take(self._compress(self._text, choice), self._text)
        self._choice = choice
        if choice.get("preset") is None and choice.get("bits") is None and self._context.cache.settings.bits is None:
            self._console.print("not quantised: for 4 bits at every ratio, begin the chat with --bits 4", style="dim")

    def _save(self, argument: str) -> None:
        path = Path(_given(argument, "a file")).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(f"path={str(path)!r} must end in .safetensors")
        self._context.save(path)
        self._console.print(f"saved to {escape(str(path))}, {path.stat().st_size / MIB:.1f} MiB", style="dim")

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
        if note := short_text_note(context.cache, context.tokens):
            self._console.print(note, style="dim", soft_wrap=True)

    def _status(self, timing: Timing | None = None) -> None:
        """Print in one line what was read and held, and the speed.

        The speed is that of the last answer.
        """
        cache = self._conversation.cache
        seen = self._context.tokens + cache.get_seq_length() - self._context.cache.get_seq_length()
        parts = [
            f"{seen:,} tokens seen",
            f"{stored_tokens(cache):,.0f} stored",
            f"{cache.memory_bytes() / MIB:.1f} MiB of {self._exact_bytes(seen) / MIB:.1f}",
        ]
        if timing is not None:
            parts.append(f"{timing.tokens_per_second:.1f} tokens/s")
        self._console.print(" · ".join(parts), style="dim")

    def _exact_bytes(self, tokens: int) -> int:
        """Compute what the exact cache would hold."""
        model = self._model
        return cache_size(model.config, tokens, WildCatConfig(ratio=1.0), dtype=model.dtype).exact_nbytes


def _given(argument: Any, what: str) -> Any:
    if not str(argument).strip():
        raise ValueError(f"give {what}; /help shows how")
    return argument
