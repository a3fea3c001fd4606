"""Read in a family's modeling file how its attention treats a cache.

Compressed layers need that keys and values go from the cache to an attention function as they are, and the mask that
the model made with them. Families come and go with every version of Transformers; what their files do is there to read.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Cache
from transformers.masking_utils import create_causal_mask

INSTEAD = "use DynamicCache(config=model.config) for this model"
OWN_CACHE = "give this model no cache, and it makes its own"
_OWN_WAY = "its modeling file attends in a way of its own (ALiBi, for example), out of reach of attention functions"


@dataclass(frozen=True)
class Finding:
    """Says what an attention class does that a compressed cache cannot follow.

    Attributes:
        reason: reason in plain words.
        switch: the field of the config that turns it on; empty if it is always on.
    """

    reason: str
    switch: str = ""


def unfit_attention(config: Any) -> str | None:
    """Say why the attention of this config's family cannot be followed.

    Args:
        config: the decoder's config.

    Returns:
        The reason, and what to use instead; None if nothing speaks against it, or without a modeling file to read.
    """
    module = modeling_module(type(config))
    if module is None:
        return None
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return f"{_OWN_WAY}; {INSTEAD}"
    if not any(getattr(value, "__module__", None) == create_causal_mask.__module__ for value in vars(module).values()):
        return f"its model makes its masks by itself, out of reach of mask functions; {INSTEAD}"
    for name, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, Cache) and value.__module__ == module.__name__:
            return f"its model takes no cache but its own {name}; {OWN_CACHE}"
    if getattr(config, "is_decoder", True) is False and hasattr(module, "create_bidirectional_mask"):
        return (
            "is_decoder=False makes it an encoder, whose tokens see later ones; set it to True for a model that writes"
        )
    for finding in _findings(module.__name__):
        if not finding.switch or getattr(config, finding.switch, False):
            return f"{finding.reason}; {INSTEAD}"
    return None


def modeling_module(config: type) -> Any:
    """Find the module with a config class's models; None without one."""
    name = config.__module__.replace("configuration_", "modeling_")
    if name != config.__module__:
        if name in sys.modules:
            return sys.modules[name]
        if name.startswith("transformers.models."):
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:  # an optional dependency: its absence shows when the model is built
                    return None
            except ImportError:
                return None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):  # a config alone, of another family's models
        if config in auto._model_mapping:
            return sys.modules[auto._model_mapping[config].__module__]
    return None


@functools.cache
def _findings(module: str) -> tuple[Finding, ...]:
    """Find what a module's attention does that cannot be followed."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError):  # no source at hand
        return ()
    found = [finding for node in ast.walk(tree) for finding in _of_statement(node)]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and "Cross" not in node.name]
    functions = [item for node in classes for item in node.body if isinstance(item, ast.FunctionDef)]
    caching = [function for function in functions if any(map(_is_update, ast.walk(function)))]
    # A file may hold attention of other kinds too, of an encoder for example.
    if caching and not any(map(_calls, caching)):
        found.append(Finding(_OWN_WAY))
    return (*found, *(finding for function in caching for finding in _of_function(function)))


def _of_statement(node: ast.AST) -> Iterator[Finding]:
    """Find a model that adds layers to the cache it was given."""
    target = node.target if isinstance(node, ast.AugAssign) else None
    if isinstance(target, ast.Attribute) and target.attr == "layers" and _is_cache(target.value):
        yield Finding("its model runs layers again in a pass and adds copies of them to the cache")


def _of_function(function: ast.FunctionDef) -> Iterator[Finding]:
    """Find what a method does with keys and values from a cache."""
    updates = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and _is_update(node.value)]
    if not updates:  # the result is taken apart at once, in a way that is not read here
        return
    kept = {name for update in updates for name in _targets(update)}
    for call in _calls(function):
        given = dict(zip(("key", "value", "attention_mask"), map(_name, call.args[2:5]), strict=False))
        given |= {keyword.arg: _name(keyword.value) for keyword in call.keywords if keyword.arg}
        if not {given.get("key"), given.get("value")} <= kept:
            yield Finding("its attention takes other keys or values than the cache gives back")
        parameters = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        if given.get("attention_mask") not in parameters:
            yield Finding("its attention makes a mask of its own")
        first = min(update.lineno for update in updates)
        for node, switch in _unguarded(function.body):
            if first < node.lineno < call.lineno and not _is_update(node.value) and kept & set(_targets(node)):
                yield Finding("its attention changes keys or values after the cache gives them back", switch)


def _unguarded(body: list[ast.stmt], switch: str = "") -> Iterator[tuple[ast.Assign, str]]:
    """Yield assignments, each with the config's field that it depends on."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield node, switch
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Attribute) and _name(node.test.value) == "self":
            yield from _unguarded(node.body, node.test.attr)


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    """List the calls of Transformers' attention functions."""
    names = _attends(function)
    return [node for node in ast.walk(function) if isinstance(node, ast.Call) and _name(node.func) in names]


def _attends(function: ast.FunctionDef) -> set[str]:
    """Collect names that stand for an attention function of Transformers'."""
    return {
        name
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if any(isinstance(part, ast.Name) and part.id == "ALL_ATTENTION_FUNCTIONS" for part in ast.walk(node.value))
        for name in _targets(node)
    }


def _is_update(node: ast.AST) -> bool:
    """Tell whether this is `cache.update(keys, values, layer_idx)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and _is_cache(node.func.value)
        and len(node.args) > 2
    )


def _is_cache(node: ast.AST) -> bool:
    name = _name(node) or ""
    return "cache" in name or "past" in name


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    items = (item for target in targets for item in (target.elts if isinstance(target, ast.Tuple) else [target]))
    return [name for item in items if (name := _name(item)) is not None]


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None
