"""Comparisons with `DynamicCache`, and how a check ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FailedError(Exception):
    """A check failed; the message says what is wrong."""


class NotApplicableError(Exception):
    """A check says nothing about this model; the message says why."""


def baseline(run: Callable[[], Any]) -> Any:
    """Run something with Transformers' own cache; where that fails, a check does not apply."""
    try:
        return run()
    except Exception as error:
        raise NotApplicableError(f"fails with DynamicCache too: {one_line(error)}") from None


def check_bits(found: Tensor, expected: Tensor) -> None:
    """Refuse logits that differ in any bit."""
    if not torch.equal(found, expected):
        far = (found - expected).abs().max()
        raise FailedError(f"logits differ from DynamicCache's by up to {float(far):.2g}")


def check_tokens(found: Tensor, expected: Tensor) -> None:
    """Refuse tokens that differ."""
    if not torch.equal(found, expected):
        raise FailedError("tokens differ")


def one_line(error: Exception) -> str:
    """Write an error as one line, its class first."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
