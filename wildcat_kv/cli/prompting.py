"""Lines that a person types, in a terminal or through a pipe.

A terminal has history and completion; a pipe is read plainly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.shortcuts import CompleteStyle
from typing_extensions import override

_TAKE_A_FILE = ("/save", "/load")


class CommandCompleter(Completer):
    """Completion of commands, and of the file that a command takes.

    Args:
        commands: the commands, each with its slash.
    """

    def __init__(self, commands: Iterable[str]) -> None:
        self._commands = WordCompleter(list(commands), sentence=True)
        self._files = PathCompleter(expanduser=True)

    @override
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        command, space, argument = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        if not space:
            yield from self._commands.get_completions(document, complete_event)
        elif command in _TAKE_A_FILE:
            yield from self._files.get_completions(Document(argument), complete_event)


def typed_lines(commands: Iterable[str]) -> Iterator[str]:
    """Yield typed lines, without blank ones, until the end of the input.

    Ctrl-D and Ctrl-C end it too.

    Args:
        commands: the commands to complete.
    """
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    session: PromptSession[str] = PromptSession(
        [("bold ansicyan", "\n> ")],
        completer=CommandCompleter(commands),
        complete_style=CompleteStyle.READLINE_LIKE,
    )
    while True:
        try:
            line = session.prompt().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
