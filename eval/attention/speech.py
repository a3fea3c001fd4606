"""Speech to transcribe: a recording, and texts that a synthesiser reads.

The recording is the speech of 1961 that whisper.cpp ships as its sample, public domain. The texts are passages of the
essays of the needle tests, read by Debian's `flite`.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.attention.whisper import RATE
from wildcat_kv.data.downloads import DownloadError, cache_folder, file_sha256
from wildcat_kv.data.haystack import essays

_PACKAGE, _SHA256 = "nodejs-whisper@0.3.1", "92041caf2b26c74b7f489fedf37bd093f216eebd61df512045ec2d19d0531d37"
_MEMBER = "package/cpp/whisper.cpp/bindings/go/samples/jfk.wav"
_JFK = "And so my fellow Americans ask not what your country can do for you ask what you can do for your country"
_VOICES = ("slt", "rms")
_WORDS = 50  # at least, about 20 seconds


class Clip(NamedTuple):
    """A piece of speech.

    Attributes:
        name: name of the clip.
        text: what is said.
        sound: float32 (samples,) at 16 kHz.
    """

    name: str
    text: str
    sound: Tensor


def clips(count: int) -> list[Clip]:
    """Give the recording, and as many passages as make `count` clips.

    Raises:
        DownloadError: the recording could not be fetched, or there is no `flite` to read texts.
    """
    found = [Clip("jfk", _JFK, _recording())]
    for number, text in enumerate(passages(count - 1, _WORDS)):
        found.append(Clip(f"passage {number + 1}", text, _spoken(text, _VOICES[number % len(_VOICES)])))
    return found


def passages(count: int, words: int) -> list[str]:
    """Take passages of whole sentences without figures, evenly spread over the essays of the needle tests.

    Args:
        count: number of passages.
        words: words of a passage, at least.
    """
    sentences = [" ".join(text.split()) for text in re.split(r"(?<=[.!?])\s", essays())]
    plain = [text for text in sentences if re.fullmatch(r"[A-Z][A-Za-z',;\- ]+[.!?]", text) and len(text.split()) > 5]
    found = []
    for number in range(count):
        chosen, start = "", number * (len(plain) // max(1, count))
        while len(chosen.split()) < words:
            chosen, start = f"{chosen} {plain[start % len(plain)]}".strip(), start + 1
        found.append(chosen)
    return found


def _recording() -> Tensor:
    target = cache_folder() / "recordings" / "nodejs-whisper-0.3.1.tgz"
    if not (target.is_file() and file_sha256(target) == _SHA256):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _run(["npm", "pack", _PACKAGE, "--silent", "--pack-destination", folder], "npm")
            came = next(Path(folder).glob("*.tgz"))
            if file_sha256(came) != _SHA256:
                raise DownloadError(f"{_PACKAGE}: the file that npm fetched has another hash than the one known")
            came.replace(target)
    with tarfile.open(target) as archive:
        member = archive.extractfile(_MEMBER)
        assert member is not None
        return _samples(member.read())


def _spoken(text: str, voice: str) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        _run(["flite", "-voice", voice, "-t", text, "-o", str(path)], "flite")
        return _samples(path.read_bytes())


def _run(command: list[str], package: str) -> None:
    if shutil.which(command[0]) is None:
        raise DownloadError(
            f"speech needs the program {command[0]!r}; install it (apt-get install {package}), or set clips: 1"
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise DownloadError(f"{command[0]} failed: {' '.join(done.stderr.split())[:300]}")


def _samples(content: bytes) -> Tensor:
    with wave.open(io.BytesIO(content)) as file:
        if file.getframerate() != RATE or file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise DownloadError(f"a recording has {file.getframerate()} Hz; it must be 16-bit mono of {RATE} Hz")
        return torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / np.float32(32768))
