"""Profile of a model: the share of the slots that each layer or head gets.

With it no layer waits for what the others find.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wildcat_kv.compressors.query_wildcat.fitted_scorer import FittedScorer
from wildcat_kv.compressors.query_wildcat.model_match import check_match, find_file, shipped_names
from wildcat_kv.validation import one_line

_FOLDER = Path(__file__).with_name("profiles")

# For each layer one number, or one for each of its heads.
_Shares = tuple[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], ...]


class Point(BaseModel):
    """Shares that were measured at one ratio; 1 is an equal share.

    Attributes:
        ratio: share of the items that became slots.
        attended: shares of the first part, of each layer one number, or one for each of its heads.
        recalled: shares of the second part, in the same shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: Annotated[float, Field(gt=0, le=1)]
    attended: _Shares
    recalled: _Shares


class Profile(BaseModel):
    """Shares of the slots by layer and head, measured once over some texts.

    `measure_profile` and `wildcat-kv profile MODEL` make one.

    Attributes:
        version: 1.
        model: name of the model, for the reader.
        match: fields of the decoder's config, and the values that they have in this model.
        texts: description of the texts that were measured.
        tokens: tokens of all these texts.
        scorer: digest of the scorer that it was measured with; None for none.
        points: shares at each ratio that was measured, in rising order. Between two of them they are interpolated.

    Raises:
        pydantic.ValidationError: a field that is unknown or does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(1, description="version is 1")
    model: str = Field(min_length=1, description="model is the name of the model, for the reader")
    match: dict[str, str | int | None] = Field(min_length=1, description="match are fields of the decoder's config")
    texts: str = Field(min_length=1, description="texts says what was measured")
    tokens: int = Field(ge=1, description="tokens is the number of tokens of all texts, at least 1")
    scorer: str | None = Field(None, description="scorer is the digest of the scorer that it was measured with")
    points: tuple[Point, ...] = Field(min_length=1, description="points are the shares at each ratio")

    @model_validator(mode="after")
    def _check_points(self) -> Profile:
        if any(later.ratio <= point.ratio for point, later in pairwise(self.points)):
            raise ValueError(f"points: their ratios {[point.ratio for point in self.points]} must rise")
        shapes = {tuple(map(len, shares)) for point in self.points for shares in (point.attended, point.recalled)}
        if len(shapes) > 1 or not min(shapes) or not min(min(shapes)):
            raise ValueError("points: all of them need the same layers and heads, at least one of each")
        return self

    @property
    def heads(self) -> tuple[int, ...]:
        """Shares of each layer: 1, or as many as the layer has key heads."""
        return tuple(map(len, self.points[0].attended))

    def __repr__(self) -> str:
        return f"Profile({self.model!r}, {len(self.heads)} layers)"

    __str__ = __repr__

    def to_json(self) -> str:
        """Write the profile as a JSON text, a layer a line."""
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"

    def check_model(self, decoder: Any, layers: int) -> None:
        """Refuse another model than the one that was measured.

        Args:
            decoder: Transformers config of the decoder.
            layers: number of its layers that can be compressed.

        Raises:
            ValueError: names what differs.
        """
        way_out = "measure one by `wildcat-kv profile MODEL`, or leave profile out"
        check_match(self.match, decoder, f"profile={self!r}", way_out)
        if layers != len(self.heads):
            raise ValueError(
                f"profile={self!r} has shares of {len(self.heads)} layers, and this model has {layers} that can be "
                f"compressed; {way_out}"
            )
        heads = getattr(decoder, "num_key_value_heads", None)
        if isinstance(heads, int) and (wrong := next((one for one in self.heads if one not in (1, heads)), None)):
            raise ValueError(
                f"profile={self!r} has shares of {wrong} heads in a layer, and this model has {heads}; {way_out}"
            )

    def check_scorer(self, scorer: FittedScorer | None) -> None:
        """Refuse another scorer than the one that it was measured with.

        A scorer beside a profile that was measured without one gains nothing, and is warned of.

        Raises:
            ValueError: names both.
        """
        if self.scorer is None and scorer is not None:
            warnings.warn(
                f"profile={self!r} was measured without a scorer, and its shares leave scorer={scorer!r} little to "
                "gain; measure one by `wildcat-kv profile MODEL --scorer SCORER`",
                stacklevel=4,
            )
        if self.scorer is not None and (scorer is None or scorer.digest != self.scorer):
            raise ValueError(
                f"profile={self!r} was measured with a scorer, and scorer={scorer!r} is not that one; give the "
                "one that `wildcat-kv profile` was given, or leave profile out"
            )

    def counts(
        self, place: int, sharing: Sequence[int], ratio: float, slots: tuple[int, int], room: int
    ) -> tuple[list[int], list[int]]:
        """Count the items that a layer keeps, of the first part and of the second.

        The counts of all layers that share add up to the slots, as far as there is room.

        Args:
            place: place of the layer among those that can be compressed.
            sharing: places of the layers that share.
            ratio: share of the items that become slots.
            slots: items of both parts to keep in a head of a layer, on average.
            room: items of a head, alike in all layers.

        Returns:
            For each part one number for all heads, or one for each head.
        """
        before = sum(self.heads[other] for other in sharing if other < place)
        own = slice(before, before + self.heads[place])
        attended, recalled = ([share for other in sharing for share in part[other]] for part in self._between(ratio))
        first = apportion(attended, slots[0], [room] * len(attended))
        second = apportion(recalled, slots[1], [room - taken for taken in first])
        return first[own], second[own]

    def _between(self, ratio: float) -> tuple[_Shares, _Shares]:
        """Interpolate the shares of both parts at a ratio; beyond the ends the last ones hold."""
        low, high = self.points[0], self.points[-1]
        for point, later in pairwise(self.points):
            if point.ratio <= ratio <= later.ratio:
                low, high = point, later
                break
        else:
            low = high = low if ratio < low.ratio else high
        way = 0.0 if low is high else (ratio - low.ratio) / (high.ratio - low.ratio)

        def mixed(one: _Shares, other: _Shares) -> _Shares:
            pairs = zip(one, other, strict=True)
            return tuple(
                tuple(a + way * (b - a) for a, b in zip(first, second, strict=True)) for first, second in pairs
            )

        return mixed(low.attended, high.attended), mixed(low.recalled, high.recalled)


def apportion(shares: Sequence[float], slots: int, rooms: Sequence[int]) -> list[int]:
    """Deal whole slots out by shares, never more than there is room for.

    Args:
        shares: share of each party.
        slots: slots of a party, on average.
        rooms: most slots of each party.

    Returns:
        The slots of each party. Together they are `slots` times the parties, or all that there is room for.
    """
    left = float(min(slots * len(shares), sum(rooms)))
    amounts, open_ = [0.0] * len(shares), set(range(len(shares)))
    while open_ and left > 0:
        # Parties without a share get something only where the others are full.
        weight = {one: shares[one] for one in open_} if any(shares[one] for one in open_) else dict.fromkeys(open_, 1.0)
        unit = left / sum(weight.values())
        full = {one for one in open_ if unit * weight[one] >= rooms[one]}
        for one in full or open_:
            amounts[one] = float(rooms[one]) if full else unit * weight[one]
        left = left - sum(amounts[one] for one in full) if full else 0.0
        open_ -= full or open_
    # Rounding the sums instead of the parts keeps their total. A little more than half is lost to no float.
    ends = [int(end + 0.5 + 1e-9) for end in accumulate(amounts)]
    return [end - start for start, end in pairwise([0, *ends])]


def profile_names() -> list[str]:
    """List the names of the profiles that come with the package."""
    return shipped_names(_FOLDER, ".json")


def load_profile(given: str | os.PathLike[str] | Mapping[str, Any] | Profile) -> Profile:
    """Load a profile by its name, from a JSON file, or from plain data.

    Args:
        given: one of `profile_names()`, the path of a .json file, the contents of one, or a `Profile`, which is
            returned as it is.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such profile, or the file cannot be read or has a wrong field; one line that names it.

    Example:
        >>> len(load_profile("smollm2-135m").heads)
        30
    """
    if isinstance(given, Profile):
        return given
    if isinstance(given, Mapping):
        return _checked("profile", given)
    path = find_file("profile", given, _FOLDER, ".json", "wildcat-kv profile")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"profile={str(path)!r} is no readable file: {reason}") from None
    return _checked(f"profile={str(path)!r}", text)


def _checked(where: str, contents: Any) -> Profile:
    """Make a profile of a JSON text or of plain data."""
    try:
        return Profile.model_validate_json(contents) if isinstance(contents, str) else Profile(**contents)
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error, Profile)}") from None
