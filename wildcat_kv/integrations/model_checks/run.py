"""Run the checks on a model, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from wildcat_kv.integrations.model_checks.checks import CHECKS, check_built
from wildcat_kv.integrations.model_checks.compare import FailedError, NotApplicableError, baseline, one_line
from wildcat_kv.integrations.model_checks.subject import Subject, forget_positions, make_subject
from wildcat_kv.models.support import with_parts

Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Result:
    """Result of one check.

    Attributes:
        name: the check's name, in plain words.
        status: "passed", "failed" or "not applicable".
        reason: why it failed or does not apply; empty if it passed, except where there is something to tell.
    """

    name: str
    status: Status
    reason: str = ""


def run_checks(model: Any, prompt: Mapping[str, Any] | None = None, *, seed: int = 0) -> Iterator[Result]:
    """Check what works with a compressed cache of this model.

    Args:
        model: a Transformers causal language model, or one that answers images and text.
        prompt: keyword arguments of `generate()` for one row, `input_ids` among them; by default random tokens.
        seed: the seed of the random tokens.

    Yields:
        One result a check, in the order of `names()`. No check raises. If no cache can be built, the others are
        not applicable.
    """
    with _as_it_was(model), torch.no_grad():
        subject = make_subject(model, prompt, seed)
        refused = False
        for name, check in CHECKS.items():
            if refused:
                yield Result(name, "not applicable", "no cache can be built")
                continue
            result = _run(name, check, subject)
            refused = check is check_built and result.status == "failed"
            yield result


def names() -> tuple[str, ...]:
    """List the checks, in their order."""
    return tuple(CHECKS)


def _run(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Result:
    configs = [(config, config._attn_implementation) for config in with_parts(subject.model.config)]
    forget_positions(subject.model)
    try:
        return Result(name, "passed", check(subject) or "")
    except NotApplicableError as error:
        return Result(name, "not applicable", str(error))
    except FailedError as error:
        return Result(name, "failed", str(error))
    except Exception as error:  # whatever the model's code raises says that this does not work
        return _with_exact(name, subject) or Result(name, "failed", one_line(error))
    finally:
        _give_back(configs)


def _with_exact(name: str, subject: Subject) -> Result | None:
    """Tell if a model fails with Transformers' own cache too.

    The result is "not applicable", or None if the model works.
    """
    try:
        baseline(lambda: subject.logits(subject.exact(), subject.row[:, :2]))
        baseline(lambda: subject.generate(subject.exact(), max_new_tokens=2))
    except NotApplicableError as error:
        return Result(name, "not applicable", str(error))
    return None


def _give_back(configs: list[tuple[Any, Any]]) -> None:
    # Not by the property, which would set the parts of a config too.
    for config, implementation in configs:
        config._attn_implementation_internal = implementation


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Check in evaluation mode, and then restore the model.

    Its mode, its attention and its positions are restored.
    """
    configs = [(config, config._attn_implementation) for config in with_parts(model.config)]
    modes = [(module, module.training) for module in model.modules()]
    positions = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    model.eval()
    try:
        yield
    finally:
        _give_back(configs)
        for module, training in modes:
            module.training = training
        for module, deltas in positions:
            module.rope_deltas = deltas
