"""Texts and names that users give: what is said of wrong ones."""

import io
from pathlib import Path

import pytest

from wildcat_kv.files import read_text, replacing
from wildcat_kv.validation import did_you_mean, plain


def test_a_text_is_read_from_a_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("Grüße", encoding="utf-8")
    assert read_text(tmp_path / "text.txt", "context") == "Grüße"
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert read_text(Path("-"), "context", stdin=True) == "piped"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^context='-': there is no such file"):
        read_text(Path("-"), "context")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xe4\xff", "is no UTF-8 text: .*; save it as UTF-8"), (b" \n", "is empty; write a text into it")],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^prompt='.*text.txt' {message}"):
        read_text(tmp_path / "text.txt", "prompt")


def test_a_missing_file_is_no_matter_of_encoding(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt': there is no such file; check the path") as error:
        read_text(tmp_path / "nowhere.txt", "prompt")
    assert "UTF" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(tmp_path, "prompt")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyError), replacing(target) as partial:
        partial.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with replacing(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("snapk", "did you mean 'snapkv'? "),
        ("SNAPKV", "did you mean 'snapkv'? "),
        ("keydif", "did you mean 'KeyDiff'? "),
        ("zzz", ""),
    ],
)
def test_the_nearest_name_is_named(name, hint):
    assert did_you_mean(name, ["wildcat", "snapkv", "KeyDiff"]) == hint


def test_plain_values_are_those_that_json_gives_back():
    given = {"sizes": (1, 2), 3: None, "scale": 0.5, "on": True, "kind": Path("x")}
    assert plain(given) == {"sizes": [1, 2], "3": None, "scale": 0.5, "on": True, "kind": "x"}
    assert plain(object).startswith("<class")
