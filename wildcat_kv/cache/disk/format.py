"""The file format: the header's schema, its version, the tensors' names.

A file is one safetensors file. Its metadata has the format's name, the version, and the header as JSON.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from wildcat_kv.cache.progress import Progress
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.identity import ModelIdentity

FORMAT = "wildcat_kv context"
VERSION = 5
# Versions that can be read: 4 knows no bands and no bits.
READ = (4, 5)

# The kind of a compressed layer; Transformers' own layers go by the name of their class.
COMPRESSED = "WildCatLayer"

# Tensors of a compressed layer, behind the layer's prefix.
ENTRIES = ("keys", "values", "weights", "valid")
# The box around folded values, where there is one.
BOUNDS = ("folded.lowest", "folded.highest")
# Only where the method remembers something of its entries.
MEMORY = "memory"
# Only where the method learns from queries.
QUERIES = ("queries.carried", "queries.recent")
# The token ids that the cache has read, where a text was saved with it.
IDS = "input_ids"
# Positions that the model would keep on itself, by the number of the step.
POSITIONS = "positions."


class DamageError(Exception):
    """A contradiction in a file, told in a few words."""


class BandHeader(BaseModel):
    """One band, see `Band`; its tensors begin with "bands.", its number and a dot.

    Attributes:
        places: heads, each as row * heads + head.
        sink: exact tokens at the beginning.
        waiting: slots that are not quantised.
        length: number of entries in use that are not quantised.
        segments: segments of quantised slots.
    """

    model_config = ConfigDict(extra="forbid")

    places: list[int]
    sink: int
    waiting: int
    length: int
    segments: int = Field(ge=0)


class LayerHeader(BaseModel):
    """One layer.

    Attributes:
        kind: `COMPRESSED`, or the class of one of Transformers' layers.
        progress: numbers of a compressed layer.
        length: number of entries in use, of a compressed layer.
        bands: bands of a layer that is held in bands.
        attributes: attributes of one of Transformers' layers, encoded as by `foreign_layers.encode`.
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    progress: Progress | None = None
    length: int | None = None
    bands: list[BandHeader] = []
    attributes: dict[str, JsonValue] | None = None


class TextHeader(BaseModel):
    """The text that was read, see `SavedText`; its ids are a tensor."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(ge=1)
    weights: dict[str, list[float]]


class PositionsHeader(BaseModel):
    """Positions from one token on, see `Step`; deltas are a tensor."""

    model_config = ConfigDict(extra="forbid")

    start: int
    known: bool
    deltas: bool


class Header(BaseModel):
    """The JSON beside the tensors.

    Attributes:
        model: model that the cache was built for.
        settings: settings of the cache.
        compressor: description of the method.
        layers: one a layer of the model.
        positions: steps of `RopeDeltas`.
        text: the text, None for a cache alone.
    """

    model_config = ConfigDict(extra="forbid")

    model: ModelIdentity
    settings: WildCatConfig
    compressor: JsonValue
    layers: list[LayerHeader]
    positions: list[PositionsHeader] = []
    text: TextHeader | None = None


def prefix_of(layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"layers.{layer}."
