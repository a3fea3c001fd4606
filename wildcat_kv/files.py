"""Files that are complete or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file beside `target` to write to, which takes its place at the end of the block, unless that fails.

    It has the permissions that a new file of the user's has, or those of the file that it replaces.

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
