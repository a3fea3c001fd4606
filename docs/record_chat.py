"""Records a session of `wildcat-kv chat` on a pseudo-terminal and draws it: docs/images/chat.svg.

    python docs/record_chat.py

The model is the default one. The document is 1,000 tokens of essays with two numbers planted in them, a length at which
this model answers with the exact cache too. What is drawn is what the terminal was sent, with nothing left out but the
progress bar while the document is read; the first line shows the settings.
"""

import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from wildcat_kv.data.haystack import build_context, make_needles
from wildcat_kv.models import default_model

COLUMNS, LINES = 100, 60
IMAGE = Path(__file__).parent / "images" / "chat.svg"
PROMPT = b"> "


def main():
    """Record and draw."""
    _, tokenizer = default_model()
    needles = make_needles(2, 4)
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "essay.txt"
        document.write_text(build_context(tokenizer, 1000, needles, seed=4), encoding="utf-8")
        command = "wildcat-kv chat --context essay.txt --preset balanced --max-new-tokens 16"
        lines = [
            *(needle.question for needle in needles),
            "/save essay.safetensors",
            "/ratio 0.5",
            needles[0].question,
            "/load essay.safetensors",
            "/quit",
        ]
        screen = f"$ {command}\r\n" + record(command, lines, folder)
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text.from_ansi(screen.replace("\r\n", "\n")))
    console.save_svg(str(IMAGE), title="wildcat-kv chat")
    print(screen)


def record(command, lines, folder):
    """What a terminal shows while `lines` are typed, each when the session asks for it."""
    main_end, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.Popen(
        command.split(), cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL
    )
    os.close(terminal)
    shown, typed = b"", 0
    while True:
        ready, _, _ = select.select([main_end], [], [], 1.0)
        if ready:
            try:
                piece = os.read(main_end, 65536)
            except OSError:
                break
            shown += piece
        elif process.poll() is not None:
            break
        plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown)
        if typed < len(lines) and plain.endswith(b"\n" + PROMPT):
            time.sleep(0.2)
            os.write(main_end, (lines[typed] + "\n").encode())
            typed += 1
            time.sleep(0.2)
    process.wait()
    return shown.decode("utf-8", "replace")


if __name__ == "__main__":
    main()
