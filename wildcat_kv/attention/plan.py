"""A plan: which layers of a model are approximated and how, with the errors and costs that were measured."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self, override

from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.exact import Exact
from wildcat_kv.attention.per_head import PerHead
from wildcat_kv.attention.registry import attention_method
from wildcat_kv.files import read_text, replacing

_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The setting of a layer.

    Attributes:
        name: name of the layer's module.
        method: the layer's method; `Exact()` where it stays as it is.
        error: relative error of the layer's attention output over all inputs, ||approximate - exact|| / ||exact||.
        cost: operations of the method in all inputs, as `Attention.cost` counts them.
        exact_cost: operations of exact attention.
    """

    name: str
    method: Attention
    error: float
    cost: int
    exact_cost: int


@dataclass(frozen=True, eq=False)
class Plan(Mapping[int | str, Attention]):
    """Settings of a model's layers, which `use` and `enable` take in the place of a method.

    As a mapping it leads from the names of approximated layers to their methods. Layers that stay exact are not in it,
    and keep the model's own attention.

    Attributes:
        layers: all layers that were measured, in the order of the model.
    """

    layers: tuple[LayerPlan, ...]

    @override
    def __getitem__(self, layer: int | str) -> Attention:
        return {each.name: each.method for each in self._approximated()}[str(layer)]

    @override
    def __iter__(self) -> Iterator[int | str]:
        return (each.name for each in self._approximated())

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self._approximated())

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._described() == other._described()

    @property
    def cost(self) -> float:
        """Operations of all layers over those of exact attention."""
        return sum(each.cost for each in self.layers) / max(1, sum(each.exact_cost for each in self.layers))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Args:
            path: path of the file; one that exists is replaced.

        Raises:
            FileNotFoundError: its folder is not there.
            ValueError: a method that no package offers by name.
        """
        for each in self.layers:
            for method in each.method.methods if isinstance(each.method, PerHead) else (each.method,):
                _check_named(method)
        text = json.dumps({"version": _VERSION, "layers": self._described()}, indent=2)
        with replacing(Path(path)) as file:
            file.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan that `save` wrote.

        Args:
            path: path of the file.

        Raises:
            ValueError: there is no such file, it is no plan, or it names a method that is not there.
        """
        text = read_text(Path(path), "path")
        try:
            content = json.loads(text)
            version, layers = content["version"], content["layers"]
            if version != _VERSION:
                raise ValueError(f"it has version {version}, and this release reads {_VERSION}")
            return cls(tuple(LayerPlan(**{**layer, "method": _build(layer["method"])}) for layer in layers))
        except KeyError as error:
            raise ValueError(f"path={str(path)!r} holds no plan: {error} is missing; write one by Plan.save") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} holds no plan: {error}; write one by Plan.save") from None

    def __str__(self) -> str:
        """Show a line for each layer, and one for the whole."""
        rows = [("layer", "method", "error", "operations")]
        rows += [(each.name, _short(each.method), f"{each.error:.3f}", _share(each)) for each in self.layers]
        rows.append((f"{len(self)} of {len(self.layers)} layers", "", "", f"{self.cost:.0%}"))
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            f"{name:<{width[0]}}  {method:<{width[1]}}  {error:>{width[2]}}  {cost:>{width[3]}}"
            for name, method, error, cost in rows
        )
        return "\n".join(lines)

    def _approximated(self) -> Iterator[LayerPlan]:
        return (each for each in self.layers if not isinstance(each.method, Exact))

    def _described(self) -> list[dict[str, Any]]:
        return [{**vars(each), "method": _describe(each.method)} for each in self.layers]


def _describe(method: Attention) -> dict[str, Any]:
    """Give a method's name and settings, as JSON has them."""
    if isinstance(method, PerHead):
        return {"name": method.name, "methods": [_describe(one) for one in method.methods], "heads": [*method.heads]}
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    listed = {name: [*value] if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"name": method.name, **listed}


def _build(description: Mapping[str, Any]) -> Attention:
    """Build a method from what `_describe` gave."""
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in description.items()
    }
    name = settings.pop("name")
    if name == PerHead.name:
        return PerHead(tuple(map(_build, settings["methods"])), settings["heads"])
    return attention_method(name, **settings)


def _check_named(method: Attention) -> None:
    """Refuse a method that cannot be built again from its name."""
    try:
        known = type(_build(_describe(method))) is type(method)
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"method {type(method).__name__} cannot be saved: no installed package offers it by the name "
            f"{method.name!r}; give it an entry point in the group 'wildcat_kv.attention'"
        )


def _short(method: Attention) -> str:
    """Name a method with the settings that are not the default.

    Example:
        >>> from wildcat_kv.attention import Uniform
        >>> _short(PerHead((Exact(), Uniform(rank=64)), heads=(0, 1, 1, 1)))
        '1 x Exact, 3 x Uniform(rank=64)'
    """
    if isinstance(method, PerHead):
        counts = Counter(method.heads)
        return ", ".join(f"{counts[place]} x {_short(one)}" for place, one in enumerate(method.methods))
    fields = ((field, getattr(method, field.name)) for field in dataclasses.fields(method))
    settings = ", ".join(f"{field.name}={value!r}" for field, value in fields if value != field.default)
    return type(method).__name__ + (f"({settings})" if settings else "")


def _share(layer: LayerPlan) -> str:
    return f"{layer.cost / layer.exact_cost:.0%}" if layer.exact_cost else "0%"
