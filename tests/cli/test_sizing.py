"""`wildcat-kv size`: a table of bytes, and one line when something is wrong."""

import re

import pytest
import torch

from tests.cli.test_cli import run
from tests.tiny import tiny_config, tiny_model
from wildcat_kv.cache.forecast import cache_size
from wildcat_kv.cli.figures import size_of
from wildcat_kv.recipes.presets import preset_names

SEVEN_B = ["--layers", "28", "--kv-heads", "4", "--head-dim", "128", "--heads", "28"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def rows_of(out):
    """Name, size and share of each row of the table."""
    table = out.split("\n\n")[0]
    return re.findall(r"^(\w[\w, ]*?)  .* ~?([\d.]+ [GM]iB) +([\d.]+) %", table, flags=re.MULTILINE)


def test_a_shape_is_computed_for_every_preset(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "size", *SEVEN_B)
    assert status == 0 and not err
    rows = rows_of(out)
    assert rows[0] == ("exact", "7.00 GiB", "100") and ("default, bytes_16", "1.01 GiB", "14.4") in rows
    assert {name for row in rows for name in row[0].split(", ")} == {"exact", *preset_names()}
    assert "Computed from shapes, without reading anything: 131,072 tokens, read at once." in out


def test_a_folder_is_computed_for_what_is_chosen(monkeypatch, capsys, tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    arguments = ["--tokens", "900", "--rows", "3", "--ratio", "0.1", "--method", "snapkv", "--dtype", "float16"]
    status, out, _ = run(monkeypatch, capsys, "size", tmp_path, *arguments)
    size = cache_size(tiny_config("gemma3"), 900, rows=3, dtype=torch.float16, ratio=0.1, compressor="snapkv")
    assert status == 0 and ("yours", size_of(size.nbytes), f"{size.share:.1%}"[:-1]) in rows_of(out)
    assert "900 tokens in each of 3 rows" in out and "all tokens in float16" in out


def test_what_is_not_counted_is_said(monkeypatch, capsys, tmp_path):
    tiny_model("qwen3_next").save_pretrained(tmp_path)
    _, out, _ = run(monkeypatch, capsys, "size", tmp_path, "--tokens", "9000")
    assert "Not counted, in any row: the states of layer 0 (LinearAttentionLayer)." in out
    assert "The model has 4,096 positions" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "28"], "--kv-heads, --head-dim missing: a shape by hand needs"),
        (["model", *SEVEN_B], "model='model' given beside a shape"),
        ([*SEVEN_B[:-1], "6"], "heads=6 must be a multiple of kv_heads=4"),
        ([*SEVEN_B, "--dtype", "int8"], "dtype='int8' must be"),
        ([*SEVEN_B, "--ratio", "2"], "ratio=2.0"),
        ([*SEVEN_B, "--max-bytes", "1KB"], "max_bytes=1000 is too small"),
        (["missing.gguf"], "missing.gguf: no such file"),
        (["no/such/model"], "no/such/model: no such folder, and not a hub id"),
    ],
)
def test_what_cannot_be_computed_is_one_line(monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, "size", *arguments)
    assert status == 1 and not out and message in err and err.count("\n") == 1
