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

from rich.console import Console
from rich.terminal_theme import NIGHT_OWLISH
from rich.text import Text

from wildcat_kv.cli.demo import planted_text
from wildcat_kv.models import default_model

COLUMNS, LINES = 100, 60
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
        screen = f"$ {session.command}\r\n" + record(session, folder)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(screen.replace("\r\n", "\n")))
    console.save_svg(str(IMAGES / f"{name}.svg"), title=f"wildcat-kv {name}", theme=NIGHT_OWLISH)
    print(screen)


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
    shown, left = b"", list(session.lines)
    while True:
        ready, _, _ = select.select([ours], [], [], 1.0)
        if ready:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
        elif left and SEQUENCE.sub(b"", shown).replace(b"\r", b"").endswith(PROMPT):  # a second long
            os.write(ours, f"{left.pop(0)}\n".encode())
    if status := process.wait():
        sys.exit(f"{session.command}: exit status {status}")
    return shown.decode("utf-8", "replace")


if __name__ == "__main__":
    main()
