"""Record a command on a pseudo-terminal and draw it: docs/images/demo.svg, docs/images/chat.svg.

    python -m docs.record demo
    python -m docs.record chat

The model is the default one. What is drawn is what the terminal was sent, with nothing left out but the bars that show
progress. The chat is about the demo's text: 1,000 tokens of essays with four facts, spread over it.
"""

import io
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import NIGHT_OWLISH
from rich.text import Text

from wildcat_kv.cli.demo import planted_text
from wildcat_kv.models import default_model

COLUMNS, LINES = 100, 60
LONGEST = 300  # lines of a session
IMAGES = Path(__file__).parent / "images"
PROMPT = b"\n> "
SEQUENCE = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


@dataclass(frozen=True)
class Session:
    """A command, and what is typed when it asks."""

    command: str
    lines: tuple[str, ...] = ()


SESSIONS = {
    "demo": Session("wildcat-kv demo"),
    "chat": Session(
        "wildcat-kv chat --context essay.txt --max-new-tokens 16",
        (
            "What is the special magic number for Sanaa?",
            "/save essay.safetensors",
            "/ratio 0.25",
            "What is the special magic number for Sanaa?",
            "/load essay.safetensors",
            "/quit",
        ),
    ),
}


def main():
    """Record and draw the session that is named."""
    if len(sys.argv) != 2 or sys.argv[1] not in SESSIONS:
        sys.exit(f"python -m docs.record {'|'.join(SESSIONS)}")
    name = sys.argv[1]
    session = SESSIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        _, tokenizer = default_model()
        _, text = planted_text(tokenizer, tokens=1000, seed=1)
        Path(folder, "essay.txt").write_text(text, encoding="utf-8")
        sent = f"$ {session.command}\r\n" + record(session, folder)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    screen = shown(sent)
    console.print(screen)
    console.save_svg(str(IMAGES / f"{name}.svg"), title=f"wildcat-kv {name}", theme=NIGHT_OWLISH)
    print(screen)


def shown(sent):
    """Give what a terminal shows of what it was sent, cursor movements included; empty lines are joined to one."""
    screen = pyte.Screen(COLUMNS, LONGEST)
    # pyte knows no faint text; bright black looks like it.
    pyte.Stream(screen).feed(sent.replace("\x1b[2m", "\x1b[90m").replace("\x1b[1;2m", "\x1b[1;90m"))
    rows = [
        Text.assemble(*((cell.data, style_of(cell)) for cell in map(row.__getitem__, range(COLUMNS))))
        for row in map(screen.buffer.__getitem__, range(LONGEST))
    ]
    for row in rows:
        row.rstrip()
    kept = [row for row, before in zip(rows, [Text(), *rows], strict=False) if row.plain or before.plain]
    return Text("\n").join(kept)


def style_of(cell):
    """Give the style of a terminal's cell."""
    names = {"default": None, "brown": "yellow", "brightblack": "bright_black"}  # pyte's and rich's
    colour = names.get(cell.fg, cell.fg)
    return Style(color=colour, bold=cell.bold)


def record(session, folder):
    """Give what a terminal shows while the lines are typed, each when the session asks for it."""
    ours, terminal = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "LINES": str(LINES),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody is there to answer where the cursor is
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        session.command.split(), cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL
    )
    os.close(terminal)
    received, left = b"", list(session.lines)
    while True:
        ready, _, _ = select.select([ours], [], [], 1.0)
        if ready:
            try:
                received += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
        elif left and SEQUENCE.sub(b"", received).replace(b"\r", b"").endswith(PROMPT):  # a second long
            os.write(ours, f"{left.pop(0)}\n".encode())
    if status := process.wait():
        sys.exit(f"{session.command}: exit status {status}")
    return received.decode("utf-8", "replace")


if __name__ == "__main__":
    main()
