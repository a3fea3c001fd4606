"""Answers shown as text while they come, and forward passes followed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import TextStreamer
from typing_extensions import override


class TextStream(TextStreamer):
    """Streamer that hands new text on; special tokens are left out.

    Args:
        tokenizer: the model's tokenizer.
        on_text: function called with each piece of text, whole characters only.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


@contextmanager
def steps() -> Iterator[Progress]:
    """Show progress bars on stderr, gone at the end.

    It shows nothing where stderr is no terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def layers_seen(model: Any, progress: Progress, task: Any) -> Iterator[None]:
    """Let a progress bar follow forward passes layer by layer, each from the beginning.

    Args:
        model: a Transformers decoder.
        progress: the bars.
        task: the bar's task.
    """
    layers = getattr(model.get_decoder(), "layers", ())
    progress.update(task, total=len(layers) or None)
    hooks = [
        layer.register_forward_hook(lambda *_, done=index + 1: progress.update(task, completed=done))
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
