"""Positions that models with M-RoPE keep on themselves, `rope_deltas`.

An image takes fewer rotary positions than tokens. Qwen2-VL and two dozen families after it keep the difference,
`rope_deltas` (rows, 1), on the model: always that of the last prompt, even if another cache read it. Here each cache
keeps its own difference, and puts it on the model before the model goes on with this cache.

No call gives the cache to the model, or the model to the cache, before positions are computed. But every family
calls the cache's `get_seq_length()` in the function that uses `rope_deltas`, right before their use. So
`get_seq_length()` looks at its caller: a function that names `rope_deltas`, of a module that has them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.models.identity import ModelIdentity

NAME = "rope_deltas"
# Local variables of the callers with one row for each row of the batch.
_ROWS = ("inputs_tensor", "inputs_embeds", "input_ids", "attention_mask")


@dataclass(frozen=True)
class Step:
    """Positions from one token on.

    Attributes:
        start: tokens read before.
        deltas: (rows, 1), to add to the number of valid tokens before a token; None to count tokens alone.
        known: True if the model computed them; False if they were given as `position_ids` or the model keeps none.
    """

    start: int
    deltas: Tensor | None
    known: bool = True


@dataclass
class RopeDeltas:
    """Positions of one cache.

    Attributes:
        steps: steps in the order of their starts. A step that starts at the newest token holds from the next token
            on. It has no effect if the forward pass fails, or is taken back.
    """

    steps: list[Step] = field(default_factory=list)
    # The module that computes deltas now, and the deltas that it was given before.
    _holder: weakref.ref | None = None
    _placed: Tensor | None = None
    # The last module that `_check` accepted.
    _checked: weakref.ref | None = None

    def after(self, seen: int, model: Any) -> Tensor | None:
        """Find the deltas that hold after `seen` tokens.

        Args:
            seen: tokens read, at least 1.
            model: module that goes on, for the message.

        Returns:
            Deltas (rows, 1), or None to count tokens alone.

        Raises:
            ValueError: the deltas are not known.
        """
        step = next((step for step in reversed(self.steps) if step.start < seen), None)
        if step is None or not step.known:
            raise ValueError(
                f"model={type(model).__name__} keeps rotary positions of its own, and those of the {seen} tokens in "
                "the cache were given as position_ids=...; give position_ids for the tokens that follow, too"
            )
        return step.deltas

    def carry(self, seen: int) -> list[Step]:
        """List the steps that have an effect after `seen` tokens."""
        return [step for step in self.steps if step.start < seen]

    def place(self, caller: FrameType, seen: int, reader: ModelIdentity) -> None:
        """Put the deltas on the model that is about to use them.

        Args:
            caller: frame that asks for the length; its function names `rope_deltas`.
            seen: tokens read.
            reader: model that read them.

        Raises:
            ValueError: the positions of the tokens read are unknown, do not fit the caller's rows, or belong to an
                image that another model saw.
        """
        names = caller.f_locals
        holder = _find_holder(names.get("self"))
        if holder is None:
            return
        deltas = self.after(seen, holder) if seen else None
        batch = next((names[name] for name in _ROWS if isinstance(names.get(name), Tensor)), None)
        if deltas is not None:
            self._check(holder, reader)
            deltas = deltas if batch is None else _fit_to_batch(deltas, batch)
        setattr(holder, NAME, deltas)
        self._holder, self._placed = weakref.ref(holder), deltas

    def _check(self, holder: Any, reader: ModelIdentity) -> None:
        """Refuse a model whose vision part differs from the reader's."""
        if self._checked is not None and self._checked() is holder:
            return
        if difference := reader.differing_sense(holder.config):
            raise ValueError(
                f"model={type(holder).__name__} is another than the one that read what is in the cache: {difference}; "
                "go on with that one, or read it again"
            )
        self._checked = weakref.ref(holder)

    def begin(self, seen: int, rows: int) -> None:
        """Note the positions that the model has computed for a forward pass.

        Args:
            seen: tokens read before.
            rows: rows of the batch.
        """
        if self._holder is None:
            if not seen and not self.steps:
                self.steps = [Step(0, None, known=False)]
            return
        holder, placed = self._holder(), self._placed
        self._holder = self._placed = None
        if holder is None:
            return
        found = getattr(holder, NAME)
        if not seen or found is not placed:
            self.note(seen, _copy_for_rows(found, rows))

    def note(self, seen: int, deltas: Tensor | None, *, known: bool = True) -> None:
        """Add a step: `deltas` (rows, 1) hold from the token after `seen` on."""
        self.steps = [*self.carry(seen), Step(seen, deltas, known)]

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, int64 (k,), in that order."""
        self.steps = [
            step
            if step.deltas is None
            else Step(step.start, step.deltas.index_select(0, index.to(step.deltas.device)), step.known)
            for step in self.steps
        ]

    def crop(self, seen: int) -> None:
        """Forget the steps after `seen` tokens."""
        self.steps, self._holder, self._placed = self.carry(seen), None, None

    def tensors(self) -> list[Tensor]:
        """List all tensors held."""
        return [step.deltas for step in self.steps if step.deltas is not None]


def holds_positions(model: Any) -> bool:
    """Tell if a torch module, or one inside it, keeps `rope_deltas`."""
    return any(NAME in vars(module) for module in model.modules())


def _find_holder(owner: Any) -> Any:
    """Find the module that has the positions.

    Args:
        owner: owner of the calling method.

    Returns:
        The owner, or the first of its children that has them, or None.
    """
    if not isinstance(owner, torch.nn.Module):
        return None
    return next((module for module in (owner, *owner.children()) if NAME in vars(module)), None)


def _fit_to_batch(deltas: Tensor, batch: Tensor) -> Tensor | None:
    """Choose the deltas for the rows of a batch.

    `generate()` with beams computes positions before it repeats the rows: then one row of each prompt is taken.

    Returns:
        Deltas (rows, 1), or None if the rows do not fit; the forward pass will refuse them.

    Raises:
        ValueError: the rows of one prompt have different positions.
    """
    rows = batch.shape[0]
    if not rows or deltas.shape[0] % rows:
        return None
    if (copies := deltas.shape[0] // rows) > 1:
        groups = deltas.view(rows, copies)
        if not bool((groups == groups[:, :1]).all()):
            raise ValueError(
                f"the batch has {rows} rows and the cache {deltas.shape[0]}, whose rotary positions differ within the "
                f"{copies} rows of a prompt; pass a row for each row of the cache"
            )
        deltas = deltas[::copies]
    return deltas.to(batch.device)


def _copy_for_rows(found: Any, rows: int) -> Tensor | None:
    """Copy deltas (r, 1), repeated for the rows of the batch.

    Raises:
        ValueError: the model's `rope_deltas` have another type or shape.
    """
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != 1 or rows % found.shape[0]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the model keeps {NAME}={shape} for a batch of {rows} rows, and a cache can carry (rows, 1) only; use "
            "DynamicCache for this model"
        )
    with ordinary_tensors():
        return found.detach().clone().repeat_interleave(rows // found.shape[0], dim=0)
