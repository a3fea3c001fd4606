"""Runs of a model on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

# Puts methods into a model inside a `with` block, and gives the names of its replaced layers.
Use = Callable[..., AbstractContextManager[tuple[str, ...]]]
# Runs a model on one of the inputs.
Run = Callable[[Any, Any], Any]


def call(model: nn.Module, given: Any) -> Any:
    """Call a model with keywords (a mapping), arguments (a tuple), or one argument."""
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def check_runs(model: nn.Module, inputs: Any) -> list[Any]:
    """List the inputs, and refuse a model that is training.

    Args:
        model: the model to run.
        inputs: an iterable of inputs; a mapping or a tensor alone is one input.

    Raises:
        TypeError: the inputs are no iterable.
        ValueError: there is no input, or a module is in training mode.
    """
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"model={type(model).__name__}: {where} in training mode; call model.eval() first")
    if isinstance(inputs, (Mapping, Tensor)):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs={inputs!r} is no list of inputs; give one for each run")
    runs = list(inputs)
    if not runs:
        raise ValueError("inputs is empty; give at least one input to run the model on")
    return runs
