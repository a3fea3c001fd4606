"""The command: what it prints, and one line when something is wrong."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import wildcat_kv
from tests.tiny import tiny_model
from tests.words import tokenizer, words
from wildcat_kv import CompressedContext, WildCatCache, cli, compress_context, preset_names
from wildcat_kv.cli import options
from wildcat_kv.cli.prompting import CommandCompleter, typed_lines
from wildcat_kv.compressors import available
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.recipes.presets import preset_schema


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of `wildcat-kv ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["wildcat-kv", *map(str, arguments)])
    capsys.readouterr()  # of what was prepared
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
        (["--max-tokens", "20"], "max_tokens=20 is too small for sink=4"),
        (["--preset", "nowhere.yaml"], "nowhere.yaml"),
        (["--preset", "publishd"], "did you mean 'published'?"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "abacus"], "device='abacus'"),
        (["--method", "nosuch"], "compressor='nosuch': no such method; there are auto, wildcat, streaming"),
        (["--method", "kvzip"], "call wildcat_kv.compress_context(model"),
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
        (["--model", "missing.gguf"], "missing.gguf: no such file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_a_failure(monkeypatch, capsys, prompt, arguments, message):
    status, out, err = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, *arguments)
    assert status == 1 and not out
    assert err.startswith("wildcat-kv: ") and message in err and err.count("\n") == 1


def test_no_arguments_are_answered_with_the_help(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys)
    assert status == 2 and "Usage: " in out and "generate" in out and not err


def test_the_version_is_shown(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"wildcat-kv {wildcat_kv.__version__}\n", "")


_WITHOUT_TORCH = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, "transformers" in sys.modules))
from wildcat_kv.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"], ["presets"]], ids=str)
def test_what_needs_no_model_does_not_wait_for_torch(arguments):
    command = [sys.executable, "-c", _WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 1 and done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--ratio", "0"], "ratio=0.0"),
        (["chat", "--context", "gone.txt", "--method", "snapkv"], "there is no such file"),
    ],
)
def test_mistakes_are_told_without_torch(arguments, message):
    command = [sys.executable, "-c", _WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and done.stdout == "False False\n"


def test_presets_are_completed_without_torch():
    environment = {**os.environ, "COMP_WORDS": "wildcat-kv demo --preset ", "COMP_CWORD": "3"}
    environment["_WILDCAT_KV_COMPLETE"] = "complete_bash"
    code = f"import sys; sys.argv = ['wildcat-kv']\n{_WITHOUT_TORCH}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [*preset_names(), "False", "False"]


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
    ("content", "message"),
    [(None, "there is no such file"), (b"  \n", "is empty"), (b"\xff\xfe", "is no UTF-8 text")],
)
def test_a_wrong_prompt_file_is_one_line(monkeypatch, capsys, tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    status, _, err = run(monkeypatch, capsys, "generate", "--prompt-file", path)
    assert status == 1 and "prompt.txt" in err and message in err and err.count("\n") == 1


def test_demo_refuses_a_wrong_ratio_before_loading_anything(monkeypatch, capsys):
    monkeypatch.setattr(options, "load", None)
    status, _, err = run(monkeypatch, capsys, "demo", "--ratio", "0")
    assert status == 1 and "ratio=0.0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--ratio", "abc"], "--ratio"),
        (["demo", "--preset", "balancd"], "did you mean 'balanced'?"),
        (["generate"], "--prompt-file"),
        (["chat"], "context is missing; give the document to talk about, such as --context report.txt"),
        (["nope"], "nope"),
    ],
)
def test_a_usage_error_is_one_line(monkeypatch, capsys, arguments, message):
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


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
def test_demo_shows_answers_and_figures(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run(monkeypatch, capsys, "demo", "--tokens", "500", "--max-new-tokens", "12")
    assert status == 0
    for text in (
        "500 tokens of essays hide 4 facts.",
        "What is the special magic number for Sanaa? (",
        "all in 4 bits all tokens, 4 bits",
        "default half of the tokens, 4 bits",
        "published a quarter of the tokens",
        " facts, in ",
        "in bfloat16 the exact cache would take",
        "weights are 4-bit (Q4_1), dequantised",
    ):
        assert text in " ".join(out.split())
    answers = re.findall(r"^ +([✓✗]) (exact|all in 4 bits|default|published) +(.*)$", out, flags=re.MULTILINE)
    assert len(answers) == 16
    captain = [(mark, "Maria Lund" in answer) for mark, _, answer in answers[8:12]]
    assert captain == [("✓" if found else "✗", found) for _, found in captain]


@pytest.mark.real
def test_the_demo_takes_every_method_and_says_when_it_fails(monkeypatch, capsys):
    for method, least, most in (("kvzip", 2, 4), ("streaming_llm", 0, 0)):
        arguments = ["--tokens", "500", "--max-new-tokens", "12", "--method", method, "--ratio", "0.25"]
        status, out, _ = run(monkeypatch, capsys, "demo", *arguments)
        found = re.search(rf"^{method}: (\d) of 4 facts, in \d+ % of", out, flags=re.MULTILINE)
        assert status == 0 and found and least <= int(found[1]) <= most


# The folder of a model, and what is done to it


@pytest.fixture
def folder(tmp_path):
    """A tiny model with its tokenizer."""
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_patched_and_taken_back(monkeypatch, capsys, folder):
    before = (folder / "config.json").read_bytes()
    status, out, err = run(monkeypatch, capsys, "patch", folder, "--preset", "published", "--ratio", "0.5")
    assert "Programs obey it if they call wildcat_kv.enable(model)" in out and not err
    section = json.loads((folder / "config.json").read_text())["wildcat_kv"]
    assert status == 0 and str(folder) in out and "ratio=0.5" in out
    assert (section["preset"], section["settings"]["ratio"]) == ("published", 0.5)
    status, out, _ = run(monkeypatch, capsys, "patch", folder, "--undo")
    assert status == 0 and "byte for byte as it was" in out
    assert (folder / "config.json").read_bytes() == before


def test_an_undo_of_a_file_that_has_changed_since_says_so(monkeypatch, capsys, folder):
    run(monkeypatch, capsys, "patch", folder, "--ratio", "0.5")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    status, out, _ = run(monkeypatch, capsys, "patch", folder, "--undo")
    assert status == 0 and "the section wildcat_kv is taken out" in out and "byte for byte" not in out
    assert json.loads(path.read_text())["new"] == 1 and "wildcat_kv" not in json.loads(path.read_text())


def test_a_preset_that_knows_no_layers_of_a_model_says_so_in_one_line(monkeypatch, capsys, folder):
    status, _, err = run(monkeypatch, capsys, "patch", folder, "--preset", "balanced")
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("wildcat-kv: preset='balanced' leaves layers exact that were found by measuring SmolLM2-135M")
    assert "for this model (llama) none are known" in err
    status, _, err = run(monkeypatch, capsys, "patch", folder, "--preset", "balanced", "--max-tokens", "100")
    assert status == 0 and not err  # which leaves no layers exact anyway


# Answers with a tiny model


def test_a_log_holds_no_blank_lines(monkeypatch, capsys, folder, prompt):
    prompt.write_text(words(200))
    arguments = ["--model", folder, "--max-new-tokens", "12", "--ratio", "0.5"]
    status, out, err = run(monkeypatch, capsys, "generate", "--prompt-file", prompt, *arguments)
    assert status == 0 and out.strip()
    assert len(err.splitlines()) == 2 and all(line.strip() for line in err.splitlines())


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (
            39,
            ["--ratio", "0.25"],
            "A short text: 10 of 39 tokens are kept, and of the 4 first and 32 last ones that should stay exact only "
            "1 and 6 do. Raise the ratio to keep more.",
        ),
        (39, ["--ratio", "0.25", "--preset", "small.yaml"], None),
        (
            39,
            ["--ratio", "0.25", "--min-tokens", "64"],
            "Nothing is compressed: min_tokens=64, and the text has 39 tokens.",
        ),
        (119, ["--ratio", "0.25", "--min-tokens", "76"], None),
        (39, ["--max-tokens", "100"], "Nothing is compressed: all 39 tokens fit into 100."),
        (119, ["--max-tokens", "100"], None),
        (39, ["--ratio", "1"], None),
    ],
)
def test_a_short_prompt_is_remarked_on(monkeypatch, capsys, folder, prompt, length, arguments, message):
    prompt.write_text(words(length))
    monkeypatch.chdir(prompt.parent)
    (prompt.parent / "small.yaml").write_text("settings: {ratio: 0.5, sink: 2, window: 2, bin_rank: 4}")
    fixed = ["generate", "--prompt-file", prompt, "--model", folder, "--max-new-tokens", "8", "--no-chat"]
    status, _, err = run(monkeypatch, capsys, *fixed, *arguments)
    assert status == 0 and [" ".join(line.split()) for line in err.splitlines()[2:]] == ([message] if message else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write; give a preset"),
        (["--preset", "balancd"], "no such preset"),
        (["--preset", "published", "--undo"], "preset='published' given beside undo"),
        (["--undo"], "is not patched"),
        (["--ratio", "3"], "ratio=3.0"),
        (["--ratio", "0.5", "--method", "kvzip"], "kvzip"),
    ],
)
def test_a_wrong_patch_changes_nothing(monkeypatch, capsys, folder, arguments, message):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, out, err = run(monkeypatch, capsys, "patch", folder, *arguments)
    assert status == 1 and not out and message in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_patch_over_a_patch_keeps_what_is_not_given(monkeypatch, capsys, folder, tmp_path):
    preset = tmp_path / "small.yaml"
    preset.write_text("settings: {ratio: 0.25, sink: 4, window: 4, bin_rank: 4}")
    run(monkeypatch, capsys, "patch", folder, "--preset", preset)
    status, _, err = run(monkeypatch, capsys, "patch", folder, "--max-tokens", "50")
    section = json.loads((folder / "config.json").read_text())["wildcat_kv"]
    assert status == 0 and not err
    assert (section["settings"]["max_tokens"], section["settings"]["sink"]) == (50, 4)


def test_a_patch_needs_a_model(monkeypatch, capsys, tmp_path):
    status, _, err = run(monkeypatch, capsys, "patch", tmp_path, "--preset", "published")
    assert status == 1 and "has no config.json" in err and not list(tmp_path.iterdir())


def test_a_folder_for_custom_generation_is_written(monkeypatch, capsys, tmp_path):
    status, out, _ = run(monkeypatch, capsys, "custom-generate", tmp_path / "recipe")
    assert status == 0 and "generate.py" in out
    assert (tmp_path / "recipe" / "custom_generate" / "generate.py").is_file()
    status, _, err = run(monkeypatch, capsys, "custom-generate", tmp_path / "recipe")
    assert status == 1 and "already" in err and err.count("\n") == 1


def test_presets_are_listed(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "presets")
    assert status == 0 and not err and preset_names()
    for name in preset_names():
        assert re.search(rf"^{name} ", out, flags=re.MULTILINE)
    status, out, _ = run(monkeypatch, capsys, "presets", "--schema")
    assert status == 0 and json.loads(out) == json.loads(json.dumps(preset_schema()))


# Saved contexts


def test_a_saved_context_is_shown_layer_by_layer(monkeypatch, capsys, tmp_path):
    model = tiny_model("gemma3")
    context = compress_context(model, tokenizer(), words(200), ratio=0.25, compressor="snapkv", sink=4, window=4)
    context.save(tmp_path / "context.safetensors")
    status, out, err = run(monkeypatch, capsys, "inspect", tmp_path / "context.safetensors")
    assert status == 0 and not err
    assert "gemma3_text" in out and "SnapKV(window=" in out and "ratio=0.25" in out and "201 tokens in 1 row" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"\d+ ", line)]
    assert len(rows) == len(context.cache.layers)
    for index, row in enumerate(rows):
        if row[1] == "compressed":
            assert row[2:4] == ["201", str(context.cache.stored_length(index))]
        else:
            assert row[1] == "window" and context.cache.layers[index].is_sliding
    assert "compressed" in out and "window" in out


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is no file"), (b"text", "no whole safetensors file"), ("stranger", "holds no")]
)
def test_what_is_no_context_is_one_line(monkeypatch, capsys, tmp_path, content, message):
    path = tmp_path / "context.safetensors"
    if content == "stranger":
        tiny_model("llama").save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(path)
    elif content is not None:
        path.write_bytes(content)
    status, out, err = run(monkeypatch, capsys, "inspect", path)
    assert status == 1 and not out and message in err and err.count("\n") == 1


# Chat


def chat(monkeypatch, capsys, folder, context, lines, *arguments):
    """Status, screen and stderr of a session in which these lines are typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setenv("COLUMNS", "200")
    fixed = ["--model", folder, "--context", context, "--max-new-tokens", "8"]
    return run(monkeypatch, capsys, "chat", *fixed, *arguments)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(words(150))
    return path


def test_a_chat_answers_remembers_and_accounts(monkeypatch, capsys, folder, document):
    model, words_tokenizer = tiny_model("llama"), tokenizer()
    context = compress_context(model, words_tokenizer, document, ratio=0.5)
    conversation = context.conversation()
    answers = [conversation.ask(question, max_new_tokens=8) for question in ("w5 w6", "w9")]
    status, out, _ = chat(monkeypatch, capsys, folder, document, ["w5 w6", "w9", "/new", "w5 w6"], "--ratio", "0.5")
    assert status == 0
    first, second = out.find(answers[0]), out.find(answers[1])
    assert 0 < first < second and out.count(answers[0]) == 2
    assert "151 tokens seen · 76 stored" in out and re.search(
        r"16\d tokens seen · \d+ stored · [\d.]+ MiB of [\d.]+ · [\d.]+ tok", out
    )


def test_a_chat_shows_what_the_model_writes(monkeypatch, capsys, folder, document):
    """Brackets, backslashes, colons: nothing of it is taken for markup."""

    def word(number):
        return f"[b]:warning:w{number}\\"

    odd = tokenizer(word=word)
    odd.save_pretrained(folder)
    document.write_text(" ".join(map(word, range(4, 104))))
    context = compress_context(tiny_model("llama"), odd, document, ratio=0.5)
    answer = context.ask(word(9), max_new_tokens=8)
    status, out, _ = chat(monkeypatch, capsys, folder, document, [word(9)], "--ratio", "0.5")
    assert status == 0 and ":warning:" in answer and answer in out


def test_a_document_is_saved_loaded_and_read_at_another_ratio(monkeypatch, capsys, folder, document, tmp_path):
    saved = tmp_path / "saved.safetensors"
    lines = ["/ratio 0.25", f"/save {saved}", "/ratio 0.9", f"/load {saved}", "w5", "/ratio 0.5", f"/load {document}"]
    status, out, _ = chat(monkeypatch, capsys, folder, document, lines, "--max-tokens", "120", "--method", "wildcat")
    assert status == 0 and saved.is_file()
    stored = re.findall(r"151 tokens seen · (\d+) stored", out)
    assert int(stored[0]) <= 120 and stored[1:] == ["38", "136", "38", "136"]
    assert "its text is not at hand" in out
    context = CompressedContext.load(saved, tiny_model("llama"), tokenizer())
    assert context.cache.settings.ratio == 0.25
    status, out, _ = chat(monkeypatch, capsys, folder, document, ["w5"], "--method", "kvzip", "--ratio", "0.5")
    assert status == 0 and out.count("tokens seen") == 2
    status, out, _ = chat(monkeypatch, capsys, folder, saved, ["w5"])
    assert status == 0 and context.ask("w5", max_new_tokens=8) in out


def test_another_ratio_keeps_the_bits(monkeypatch, capsys, folder, document, tmp_path):
    saved = tmp_path / "saved.safetensors"
    status, _, _ = chat(monkeypatch, capsys, folder, document, ["/ratio 0.25", f"/save {saved}"])
    settings = CompressedContext.load(saved, tiny_model("llama"), tokenizer()).cache.settings
    assert status == 0 and (settings.ratio, settings.bits) == (0.25, 4)


def test_commands_and_their_files_are_completed(tmp_path):
    (tmp_path / "report.txt").touch()
    completer = CommandCompleter(["/ratio", "/save", "/load"])

    def completed(text):
        return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]

    assert completed("/r") == ["/ratio"] and completed("/") == ["/ratio", "/save", "/load"]
    assert completed(f"/load {tmp_path}/rep") == ["ort.txt"] and not completed(f"/ratio {tmp_path}/rep")
    assert not completed("r") and not completed("What is /r")


def test_lines_of_a_terminal_are_edited(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    back, left = "\x7f", "\x02"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(f"first{back}{back}e{left}{left}{left}{left}a\r \r/new\r\x04never")
        assert list(typed_lines(["/new"])) == ["afire", "/new"]


def test_mistakes_in_a_chat_are_one_line_and_change_nothing(monkeypatch, capsys, folder, document, tmp_path):
    other = tmp_path / "other.safetensors"
    cache = WildCatCache((model := tiny_model("qwen3")).config, ratio=0.5)
    model(tokenizer()(words(60), return_tensors="pt").input_ids, **{CACHE: cache})
    cache.save(other)
    lines = ["/nosuch", "/ratio", "/ratio many", "/ratio 7", "/save", "/save text.txt", "/load", "/load gone.txt"]
    status, out, _ = chat(
        monkeypatch, capsys, folder, document, [*lines, f"/load {other}", "/help", "w5", "/quit", "w6"]
    )
    assert status == 0
    for message in (
        "/nosuch: no such command; there are /ratio",
        "give a ratio",
        "ratio='many' must be a number",
        "ratio=7.0",
        "give a file",
        "must end in .safetensors",
        "gone.txt': there is no such file",
        "is of another model",
        "forget the conversation",
    ):
        assert message in out
    assert out.count("tokens seen") == 2  # at the beginning, and after the only answer


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "context='.*': there is no such file"),
        (" \n", [], "context='.*' is empty"),
        ("w5", ["--ratio", "0"], "ratio=0.0"),
        ("w5", ["--method", "snapk"], "did you mean 'snapkv'"),
        ("w5", ["--preset", "nosuch"], "no such preset"),
    ],
)
def test_a_chat_that_cannot_begin_is_one_line(monkeypatch, capsys, tmp_path, content, arguments, message):
    monkeypatch.setattr(options, "load", None)
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_text(content)
    status, out, err = chat(monkeypatch, capsys, tmp_path, path, [], *arguments)
    assert status == 1 and not out and re.search(message, err) and err.count("\n") == 1
