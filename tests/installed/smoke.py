"""Try an installed wildcat_kv, outside of its repository: python -I smoke.py.

It needs what the package requires and no more, and stops at the first thing that fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import entry_points, metadata, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import wildcat_kv
from wildcat_kv import CompressedContext, WildCatCache, compress_context, enable

COMMAND = Path(sys.executable).parent / "wildcat-kv"
WORDS = [f"word{number}" for number in range(200)]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def tiny_model() -> LlamaForCausalLM:
    """Make a random Llama with two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows `WORDS`."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def command(*arguments: str, status: int = 0) -> str:
    """Run `wildcat-kv ARGUMENTS` and return what it printed."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, (arguments, done.returncode, done.stderr)
    return done.stdout + done.stderr


def check_install() -> None:
    """The package is the installed one, with its data, and type checkers may read it."""
    home = Path(wildcat_kv.__file__).parent
    assert home.is_relative_to(sys.prefix), home
    assert wildcat_kv.__version__ == version("wildcat-kv")
    assert (home / "py.typed").is_file() and metadata("wildcat-kv")["License-Expression"] == "Apache-2.0"
    for name in ("profiles", "scorers"):
        assert any(files("wildcat_kv.compressors.query_wildcat").joinpath(name).iterdir()), name


def check_cache(model: Any, ids: torch.Tensor, folder: Path) -> None:
    """Compressed caches generate, by settings and by name; all of it in the cache gives the exact answer."""
    exact = model.generate(ids, cache=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(model.generate(ids, cache=WildCatCache(model.config, ratio=1.0), **GREEDY), exact)
    for name in ("default", "published", "bytes_9"):
        cache = WildCatCache(model.config, preset=name)
        assert model.generate(ids, cache=cache, **GREEDY).shape == exact.shape, name
    cache = WildCatCache(model.config, compressor="snapkv", ratio=0.25)
    model.generate(ids, cache=cache, **GREEDY)
    assert cache.stored_length() < 70 < cache.get_seq_length() == ids.shape[1] + 7
    with enable(model, ratio=0.25):
        assert model.generate(ids, **GREEDY).shape == exact.shape
    cache.save(folder / "cache.safetensors")
    assert "SnapKV" in command("inspect", str(folder / "cache.safetensors"))


def check_context(model: Any, tokenizer: Any, folder: Path) -> None:
    """A text is read once, answers, and answers the same after it was saved."""
    context = compress_context(model, tokenizer, " ".join(WORDS), ratio=0.5, bits=4)
    answer = context.ask("word3 word5", max_new_tokens=8)
    context.save(folder / "context.safetensors")
    again = CompressedContext.load(folder / "context.safetensors", model, tokenizer)
    assert again.ask("word3 word5", max_new_tokens=8) == answer


def check_commands(model: Any, tokenizer: Any, folder: Path) -> None:
    """The command lists, checks, generates and patches, and its help needs no more."""
    home = folder / "model"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    (folder / "prompt.txt").write_text(" ".join(WORDS), encoding="utf-8")
    assert command("--version") == f"wildcat-kv {wildcat_kv.__version__}\n"
    assert "generate" in command("--help")
    assert "query_wildcat" in command("methods")
    assert "bytes_9" in command("presets")
    command("check", str(home))
    generate = ("generate", "--model", str(home), "--prompt-file", str(folder / "prompt.txt"))
    assert command(*generate, "--ratio", "0.5", "--max-new-tokens", "4")
    before = (home / "config.json").read_bytes()
    command("patch", str(home), "--preset", "published")
    assert "wildcat_kv" in json.loads((home / "config.json").read_text(encoding="utf-8"))
    command("patch", str(home), "--undo")
    assert (home / "config.json").read_bytes() == before


def check_hub_folder(model: Any, ids: torch.Tensor, folder: Path) -> None:
    """The folder for the Hub generates, and its requirements are installed."""
    home = folder / "hub"
    command("custom-generate", str(home))
    output = model.generate(ids, custom_generate=str(home), trust_remote_code=True, ratio=0.25, **GREEDY)
    assert output.shape == (1, ids.shape[1] + 8)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "-r"]
    subprocess.run([*pip, home / "custom_generate" / "requirements.txt"], check=True, capture_output=True)


def check_plugins() -> None:
    """vLLM and lm-eval find what the package has for them."""
    (ours,) = entry_points(group="vllm.general_plugins", name="wildcat_kv")
    assert callable(ours.load())
    (ours,) = entry_points(group="lm_eval.models", name="wildcat")
    assert (Path(wildcat_kv.__file__).parents[1] / f"{ours.module.replace('.', '/')}.py").is_file()


def check_missing_extras(folder: Path) -> None:
    """A missing extra is one line, and pip can obey it."""
    for extra, name in {"demo": "check", "chat": "chat", "eval": "lm-eval"}.items():
        assert f"pip install 'wildcat-kv[{extra}]'" in command(name, status=1), extra
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "wildcat-kv[chat,demo]"]
    done = subprocess.run(pip, check=True, capture_output=True, text=True, cwd=folder)
    assert "prompt_toolkit" in done.stdout and "gguf" in done.stdout and "Would install wildcat" not in done.stdout


def run(checks: Iterable[tuple[Any, tuple[Any, ...]]]) -> None:
    """Run checks, each with its arguments, and print what each has found right."""
    for check, arguments in checks:
        check(*arguments)
        print(f"ok: {check.__doc__}")


def main() -> None:
    """Run all checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "WILDCAT_KV_CACHE": str(folder / "kept")}
        model, tokenizer = tiny_model(), tiny_tokenizer()
        ids = torch.randint(3, 203, (1, 200))
        run(
            [
                (check_install, ()),
                (check_cache, (model, ids, folder)),
                (check_context, (model, tokenizer, folder)),
                (check_commands, (model, tokenizer, folder)),
                (check_hub_folder, (model, ids, folder)),
                (check_plugins, ()),
                (check_missing_extras, (folder,)),
            ]
        )


if __name__ == "__main__":
    main()
