"""`generate(custom_generate=...)` with a compressed cache, by a function or by a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.read_check import with_read_check
from wildcat_kv.config import DROPPED, WildCatConfig
from wildcat_kv.files import replacing
from wildcat_kv.hook.keyword import CACHE, OLD, given_cache
from wildcat_kv.models.support import check_prompt
from wildcat_kv.recipes.recipe import chooses_a_cache

# Arguments that are taken out of those of generate(), where `temperature` is that of sampling.
_FIELDS = (*(name for name in WildCatConfig.model_fields if name != "temperature"), DROPPED)
_ARGUMENTS = ("settings", "preset", "compressor", *_FIELDS)

# Templates of `write_folder`: the files in hub-folder-files/, with the line that installs the package.
_TEMPLATES = files("wildcat_kv.integrations") / "hub-folder-files"
_README = "README.md"
_NAMES = ("custom_generate/generate.py", "custom_generate/requirements.txt", _README)

_OTHERWISE = (
    f"custom_generate makes a compressed cache, and generate() was told otherwise; leave out {CACHE}, "
    "cache_implementation and use_cache, or leave out custom_generate"
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _with_arguments(function: _Function) -> _Function:
    """Name the cache's arguments in a signature: generate() hands on what it finds there."""
    signature = inspect.signature(function)
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _ARGUMENTS]
    *first, rest = signature.parameters.values()
    function.__signature__ = signature.replace(parameters=[*first, *named, rest])  # type: ignore[attr-defined]
    return function


@_with_arguments
def wildcat_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    **arguments: Any,
) -> Any:
    """Generate with a fresh compressed cache; a function for `generate(custom_generate=...)`.

    Transformers hands such functions neither a `streamer` nor an `assistant_model`, and does not say so. With those use
    `enable`, a cache of your own, or a folder made by `write_folder`.

    Args:
        model: a Transformers decoder.
        input_ids: tokens of the prompts, int64 (rows, n).
        logits_processor: processors that `generate()` has prepared; so are the two below.
        stopping_criteria: criteria.
        generation_config: config.
        **arguments: `preset`, `compressor`, `settings` and fields of `WildCatConfig`, such as `ratio`, as for
            `enable`. `temperature` is the sampling's; give the cache's in `settings`. All others are `generate()`'s.

    Returns:
        The output of `generate()`.

    Raises:
        ValueError: another cache was chosen, or settings, decoding or model do not fit.

    Example:
        model.generate(**inputs, custom_generate=wildcat_generate, ratio=0.25, max_new_tokens=100)
    """
    check_prompt(model)
    chosen = {name: arguments.pop(name) for name in _ARGUMENTS if arguments.get(name) is not None}
    without = generation_config.use_cache is False or generation_config.cache_implementation is not None
    if without or getattr(given_cache(arguments), "_is_user_defined", False):
        raise ValueError(_OTHERWISE)
    decode = _decoding(model, generation_config)
    cache = WildCatCache(model.config, **chosen)
    arguments = {name: value for name, value in arguments.items() if name not in (CACHE, OLD)}
    given = {"stopping_criteria": stopping_criteria, "generation_config": generation_config}
    _, checked = with_read_check(model, cache, (), given)
    return decode(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=StoppingCriteriaList(checked["stopping_criteria"]),
        generation_config=generation_config,
        **{CACHE: cache},
        **arguments,
    )


def _decoding(model: Any, config: Any) -> Callable[..., Any]:
    """Find the method that decodes as a generation config says.

    It may decode greedily, by beams and so on.
    """
    mode = config.get_generation_mode()
    decode = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if decode is None:  # the name of a repository
        raise ValueError(f"custom_generate: {mode.value} has left Transformers; decode in another way")
    return decode


def generate(*inputs: Any, model: Any, **arguments: Any) -> Any:
    """Generate with a fresh compressed cache; Transformers finds this in folders of `write_folder`.

    Args:
        *inputs: positional arguments of `generate()`.
        model: a Transformers decoder.
        **arguments: arguments of `generate()` and of `wildcat_generate`; None for those not given.

    Returns:
        The output of `generate()`.

    Raises:
        ValueError: a cache that was chosen otherwise, settings that do not fit, or a model that cannot be compressed.
    """
    check_prompt(model)
    given = {name: value for name, value in arguments.items() if value is not None}
    chosen = {name: given.pop(name) for name in _ARGUMENTS if name in given}
    if chooses_a_cache(model, inputs, given):
        raise ValueError(_OTHERWISE)
    cache = WildCatCache(model.config, **chosen)
    inputs, given = with_read_check(model, cache, inputs, given)
    return type(model).generate(model, *inputs, **{CACHE: cache}, **given)


def write_folder(folder: str | Path, install_from: str | Path | None = None) -> list[Path]:
    """Write a folder for `generate(custom_generate=folder, trust_remote_code=True)`.

    Args:
        folder: the folder, made if it is not there; may hold a model, whose README stays.
        install_from: wheel of the package, which is copied into the folder, or a URL that pip takes, such as
            "git+https://..."; the folder's files say so. None where readers know the repository: the package is on no
            index.

    Returns:
        The files written. They can be pushed to the Hub.

    Raises:
        ValueError: a folder that has custom generation already, a file in its place, or no wheel of the package.
        OSError: a file that cannot be written.
    """
    folder = Path(folder)
    wheel, where, install = _installation(install_from)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; name a folder")
    there = [name for name in _NAMES if (folder / name).exists()]
    if there and there != [_README]:
        raise ValueError(f"folder={str(folder)!r} has {there[0]} already; name another folder, or remove the file")
    contents = {}
    for name in _NAMES:
        if name not in there:
            text = Template(_TEMPLATES.joinpath(name).read_text(encoding="utf-8"))
            contents[folder / name] = text.substitute(where=where, install=install).encode()
    if wheel is not None:
        contents[folder / wheel.name] = wheel.read_bytes()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    return [*contents]


def _installation(source: str | Path | None) -> tuple[Path | None, str, str]:
    """Give the wheel to copy, if any, and where which command installs the package."""
    if source is None:
        return None, "It is on no package index. In a clone of its repository", "pip install ."
    if "://" in str(source):
        return None, "Install it", f"pip install 'wildcat-kv @ {source}'"
    wheel = Path(source)
    if not (wheel.is_file() and wheel.name.startswith("wildcat_kv-") and wheel.suffix == ".whl"):
        raise ValueError(
            f"install_from={str(source)!r} is no wheel of wildcat-kv; give the one that `make dist` builds, or a URL "
            "that pip takes, such as git+https://..."
        )
    return wheel, "Its wheel is in this folder. In the folder", f"pip install {wheel.name}"
