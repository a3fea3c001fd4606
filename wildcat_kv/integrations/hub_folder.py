"""`generate(custom_generate=...)`: the compressed cache as a recipe, and as a folder that Transformers loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
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

# Taken from the arguments of generate(), where `temperature` is another one: that of sampling.
_FIELDS = (*(name for name in WildCatConfig.model_fields if name != "temperature"), DROPPED)
_OURS = ("settings", "preset", "compressor", *_FIELDS)

_README = "README.md"
_FILES = {
    "custom_generate/generate.py": '''\
"""Generation with a compressed KV cache: see the README beside this folder. The code is in the package wildcat-kv."""

from wildcat_kv.integrations.hub_folder import generate

__all__ = ["generate"]
''',
    "custom_generate/requirements.txt": "wildcat-kv\n",
    _README: """\
---
library_name: transformers
license: apache-2.0
tags:
  - custom_generate
---

# WildCat: generation with a compressed KV cache

Models with full-attention layers generate with a cache that keeps a share of its tokens, as a weighted coreset
(WildCat, [arXiv 2602.10056](https://arxiv.org/abs/2602.10056)).

    pip install wildcat-kv

```python
out = model.generate(**inputs, custom_generate=REPO, trust_remote_code=True, ratio=0.25, max_new_tokens=100)
```

`REPO` is the name of this repository, or the path of this folder. Besides everything that `generate()` takes:

| argument | meaning |
| --- | --- |
| `ratio` or `max_tokens` | share of the tokens to keep, or most tokens to store in a layer |
| `compression_ratio` | share of the tokens to drop, instead of `ratio` |
| `preset` | settings by name, such as `"published"` |
| `compressor` | another method, such as `"snapkv"` |
| `sink`, `window`, `bin_rank`, `weights`, `exact_layers`, `seed` | as in `WildCatConfig` |

The same without trusting remote code: `custom_generate=wildcat_kv.wildcat_generate`.
""",
}

_OTHERWISE = (
    f"custom_generate makes a compressed cache, and generate() was told otherwise; leave out {CACHE}, "
    "cache_implementation and use_cache, or leave out custom_generate"
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _takes_ours(function: _Function) -> _Function:
    """Name our arguments in the signature of `function`: generate() hands on what it finds there."""
    signature = inspect.signature(function)
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _OURS]
    *first, rest = signature.parameters.values()
    function.__signature__ = signature.replace(parameters=[*first, *named, rest])  # type: ignore[attr-defined]
    return function


@_takes_ours
def wildcat_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    **arguments: Any,
) -> Any:
    """What `generate()` does, with a fresh compressed cache: a recipe for its `custom_generate`.

    Transformers hands functions neither a `streamer` nor an `assistant_model`, and says nothing: with those use
    `enable`, a cache of your own, or a folder made by `write_folder`.

    Args:
        model: a Transformers decoder.
        input_ids: int64 (rows, n).
        logits_processor: as `generate()` passes it, and so for the next two.
        stopping_criteria: likewise.
        generation_config: likewise.
        **arguments: `preset`, `compressor`, `settings` and fields of `WildCatConfig`, such as `ratio`, as for
            `enable`; but not `temperature`, which is the sampling's: give that one in `settings`. All others are
            `generate()`'s.

    Returns:
        What `generate()` returns.

    Raises:
        ValueError: a cache that was chosen otherwise, settings that do not fit, a way to decode that Transformers does
            not have itself, or a model that cannot be compressed.

    Example:
        model.generate(**inputs, custom_generate=wildcat_generate, ratio=0.25, max_new_tokens=100)
    """
    check_prompt(model)
    chosen = {name: arguments.pop(name) for name in _OURS if arguments.get(name) is not None}
    prepared = given_cache(arguments)
    without = generation_config.use_cache is False or generation_config.cache_implementation is not None
    if without or getattr(prepared, "_is_user_defined", False):
        raise ValueError(_OTHERWISE)
    mode = generation_config.get_generation_mode()
    decode = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if decode is None:  # the name of a repository
        raise ValueError(f"custom_generate: {mode.value} has left Transformers; decode in another way")
    cache = WildCatCache(model.config, **chosen)
    arguments = {name: value for name, value in arguments.items() if name not in (CACHE, OLD)}
    _, checked = with_read_check(
        model, cache, (), {"stopping_criteria": stopping_criteria, "generation_config": generation_config}
    )
    return decode(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=StoppingCriteriaList(checked["stopping_criteria"]),
        generation_config=generation_config,
        **{CACHE: cache},
        **arguments,
    )


def generate(*inputs: Any, model: Any, **arguments: Any) -> Any:
    """What a folder made by `write_folder` offers to Transformers.

    Args:
        *inputs: of `generate()`.
        model: a Transformers decoder.
        **arguments: of `generate()` and of `wildcat_generate`; None for what was not given.
    """
    check_prompt(model)
    given = {name: value for name, value in arguments.items() if value is not None}
    chosen = {name: given.pop(name) for name in _OURS if name in given}
    if chooses_a_cache(model, inputs, given):
        raise ValueError(_OTHERWISE)
    cache = WildCatCache(model.config, **chosen)
    inputs, given = with_read_check(model, cache, inputs, given)
    return type(model).generate(model, *inputs, **{CACHE: cache}, **given)


def write_folder(folder: str | Path) -> list[Path]:
    """Write a folder for `model.generate(custom_generate=folder, trust_remote_code=True)`, ready for the Hub.

    Args:
        folder: made if it is not there; may hold a model, whose README stays.

    Returns:
        The files written.

    Raises:
        ValueError: it has custom generation already.
        OSError: one cannot be written.
    """
    paths = {Path(folder) / name: text for name, text in _FILES.items()}
    if there := next((path for path in paths if path.exists() and path.name != _README), None):
        raise ValueError(
            f"folder={str(folder)!r} has custom_generate/{there.name} already; name another folder, or remove the file"
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; name a folder")
    paths = {path: text for path, text in paths.items() if not path.exists()}
    for path, text in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(paths)
