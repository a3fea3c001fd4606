"""Comparison of a model's outputs with a method and without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wildcat_kv.attention import encoders
from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.runs import Run, Use, call, check_runs


@dataclass(frozen=True)
class OutputErrors:
    """Change of a model's own output under a method.

    Attributes:
        errors: for every input the relative error, ||with - without|| / ||without||.
        cosines: for every input the mean cosine of the output's vectors, along the last dimension.
    """

    errors: tuple[float, ...]
    cosines: tuple[float, ...]

    def __str__(self) -> str:
        """Show means and the worst input."""
        return (
            f"error {sum(self.errors) / len(self.errors):.3f} (worst {max(self.errors):.3f}), "
            f"cosine {sum(self.cosines) / len(self.cosines):.3f} (worst {min(self.cosines):.3f}), "
            f"inputs: {len(self.errors)}"
        )


def compare_outputs(
    model: nn.Module,
    inputs: Any,
    method: Attention | Mapping[int | str, Attention],
    *,
    read: Callable[[Any], Tensor] | None = None,
    use: Use = encoders.use,
    run: Run = call,
) -> OutputErrors:
    """Compare a model's outputs with a method, or a plan, with those without it.

    This is the check that a plan needs: the errors of layers do not predict it. Take other inputs than those of
    `calibrate`, nine or more, and look at the worst.

    Args:
        model: the model, in eval mode.
        inputs: list of what `run` takes: mappings of keywords, tuples of arguments, or tensors; one alone is one run.
        method: a method, methods by layer, or a `Plan`.
        read: function that takes the tensor to compare from what `run` returns, without padding; the first
            floating-point tensor by default.
        use: function that puts the method into the model; for diffusers `wildcat_kv.attention.diffusers.use`.
        run: function of the model and one of the inputs; by default it calls the model.

    Raises:
        ValueError: bad inputs, a method that `use` refuses, or outputs that cannot be compared.
    """
    errors, cosines = [], []
    with torch.no_grad():
        for given in check_runs(model, inputs):
            without = (read or _first_tensor)(run(model, given)).cpu().double()
            with use(model, method):
                found = (read or _first_tensor)(run(model, given)).cpu().double()
            if found.shape != without.shape:
                raise ValueError(
                    f"read: outputs have shapes {tuple(found.shape)} with the method, {tuple(without.shape)} without; "
                    "give a function that takes tensors of one shape"
                )
            wrong, whole = float((found - without).norm()), float(without.norm())
            errors.append(wrong / whole if whole > 0 else float("inf") if wrong > 0 else 0.0)
            cosines.append(
                float(torch.cosine_similarity(torch.atleast_1d(found), torch.atleast_1d(without), dim=-1).mean())
            )
    return OutputErrors(tuple(errors), tuple(cosines))


def _first_tensor(output: Any) -> Tensor:
    """Take the first floating-point tensor of what a model returns."""
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ValueError(f"read: a {type(output).__name__} holds no floating-point tensor; give a function that takes one")
