"""Settings of a compressed cache: how much to keep, and how."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from wildcat_kv.coreset.choices import Temperature, Weights
from wildcat_kv.validation import one_line

# With ratio="auto": the share to reckon with until a method says how little is enough.
_AUTO_SHARE = 0.5

# The share that is dropped, by the name that kvpress and others give it.
DROPPED = "compression_ratio"
# The spellings of a budget.
BUDGETS = frozenset({"ratio", "max_tokens", "max_bytes", DROPPED})


def share_kept(compression_ratio: Any) -> float:
    """Turn a share to drop into the `ratio` that is kept.

    Args:
        compression_ratio: share of the tokens to drop, in [0, 1).

    Raises:
        ValueError: no such number.

    Example:
        >>> share_kept(0.9)
        0.1
    """
    number = isinstance(compression_ratio, (int, float)) and not isinstance(compression_ratio, bool)
    if not number or not 0 <= compression_ratio < 1:
        raise ValueError(
            f"{DROPPED}={compression_ratio!r}: the share of the tokens to drop, a number in [0, 1), for example 0.75 "
            "to keep a quarter"
        )
    return float(1 - Decimal(str(compression_ratio)))  # 1 - 0.9 in binary would keep a token less


def _name_compression_ratio(schema: dict[str, Any]) -> None:
    """Add the other spelling of `ratio` to the schema, for editors."""
    schema["properties"][DROPPED] = {
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 1,
        "description": f"{DROPPED} is the share of the tokens to drop, in [0, 1), instead of a ratio, for example 0.75",
    }


class WildCatConfig(BaseModel):
    """Settings of a compressed cache; the fields describe themselves.

    Give exactly one budget:

    - `ratio`: a layer keeps this share of the tokens seen. The share is exact right after every fold.
      `compression_ratio=0.75`, the share to *drop*, is another spelling of `ratio=0.25`, as in kvpress.
    - `ratio="auto"` with `tolerance`: every layer keeps as few slots as meet the tolerance by its own estimate, in
      the prompt and in the generated text. The tolerance is the largest estimated error of a layer's attention
      output, as a share of that output.
    - `max_tokens`: a layer stores no more tokens, whatever the length. It must be at least sink + window + bin_rank.
    - `max_bytes`: the whole cache takes no more bytes between two forward passes, such as "2GiB". A text stays exact
      while it fits, then its slots are quantised (`bits`, 4 by default), then compressed.

    `min_tokens` is a floor under a ratio. A text of at most as many tokens is kept as it is, nothing dropped, merged or
    quantised; a longer one keeps the share, but never less than `min_tokens` entries. The other budgets need none: they
    leave a text exact while it fits.

    The budget is for the compressed layers. `exact_layers` takes indices of the model's layers, -1 for the last, and
    only with a ratio: these layers have no limit. The same seed, model and text give the same cache.

    Bins, temperature and weights are those of the published protocol by default (arXiv 2602.10056, KV cache
    experiments; its sink is 32, as in the preset "published"). The temperature "released" is the constant of the
    authors' code, and "theory" is the paper's formula (Lambert W).

    Raises:
        ValueError: wrong fields. One line names the field, its value and what it takes.

    Example:
        >>> WildCatConfig(ratio=0.25).window
        32
    """

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_name_compression_ratio)

    # Errors, the JSON schema and docs/api.md all take their text from these descriptions.
    ratio: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] | Literal["auto"] | None = Field(
        None,
        description="ratio is the share of the tokens to keep, in (0, 1], for example 0.25, or 'auto' with a tolerance",
    )
    max_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None,
        description="max_tokens is the most tokens to store a layer and head, a positive integer, for example 1024",
    )
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = Field(
        None,
        description="max_bytes is the most bytes that the whole cache takes, a positive number or a text, for example "
        "'2GiB'",
    )
    tolerance: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = Field(
        None, description="tolerance is the error to allow with ratio='auto', a number above 0, for example 0.1"
    )
    min_tokens: int = Field(
        0,
        ge=0,
        strict=True,
        description="min_tokens is how many tokens a ratio always keeps, an integer of at least 0, for example 512; "
        "shorter texts stay exact",
    )
    sink: int = Field(
        4,
        ge=0,
        strict=True,
        description="sink is how many of the first tokens stay exact, an integer of at least 0, for example 4",
    )
    window: int = Field(
        32,
        ge=0,
        strict=True,
        description="window is how many of the last tokens stay exact, an integer of at least 0, for example 32",
    )
    bin_rank: int = Field(
        12,
        ge=1,
        strict=True,
        description="bin_rank is how many slots one bin is compressed into, an integer of at least 1, for example 12",
    )
    temperature: Temperature = Field(
        "released", description="temperature is 'released' (the authors' code) or 'theory' (the paper's formula)"
    )
    weights: Weights = Field(
        "nystrom", description="weights is 'nystrom' (signed, the paper's) or 'clipped' (negative ones set to 0)"
    )
    bits: Literal[8, 4, 3, 2] | None = Field(
        None,
        description="bits is how many bits a stored number of a slot takes: 8, 4, 3 or 2; None for the model's dtype",
    )
    group: Annotated[int, Field(ge=8, multiple_of=8, strict=True)] = Field(
        64,
        description="group is how many slots share a channel's scale of the keys, with bits; a multiple of 8, for "
        "example 64",
    )
    exact_layers: tuple[Annotated[int, Field(strict=True)], ...] = Field(
        (),
        description="exact_layers are the layers to leave uncompressed, a list of integers, for example [0, -1]",
    )
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="seed is an integer in [0, 2**63)")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(one_line(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _read_compression_ratio(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or DROPPED not in fields:
            return fields
        fields = dict(fields)
        dropped = fields.pop(DROPPED)
        if dropped is None:
            return fields
        if (ratio := fields.get("ratio")) is not None:
            raise ValueError(
                f"ratio={ratio} and {DROPPED}={dropped}: the share kept and the share dropped; pass one of them"
            )
        return {**fields, "ratio": share_kept(dropped)}

    @model_validator(mode="after")
    def _check_budget(self) -> WildCatConfig:
        budgets = {"ratio": self.ratio, "max_tokens": self.max_tokens, "max_bytes": self.max_bytes}
        given = [f"{name}={budget}" for name, budget in budgets.items() if budget is not None]
        if len(given) != 1:
            named, many = " and ".join(given) or "ratio=None and max_tokens=None", ("neither", "", "both", "all")
            raise ValueError(
                f"{named}: {many[len(given)]} of them given; pass exactly one, for example ratio=0.25 or "
                "max_tokens=1024"
            )
        if (self.ratio == "auto") != (self.tolerance is not None):
            raise ValueError(
                f"tolerance={self.tolerance} with ratio={self.ratio!r}: one needs the other; give ratio='auto' and, "
                "for example, tolerance=0.1"
            )
        if self.min_tokens and not isinstance(self.ratio, float):
            raise ValueError(
                f"min_tokens={self.min_tokens} with {given[0]}: a floor goes with a ratio that is a number; leave "
                "min_tokens out, or give for example ratio=0.25"
            )
        if self.ratio is None and self.exact_layers:
            raise ValueError(
                f"exact_layers={list(self.exact_layers)} with {given[0]}: a layer left exact has no "
                "limit; give a ratio, or leave exact_layers out"
            )
        least = self.sink + self.window + self.bin_rank
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(
                f"max_tokens={self.max_tokens} is too small for sink={self.sink} + window={self.window} "
                f"+ bin_rank={self.bin_rank}; raise max_tokens to {least} or more, or lower sink and window"
            )
        return self

    @property
    def share(self) -> float | None:
        """Share of the tokens that budgets are reckoned by; None with `max_tokens` and `max_bytes`."""
        return _AUTO_SHARE if self.ratio == "auto" else self.ratio

    def changed(self, **fields: Any) -> WildCatConfig:
        """Copy these settings with some fields changed.

        A new budget replaces the old one. `max_tokens` and `max_bytes` remove the `exact_layers` of a ratio, and these
        and `ratio="auto"` its `min_tokens`.

        Args:
            **fields: new values, by the name of their field.

        Raises:
            ValueError: the changed settings do not fit together, or a field is wrong.

        Example:
            >>> settings = WildCatConfig(ratio=0.25, window=64).changed(max_tokens=512)
            >>> settings.ratio, settings.max_tokens, settings.window
            (None, 512, 64)
        """
        kept = self.model_dump()
        if fields.keys() & BUDGETS:
            del kept["ratio"], kept["max_tokens"], kept["max_bytes"], kept["tolerance"]
        limited = fields.get("max_tokens") is not None or fields.get("max_bytes") is not None
        if limited:
            del kept["exact_layers"]
        if limited or fields.get("ratio") == "auto":
            del kept["min_tokens"]
        return type(self)(**{**kept, **fields})
