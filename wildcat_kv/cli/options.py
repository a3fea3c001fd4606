"""What the commands have in common: options, and how they are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from wildcat_kv.compressors import resolve
from wildcat_kv.config import DROPPED, WildCatConfig
from wildcat_kv.models import load_model
from wildcat_kv.recipes.presets import load_preset

ModelOption = Annotated[
    str | None, typer.Option(help="Hub id, local folder or GGUF file. Default: SmolLM2-135M-Instruct, from PyPI.")
]
MethodOption = Annotated[
    str | None, typer.Option(help="How to compress, instead of the preset's; `wildcat-kv methods` lists the names.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="Settings by name, `wildcat-kv presets` lists them, or a YAML file. Default: the model's own."),
]
RatioOption = Annotated[float | None, typer.Option(help="Share of the tokens to keep, in (0, 1].")]
DropOption = Annotated[
    float | None,
    typer.Option("--compression-ratio", help="Share of the tokens to drop, in [0, 1), instead of a ratio."),
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Most tokens to store, instead of a ratio.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: cuda if there is one.")]
SeedOption = Annotated[int | None, typer.Option(help="Of the pivots; 0 unless the preset says otherwise.")]


def load(model: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ValueError: a dtype or device that cannot be used.
        ModelError: see `load_model`.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
    return load_model(model, getattr(torch, dtype), _device(device))


def chosen(preset: str | None, compressor: str | None, **fields: Any) -> dict[str, Any]:
    """What was given of these, for `Recipe.choose`; checked before a model is loaded.

    Raises:
        ValueError: no such preset or method, or a wrong setting.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if preset is None:  # the model's own section may begin with anything: what is wrong anyhow
        settings, method = WildCatConfig(ratio=1.0, sink=0, window=0, bin_rank=1), "wildcat"
    else:
        base = load_preset(preset)
        settings, method = base.settings, base.compressor
    resolve(compressor or method, settings.changed(**fields))
    return {"preset": preset, "compressor": compressor, **fields}


def share(ratio: float | None, compression_ratio: float | None) -> WildCatConfig:
    """Settings with the share that was given in either spelling; a quarter by default.

    Raises:
        ValueError: both are given, or one that is no share.
    """
    given = {"ratio": ratio, DROPPED: compression_ratio}
    return WildCatConfig(**({name: value for name, value in given.items() if value is not None} or {"ratio": 0.25}))


def read_text(path: Path, name: str) -> str:
    """The text of a file, or of standard input for "-"; `name` is the option's.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={str(path)!r} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{name}={str(path)!r} is empty; write a text into it")
    return text


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name
