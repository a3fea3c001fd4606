"""Files: written whole or not at all, and read as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write to a file that replaces `target` unless the block fails.

    It has the permissions of a new file of the user's, or those of the file that it replaces.

    Args:
        target: path of the file; one that exists is replaced.

    Raises:
        FileNotFoundError: its folder is not there.
        OSError: it cannot be written.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path={str(target)!r}: there is no folder {str(target.parent)!r}; make it first")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        permissions = (target if target.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(permissions)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path, name: str, *, stdin: bool = False) -> str:
    """Read a UTF-8 text that is not empty.

    Args:
        path: path of the file.
        name: name of the argument or option that gave the path, for messages.
        stdin: True to read standard input where the path is "-".

    Raises:
        ValueError: there is no such file, it cannot be read, is no UTF-8 text, or is empty.
    """
    given = f"{name}={str(path)!r}"
    try:
        text = sys.stdin.read() if stdin and str(path) == "-" else path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{given}: there is no such file; check the path (current folder: {Path.cwd()})") from None
    except OSError as error:
        raise ValueError(f"{given} cannot be read: {error.strerror or error}; give a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{given} is no UTF-8 text: {error}; save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{given} is empty; write a text into it")
    return text
