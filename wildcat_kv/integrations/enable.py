"""Compressed caches for code that calls `generate()` by itself: `enable`, `disable` and `patch_config`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn
from transformers import GenerationMixin
from typing_extensions import Self

from wildcat_kv.cache.blueprint import Blueprint
from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.read_check import with_read_check
from wildcat_kv.compressors import Compressor
from wildcat_kv.config import WildCatConfig
from wildcat_kv.hook.keyword import CACHE, OLD, given_argument
from wildcat_kv.hook.marks import fallback_of
from wildcat_kv.integrations.hub_folder import generate as folder_generate
from wildcat_kv.models.support import check_prompt, decoder_config, with_parts
from wildcat_kv.recipes.presets import Preset
from wildcat_kv.recipes.recipe import SECTION, Recipe, chooses_a_cache

# Attributes of an enabled model.
_STATE = "_wildcat_kv"
_GENERATE = "generate"


class _RunningCalls:
    """A count of the running calls of `generate()`, in any thread.

    A copy of the model has its own.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.disabled = False

    def __reduce__(self) -> tuple[type[_RunningCalls], tuple[()]]:
        return _RunningCalls, ()


@dataclass(frozen=True, eq=False)
class _Enabled:
    """State that an enabled model carries.

    Attributes:
        recipe: the method and settings of its caches.
        generate: the `generate` that compresses.
        replaced: the `generate` that the model had beside its class's; None for none.
        attention: configs whose attention a cache switches, each with the implementation that it had.
        _calls: the calls of `generate()` under way.
    """

    recipe: Recipe
    generate: Any
    replaced: Any
    attention: list[tuple[Any, Any]]
    _calls: _RunningCalls = field(default_factory=_RunningCalls)

    @contextmanager
    def call(self, model: Any, streamer: Any) -> Iterator[None]:
        """Count one call of `generate()`.

        It keeps its attention if the model is disabled meanwhile.

        Args:
            model: the enabled model.
            streamer: the caller's streamer, or None. A call that fails ends it, since its reader waits for the end.
        """
        with self._calls.lock:
            self._calls.running += 1
        try:
            yield
        except BaseException:
            if streamer is not None:
                streamer.end()
            raise
        finally:
            with self._calls.lock:
                self._calls.running -= 1
                last = self._calls.disabled and not self._calls.running
            if last:
                self._give_back(model)

    def end(self, model: Any) -> None:
        """Give the configs their attention back once the running calls have ended."""
        with self._calls.lock:
            self._calls.disabled = True
            idle = not self._calls.running
        if idle:
            self._give_back(model)

    def _give_back(self, model: Any) -> None:
        if _STATE in vars(model):  # enabled again meanwhile
            return
        for config, before in self.attention:
            config._attn_implementation_internal = _attention_before(config._attn_implementation, before)


class Handle:
    """Handle of an enabled model, as a context manager.

    Leaving its `with` block, or `disable()`, makes the model what it was.

    Attributes:
        model: the model whose `generate()` compresses; without its wrappers, if it has some.
        recipe: the method and settings of its caches, `recipe.compressor` and `recipe.settings`.
    """

    def __init__(self, model: Any, state: _Enabled) -> None:
        self.model = model
        self.recipe = state.recipe
        self._state = state

    def disable(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if vars(self.model).get(_STATE) is self._state:
            disable(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = "enabled" if vars(self.model).get(_STATE) is self._state else "disabled"
        return f"Handle({type(self.model).__name__}, {state}, {self.recipe.compressor!r}, {self.recipe.settings!r})"


def enable(
    model: Any,
    settings: WildCatConfig | None = None,
    *,
    preset: str | Path | Preset | None = None,
    compressor: str | Compressor | None = None,
    **fields: Any,
) -> Handle:
    """Give each `generate()` call a fresh compressed cache, unless it brings one.

    These calls are left alone: a call that names a cache by `cache` or `cache_implementation`, one that wants none
    (`use_cache=False`), one that brings `custom_generate`, and the calls of an assistant, whose guesses are taken back.

    Works with pipelines, with models dispatched by accelerate, and with PEFT adapters, put on before or after. A copy
    of the model, or a pickled one, is enabled by itself.

    Args:
        model: a Transformers decoder; or one wrapped by PEFT or for data parallelism.
        settings: the caches' settings; or:
        preset: a preset's name, file or object; by default the section that `patch_config` wrote into the model's
            config, or "default" where there is none.
        compressor: the method, by name or as an object, instead of the preset's.
        **fields: fields of `WildCatConfig`, such as ratio=0.25, instead of the preset's.

    Returns:
        A handle, which is a context manager.

    Raises:
        TypeError: no model with `generate()`.
        ValueError: a model that is enabled already, is compiled or cannot be compressed; settings, or a section of the
            config, that do not fit. The model is left as it was.

    Example:
        with wildcat_kv.enable(model, ratio=0.25):
            pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt)
    """
    inner = _innermost(model) if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        check_prompt(model, model)
    _check_model(inner)
    recipe = Recipe.choose(inner.config, settings, preset=preset, compressor=compressor, **fields)
    Blueprint.of(inner.config, recipe.settings, recipe.compressor)
    switched = with_parts(decoder_config(inner.config))
    attention = [(config, config._attn_implementation) for config in switched]
    generate = functools.partial(_generate_compressed, inner)  # no closure: copies of the model have their own
    state = _Enabled(recipe, generate, vars(inner).get(_GENERATE), attention)
    if vars(inner).setdefault(_STATE, state) is not state:  # by another thread, since it was checked
        _check_disabled(inner)
    setattr(inner, _GENERATE, generate)
    return Handle(inner, state)


def disable(model: Any) -> None:
    """Make an enabled model what it was before, its config included.

    Args:
        model: the model that was given to `enable`.

    Raises:
        ValueError: a model that is not enabled.
    """
    inner = _innermost(model) if isinstance(model, nn.Module) else model
    state = getattr(inner, "__dict__", {}).get(_STATE)
    if state is None:
        raise ValueError(f"model={type(inner).__name__} is not enabled; there is nothing to disable")
    delattr(inner, _STATE)
    if vars(inner).get(_GENERATE) is state.generate:  # not what others put around it since
        delattr(inner, _GENERATE)
        if state.replaced is not None:
            setattr(inner, _GENERATE, state.replaced)
    state.end(inner)


def patch_config(
    config: Any,
    settings: WildCatConfig | None = None,
    *,
    preset: str | Path | Preset | None = None,
    compressor: str | Compressor | None = None,
    **fields: Any,
) -> None:
    """Write settings of the cache into a model's config, for `enable`.

    The section goes where the config goes, `save_pretrained` and `from_pretrained` included. Fields change a section
    that is there already; a preset or settings replace it.

    **The section alone does nothing.** Transformers does not know it: a program that loads the model runs with the
    exact cache, and does not say so, until it calls `wildcat_kv.enable(model)`. `custom_generate`, `compress_context`,
    and a `WildCatCache` that is given no budget, obey the section too.

    Args:
        config: a Transformers config, such as `model.config`.
        settings: the cache's settings; or:
        preset: a preset's name, file or object.
        compressor: the method's name, instead of the preset's; or a `QueryWildCat` with a profile of the model.
        **fields: fields of `WildCatConfig`, such as ratio=0.25, instead of the preset's.

    Raises:
        TypeError: config is no Transformers config.
        ValueError: a model that cannot be compressed, or settings that do not fit. The config is left as it was.

    Example:
        wildcat_kv.patch_config(model.config, preset="balanced")
        model.save_pretrained("compressed")
        # in another program
        model = AutoModelForCausalLM.from_pretrained("compressed")
        wildcat_kv.enable(model)
    """
    recipe = Recipe.choose(config, settings, preset=preset, compressor=compressor, **fields)
    section = recipe.section()
    Blueprint.of(config, recipe.settings, recipe.compressor)
    setattr(config, SECTION, section)


@functools.wraps(GenerationMixin.generate, assigned=("__doc__",))  # its name is its own: models are pickled with it
def _generate_compressed(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with a fresh compressed cache, unless the call chooses its own."""
    state: _Enabled | None = vars(model).get(_STATE)
    if state is None:  # disabled, and called by what others put around it
        return type(model).generate(model, *args, **kwargs)
    replaced = state.replaced
    with state.call(model, given_argument("streamer", args, kwargs)):
        if kwargs.get("custom_generate") is None and not chooses_a_cache(model, args, kwargs):
            check_prompt(model)
            _check_state(model)
            cache = WildCatCache(model.config, state.recipe.settings, compressor=state.recipe.compressor)
            args, kwargs = with_read_check(model, cache, args, kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name != OLD} | {CACHE: cache}
            if getattr(replaced, "func", None) is folder_generate:  # which would make a cache too
                replaced = None
        return replaced(*args, **kwargs) if replaced is not None else type(model).generate(model, *args, **kwargs)


def _attention_before(current: Any, before: Any) -> Any:
    """Return the implementation that a config had before, unless another was chosen since."""
    fallback = fallback_of(current)
    if fallback is None:
        return current
    was = fallback_of(before) or before or "eager"
    return before if fallback == was else fallback


def _innermost(model: Any) -> Any:
    """Return the Transformers model inside wrappers of accelerate, torch and PEFT."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _check_model(model: Any) -> None:
    """Refuse what cannot be enabled: no `generate()`, or an unfit state."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not all(hasattr(model, part) for part in (_GENERATE, "generation_config")):
        raise TypeError(
            f"model={name} is no Transformers model with generate(); give one, such as AutoModelForCausalLM's"
        )
    _check_disabled(model)
    _check_state(model)
    if getattr(model.generation_config, "use_cache", None) is False:
        raise ValueError(
            "model.generation_config.use_cache=False asks for no cache in every generate(); set it to True"
        )
    if (implementation := getattr(model.generation_config, "cache_implementation", None)) is not None:
        raise ValueError(
            f"model.generation_config.cache_implementation={implementation!r} asks for another cache in every "
            "generate(); set it to None"
        )


def _check_disabled(model: Any) -> None:
    """Refuse a model that is enabled."""
    if (state := vars(model).get(_STATE)) is not None:
        raise ValueError(
            f"model={type(model).__name__} is enabled already, with {state.recipe.compressor!r} and "
            f"{state.recipe.settings!r}; call wildcat_kv.disable(model) first"
        )


def _check_state(model: Any) -> None:
    """Refuse a compiled model, or one without a cache in training.

    A model that is compiled even in part is refused.
    """
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} is in training mode with gradient checkpointing, and uses no cache then; "
            "call model.eval() first"
        )
    if any(map(_is_compiled, model.modules())):
        raise ValueError(
            f"model={type(model).__name__} is compiled, and what a growing cache does cannot be traced; take one that "
            "is not, or pass WildCatCache(model.config, max_tokens=..., static=True) to generate() yourself"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled: `.compile()`, `torch.compile(module)` or a compiled `.forward`."""
    forward = vars(module).get("forward")
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or is_compiled_module(module)
        or hasattr(forward, "_torchdynamo_orig_callable")
    )
