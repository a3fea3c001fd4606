"""The attention methods by name: ours, and those of installed packages, which offer theirs under an entry point."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

from wildcat_kv import plugins
from wildcat_kv.attention.balancekv import BalanceKV
from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.exact import Exact
from wildcat_kv.attention.hyperattention import HyperAttention
from wildcat_kv.attention.kdeformer import KDEformer
from wildcat_kv.attention.near_wildcat import NearWildCat
from wildcat_kv.attention.performer import Performer
from wildcat_kv.attention.reformer import Reformer
from wildcat_kv.attention.scatterbrain import ScatterBrain
from wildcat_kv.attention.stratified import Stratified
from wildcat_kv.attention.thinformer import Thinformer
from wildcat_kv.attention.uniform import Uniform
from wildcat_kv.attention.wildcat import WildCatAttention
from wildcat_kv.validation import did_you_mean

# An entry point in this group names a subclass of `Attention`.
GROUP = "wildcat_kv.attention"

# Exact first, then what keeps a part of the keys, features, hashes, and WildCat.
_KINDS: tuple[type[Attention], ...] = (
    Exact,
    WildCatAttention,
    NearWildCat,
    Uniform,
    Stratified,
    Thinformer,
    BalanceKV,
    Performer,
    ScatterBrain,
    Reformer,
    KDEformer,
    HyperAttention,
)
OURS: dict[str, type[Attention]] = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True)
class AttentionMethod:
    """Facts about an attention method, to choose by.

    Attributes:
        name: name that `attention_method` takes.
        paper: source of the method.
        complexity: operations of one head in n keys and as many queries.
        presets: names of its presets.
        summary: first line of its documentation.
    """

    name: str
    paper: str
    complexity: str
    presets: tuple[str, ...]
    summary: str


def available() -> list[AttentionMethod]:
    """List all methods: ours, then those of installed packages by name.

    A broken one is left out with a warning.

    Example:
        >>> [method.name for method in available()][:3]
        ['exact', 'wildcat', 'near_wildcat']
    """
    methods = [_about(name, kind) for name, kind in OURS.items()]
    for name, point in sorted(plugins.installed(GROUP, OURS).items()):
        try:
            methods.append(_about(name, plugins.load(point, Attention, "attention")))
        except Exception as error:  # whatever a package of somebody else's may do
            warnings.warn(str(error), stacklevel=2)
    return methods


def attention_method(name: str, **settings: Any) -> Attention:
    """Build a method by its name.

    Args:
        name: name that `available` lists.
        **settings: fields of the method.

    Raises:
        ValueError: there is no such method or setting, or it is an installed package's that cannot be loaded.

    Example:
        >>> attention_method("uniform", rank=256)
        Uniform(rank=256, seed=0)
    """
    kind = _find(name)
    known = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(setting, known)
            raise ValueError(f"{setting}={settings[setting]!r}: no such setting; {hint}{name} takes {', '.join(known)}")
    return kind(**settings)


def _find(name: str) -> type[Attention]:
    if name in OURS:
        return OURS[name]
    others = plugins.installed(GROUP, OURS)
    if name in others:
        return plugins.load(others[name], Attention, "attention")
    names = [*OURS, *sorted(others)]
    raise ValueError(f"attention={name!r}: no such method; {did_you_mean(name, names)}there are {', '.join(names)}")


def _about(name: str, kind: type[Attention]) -> AttentionMethod:
    summary = (kind.__doc__ or "").strip().split("\n", 1)[0]
    return AttentionMethod(name, kind.paper, kind.complexity, tuple(kind.presets), summary)
