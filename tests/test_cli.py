"""The command: what it prints, and one line when something is wrong."""

import sys

import pytest

from wildcat_kv import cli
from wildcat_kv.compressors import available


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of `wildcat-kv ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["wildcat-kv", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("The capital of France is")
    return path


@pytest.fixture
def damaged_gguf(tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio=1.5"),
        (["--ratio", "0.5", "--max-tokens", "100"], "both of them given"),
        (["--max-tokens", "20"], "max_tokens=20 is too small for sink=32"),
        (["--preset", "nowhere.yaml"], "nowhere.yaml"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "abacus"], "device='abacus'"),
        (["--method", "nosuch"], "compressor='nosuch': no such method; there are wildcat, streaming_llm"),
        (["--method", "kvzip"], "call wildcat_kv.compress_context(model"),
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
        (["--model", "missing.gguf"], "missing.gguf: no such file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_a_failure(monkeypatch, capsys, prompt, arguments, message):
    status, out, err = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, *arguments)
    assert status == 1 and not out
    assert err.startswith("wildcat-kv: ") and message in err and err.count("\n") == 1


def test_all_methods_are_listed(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "methods")
    assert status == 0 and not err
    for method in available():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{method.name} ")]
        assert method.paper.removeprefix("arXiv ") in line
        assert line.split()[-2:] == ["yes" if has else "no" for has in (method.needs_queries, method.decodes)]


def test_a_damaged_model_is_one_line(monkeypatch, capsys, prompt, damaged_gguf):
    status, _, err = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, "--model", damaged_gguf)
    assert status == 1 and "damaged.gguf: cannot be loaded" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"  \n", "is empty"), (b"\xff\xfe", "UTF-8")]
)
def test_a_wrong_prompt_file_is_one_line(monkeypatch, capsys, tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    status, _, err = run(monkeypatch, capsys, "generate", "--prompt-file", path)
    assert status == 1 and "prompt.txt" in err and message in err and err.count("\n") == 1


def test_demo_refuses_a_wrong_ratio_before_loading_anything(monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_model", None)
    status, _, err = run(monkeypatch, capsys, "demo", "--ratio", "0")
    assert status == 1 and "ratio=0.0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["demo", "--ratio", "abc"], "--ratio"), (["generate"], "--prompt-file"), (["nope"], "nope")],
)
def test_a_usage_error_is_one_line(monkeypatch, capsys, arguments, message):
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


def test_a_preset_keeps_its_seed_unless_told_otherwise(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("ratio: 0.5\nseed: 7")
    assert cli._settings(preset, None, None, None).seed == 7
    assert cli._settings(preset, None, 400, 3).model_dump(include={"seed", "ratio", "max_tokens"}) == {
        "seed": 3,
        "ratio": None,
        "max_tokens": 400,
    }


@pytest.mark.real
def test_generate_streams_the_answer_and_accounts_for_it(monkeypatch, capsys, prompt):
    status, out, err = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, "--ratio", "1")
    assert status == 0 and "Paris" in out
    assert "tokens seen" in err and "stored" in err and "MiB" in err


@pytest.mark.real
def test_generate_takes_a_preset_and_plain_text(monkeypatch, capsys, prompt):
    arguments = ["--preset", "configs/published.yaml", "--max-tokens", "200", "--no-chat", "--max-new-tokens", "6"]
    status, out, _ = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, *arguments)
    assert status == 0 and "Paris" in out


@pytest.mark.real
def test_demo_prints_one_table(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "demo", "--tokens", "600", "--max-new-tokens", "12")
    assert status == 0
    for word in (
        "exact",
        "WildCat 25%",
        "special magic number",
        "tokens stored",
        "cache, MiB",
        "prefill",
        "per second",
    ):
        assert word in out
