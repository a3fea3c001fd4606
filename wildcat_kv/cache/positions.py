"""Positions that a model keeps on itself, carried by the cache: the `rope_deltas` of models with M-RoPE.

An image takes fewer rotary positions than tokens. Qwen2-VL and two dozen families after it therefore keep how far the
positions are off the tokens, `rope_deltas` (rows, 1), and they keep it on the model: of the last prompt, whatever
cache it was read into. Here each cache keeps its own, and puts it in place before the model goes on with it.

No call hands the cache to the model, or the model to the cache, before positions are computed. But every family asks
the cache for `get_seq_length()` in the function that uses `rope_deltas`, right before it does. So that is where the
caller is looked at: a function that names `rope_deltas`, of a module that has them.
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
# Local variables of the callers that have a row for each row of the batch.
_ROWS = ("inputs_tensor", "inputs_embeds", "input_ids", "attention_mask")


@dataclass(frozen=True)
class Step:
    """Positions from one token on.

    Attributes:
        start: tokens read before.
        deltas: (rows, 1), to add to the number of valid tokens before a token; None to count tokens alone.
        known: whether the model computed them; otherwise they were given as `position_ids`, or the model keeps none.
    """

    start: int
    deltas: Tensor | None
    known: bool = True


@dataclass
class RopeDeltas:
    """The positions of one cache.

    Attributes:
        steps: in the order of their starts. One that starts at the end of what is read holds from the next token on:
            it has no effect if the forward pass fails, or is taken back.
    """

    steps: list[Step] = field(default_factory=list)
    # The module whose deltas are to be noted, once it has computed them, and those that it was given.
    _holder: weakref.ref | None = None
    _placed: Tensor | None = None
    # The last one that was found to be of the model that read.
    _checked: weakref.ref | None = None

    def after(self, seen: int, model: Any) -> Tensor | None:
        """The deltas (rows, 1) that hold after `seen` tokens, at least one; None to count tokens alone.

        Args:
            seen: tokens read.
            model: the module that goes on, for the message.

        Raises:
            ValueError: they are not known.
        """
        step = next((step for step in reversed(self.steps) if step.start < seen), None)
        if step is None or not step.known:
            raise ValueError(
                f"model={type(model).__name__} keeps rotary positions of its own, and those of the {seen} tokens in "
                "the cache were given as position_ids=...; give position_ids for the tokens that follow, too"
            )
        return step.deltas

    def carry(self, seen: int) -> list[Step]:
        """The steps that have an effect after `seen` tokens."""
        return [step for step in self.steps if step.start < seen]

    def place(self, caller: FrameType, seen: int, reader: ModelIdentity) -> None:
        """Put the positions in place, where the caller is about to go on with them.

        Args:
            caller: the frame that asks for the length; its function names `rope_deltas`.
            seen: tokens read.
            reader: the model that read them.

        Raises:
            ValueError: the positions of what was read are not known, do not fit the caller's rows, or are of an image
                that another model saw.
        """
        names = caller.f_locals
        holder = _holder(names.get("self"))
        if holder is None:
            return
        deltas = self.after(seen, holder) if seen else None
        batch = next((names[name] for name in _ROWS if isinstance(names.get(name), Tensor)), None)
        if deltas is not None:
            self._check(holder, reader)
            deltas = deltas if batch is None else _fitted(deltas, batch)
        setattr(holder, NAME, deltas)
        self._holder, self._placed = weakref.ref(holder), deltas

    def _check(self, holder: Any, reader: ModelIdentity) -> None:
        """Refuse a model with another vision part than the one that read."""
        if self._checked is not None and self._checked() is holder:
            return
        if difference := reader.differing_sense(holder.config):
            raise ValueError(
                f"model={type(holder).__name__} is another than the one that read what is in the cache: {difference}; "
                "go on with that one, or read it again"
            )
        self._checked = weakref.ref(holder)

    def begin(self, seen: int, rows: int) -> None:
        """Note the positions of a forward pass; the model has computed them.

        Args:
            seen: tokens read before.
            rows: of the batch.
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
            self.note(seen, _of_rows(found, rows))

    def note(self, seen: int, deltas: Tensor | None, *, known: bool = True) -> None:
        """Let `deltas` (rows, 1) hold from the token after `seen` on."""
        self.steps = [*self.carry(seen), Step(seen, deltas, known)]

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; int64 (k,)."""
        self.steps = [
            step
            if step.deltas is None
            else Step(step.start, step.deltas.index_select(0, index.to(step.deltas.device)), step.known)
            for step in self.steps
        ]

    def crop(self, seen: int) -> None:
        """Forget what came after `seen` tokens."""
        self.steps, self._holder, self._placed = self.carry(seen), None, None

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        return [step.deltas for step in self.steps if step.deltas is not None]


def holds_positions(model: Any) -> bool:
    """Tell whether a torch module, or one within it, keeps positions that caches must carry."""
    return any(NAME in vars(module) for module in model.modules())


def _holder(owner: Any) -> Any:
    """The module that has the positions: the owner of the calling method, or one right within it; None for neither."""
    if not isinstance(owner, torch.nn.Module):
        return None
    return next((module for module in (owner, *owner.children()) if NAME in vars(module)), None)


def _fitted(deltas: Tensor, batch: Tensor) -> Tensor | None:
    """The deltas for a batch: of one row each, where `generate()` will repeat rows only later (beams).

    None for a number of rows that will be refused when the forward pass begins.
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


def _of_rows(found: Any, rows: int) -> Tensor | None:
    """A copy of deltas (r, 1) with a row for each of the batch; None as it is.

    Raises:
        ValueError: something else.
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
