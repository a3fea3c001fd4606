"""Tokens shown as text while they come, and forward passes followed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class TextStream:
    """Turns token ids into text as they come, whole characters only; special tokens are left out."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._shown = 0

    def put(self, token: int) -> None:
        """Hand the text of one more token on."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            self._on_text(text[self._shown :])
            self._shown = len(text)


@contextmanager
def steps() -> Iterator[Progress]:
    """Progress bars on stderr, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress


@contextmanager
def layers_seen(model: Any, progress: Progress, task: Any) -> Iterator[None]:
    """Let a progress bar follow forward passes layer by layer, each from the beginning."""
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
