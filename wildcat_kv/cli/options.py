"""Options that several subcommands have, and how they are read. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wildcat_kv.config import DROPPED, WildCatConfig
from wildcat_kv.recipes.presets import load_preset, preset_names

_MODEL = (
    "Hub id, local folder, GGUF file, or a model from PyPI: SmolLM2-135M-Instruct (default), "
    "Qwen2.5-Coder-0.5B-Instruct."
)
ModelOption = Annotated[str | None, typer.Option(help=_MODEL)]
ModelArgument = Annotated[str | None, typer.Argument(help=_MODEL)]
MethodOption = Annotated[
    str | None, typer.Option(help="How to compress, instead of the preset's; `wildcat-kv methods` lists the names.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="Settings by name, `wildcat-kv presets` lists them, or a YAML file. Without it: those in the model's "
        "config, or else the ratio or limit given, or else the preset `default`.",
        autocompletion=preset_names,
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(help="Share of the tokens to keep, in (0, 1]. Without --bits or --preset they are not quantised."),
]
DropOption = Annotated[
    float | None,
    typer.Option("--compression-ratio", help="Share of the tokens to drop, in [0, 1), instead of a ratio."),
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Most tokens to store, instead of a ratio.")]
MinTokensOption = Annotated[
    int | None, typer.Option(help="Tokens that a ratio always keeps; shorter texts stay exact.")
]
MaxBytesOption = Annotated[
    str | None, typer.Option(help="Most bytes of the whole cache, such as 2GiB, instead of a ratio.")
]
BitsOption = Annotated[int | None, typer.Option(help="Bits of a number in the cache: 8, 4, 3 or 2.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: cuda if there is one.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the pivots; 0 unless the preset says otherwise.")]


def load(model: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        model: hub id, folder or GGUF file; None for the default model.
        dtype: "float32", "bfloat16" or "float16".
        device: the name of a device; None for cuda if there is one.

    Raises:
        ValueError: a dtype or device that cannot be used.
        ModelError: a model that cannot be loaded; see `load_model`.
    """
    chosen_dtype = dtype_of(dtype)
    from wildcat_kv.models import load_model

    return load_model(model, chosen_dtype, _device(device))


def dtype_of(name: str | None) -> Any:
    """Find a dtype of torch by its name; None stays.

    Raises:
        ValueError: another name than float32, bfloat16 and float16.
    """
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r} must be float32, bfloat16 or float16")
    import torch

    return None if name is None else getattr(torch, name)


def chosen(preset: str | None, compressor: str | None, *, of_text: bool = False, **fields: Any) -> dict[str, Any]:
    """Check what was given before a model is loaded.

    Args:
        preset: a preset's name or file; None for the model's own settings.
        compressor: a method's name; None for the preset's.
        of_text: True if a text is read by itself, before the questions. Some methods can do only that.
        **fields: fields of `WildCatConfig`; None for those not given.

    Returns:
        Keyword arguments of `Recipe.choose` and `compress_context`.

    Raises:
        ValueError: no such preset or method, or a wrong setting.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if preset is None:  # the model's own section may begin with anything: what is wrong anyhow
        settings, method = WildCatConfig(ratio=1.0, sink=0, window=0, bin_rank=1), compressor
    else:
        base = load_preset(preset)
        settings, method = base.settings, compressor or base.compressor
    changed = settings.changed(**fields)
    if method is not None:
        from wildcat_kv.compressors.registry import AUTO, reads_twice, resolve  # torch comes with it

        if method != AUTO and not (of_text and reads_twice(method)):
            resolve(method, changed)
    return {"preset": preset, "compressor": compressor, **fields}


def share(ratio: float | None, compression_ratio: float | None) -> WildCatConfig:
    """Make settings from a share in either spelling; a quarter by default.

    Args:
        ratio: share of the tokens to keep.
        compression_ratio: share of the tokens to drop.

    Raises:
        ValueError: both are given, or one that is no share.
    """
    given = {"ratio": ratio, DROPPED: compression_ratio}
    return WildCatConfig(**({name: value for name, value in given.items() if value is not None} or {"ratio": 0.25}))


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name
