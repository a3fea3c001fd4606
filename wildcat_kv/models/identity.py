"""Identity of a model to a cache: shapes, positions, samples of weights."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from transformers import PreTrainedConfig

from wildcat_kv.validation import plain

# Parameters to sample, evenly spread over the model, and numbers of each.
_PARAMETERS = 8
_NUMBERS = 8
# Further apart than a weight and itself in bfloat16 or, near 0, in float16.
_ROUNDING, _LEAST = 0.01, 1e-6
# Before the name of an adapter's parameter.
ADAPTER = "adapter:"


class ModelIdentity(BaseModel):
    """Fields of a decoder's config that a stored cache depends on.

    Attributes:
        model_type: architecture, as Transformers names it.
        num_hidden_layers: number of layers.
        layer_types: kind of each layer; None where all are alike.
        sliding_window: tokens that sliding-window layers see; None where there are none.
        hidden_size: channels of the residual stream.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key heads; a list where layers differ.
        head_dim: channels of a key; None where it follows from the others.
        vocab_size: tokens of the vocabulary.
        rope_parameters: parameters of the rotary positions; None where there are none.
        senses: configs of the other parts (vision, audio) by name; empty where there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    num_hidden_layers: JsonValue
    layer_types: JsonValue
    sliding_window: JsonValue
    hidden_size: JsonValue
    num_attention_heads: JsonValue
    num_key_value_heads: JsonValue
    head_dim: JsonValue
    vocab_size: JsonValue
    rope_parameters: JsonValue
    senses: dict[str, dict[str, JsonValue]]

    @staticmethod
    def of(decoder: Any, config: Any) -> ModelIdentity:
        """Describe a decoder; what it does not have is None.

        Args:
            decoder: Transformers config of the decoder.
            config: config of the whole model.
        """
        found = decoder.to_dict()  # attributes raise where layers differ
        fields = {name: plain(found.get(name)) for name in ModelIdentity.model_fields}
        return ModelIdentity.model_validate({**fields, "senses": _senses(decoder, config)})

    def without_senses(self) -> ModelIdentity:
        """Leave the senses out, for a cache that read text alone."""
        return self.model_copy(update={"senses": {}})

    def difference(self, other: ModelIdentity) -> str | None:
        """Say in which field two models differ; None for alike.

        Senses are compared as far as both have them.
        """
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "senses":
                name, mine, theirs = _differing_sense(mine, theirs)
            if mine != theirs:
                return f"{name} is {mine!r} in the one and {theirs!r} in the other"
        return None

    def differing_sense(self, config: Any) -> str | None:
        """Say in which field of the senses a model's config differs."""
        decoder = config.get_text_config(decoder=True)
        return self.difference(self.model_copy(update={"senses": _senses(decoder, config)}))


def _senses(decoder: Any, config: Any) -> dict[str, dict[str, JsonValue]]:
    """Collect the configs beside the decoder's, without common fields."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    common = (PreTrainedConfig().to_dict().keys() if parts else set()) - {"model_type"}
    return {
        name: {key: plain(value) for key, value in part.to_dict().items() if key not in common}
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig) and part is not decoder
    }


def _differing_sense(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any]:
    """Find the first shared field that differs, with both values."""
    for part, fields in mine.items():
        for name, value in fields.items():
            if part in theirs and name in theirs[part] and value != theirs[part][name]:
                return f"{part}.{name}", value, theirs[part][name]
    return "senses", None, None


def weight_samples(model: Any) -> dict[str, list[float]]:
    """Sample a few numbers of a few parameters, by the parameter's name.

    They tell models of one shape apart. Adapters of PEFT that act are sampled apart; other parameters have the names
    that they have without adapters.

    Args:
        model: a torch module. Parameters that are quantised, not in memory, or of a tensor subclass are left out.
    """
    own, adapters = _parameters(model)
    groups = [own, *adapters.values()]
    return {name: _sample(group[name]) for group in groups for name in spread(list(group), _PARAMETERS)}


def differing_weight(samples: dict[str, list[float]], model: Any) -> str | None:
    """Find a parameter that differs from its sample; None without one.

    Args:
        samples: samples by `weight_samples`.
        model: a torch module. Its dtype may differ. Its own weights may be missing in part, where they are quantised
            or not in memory, but not all of them; the adapters that act must be the same.
    """
    own, adapters = _parameters(model)
    acting = {name: parameter for group in adapters.values() for name, parameter in group.items()}
    sampled = {name.rsplit(":", 1)[0] for name in samples if name.startswith(ADAPTER)}
    if extra := adapters.keys() - sampled:
        return next(name for name in acting if name.rsplit(":", 1)[0] in extra)
    known = 0
    for name, numbers in samples.items():
        parameter = own.get(name, acting.get(name))
        if parameter is None:
            if name.startswith(ADAPTER):
                return name
            continue
        known += 1
        if _differs(parameter, numbers):
            return name
    return None if known or not samples else next(iter(samples))


class WeightWatch:
    """Weights of a model at one time, to compare with later ones.

    Attributes:
        samples: samples by `weight_samples`.
    """

    def __init__(self, model: Any) -> None:
        self.samples = weight_samples(model)
        self._state = _adapter_state(model)
        own, adapters = _parameters(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = (own, *adapters.values())
        self._places = {name: names[id(group[name])] for group in groups for name in group if name in self.samples}

    def difference(self, model: Any) -> str | None:
        """Find a parameter that has changed; None without one.

        It is far faster than `weight_samples`.
        """
        if _adapter_state(model) == self._state:
            try:
                found = {name: model.get_parameter(place) for name, place in self._places.items()}
            except AttributeError:  # its modules are others
                found = {}
            if found and all(map(_can_be_read, found.values())):
                return next((name for name in found if _differs(found[name], self.samples[name])), None)
        return differing_weight(self.samples, model)


def _adapter_state(model: Any) -> list[Any]:
    """List the acting and the merged adapters of each layer."""
    return [(id(layer), _acting(layer), list(layer.merged_adapters)) for layer in _adapted(model)]


def _adapted(model: Any) -> list[Any]:
    """Find PEFT's layers; `modules()` takes three times as long."""
    waiting, found = [model], []
    while waiting:
        module = waiting.pop()
        waiting += [child for child in module._modules.values() if child is not None]
        if getattr(type(module), "adapter_layer_names", ()):
            found.append(module)
    return found


def is_near(here: float, there: float) -> bool:
    """Tell if two numbers of a weight are the same, in whatever dtype each was held."""
    return abs(here - there) <= _ROUNDING * max(abs(here), abs(there)) + _LEAST


def _differs(parameter: torch.Tensor, numbers: list[float]) -> bool:
    pairs = zip(_sample(parameter), numbers, strict=False)
    return min(parameter.numel(), _NUMBERS) != len(numbers) or not all(is_near(*pair) for pair in pairs)


def _parameters(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Collect readable parameters, those of acting adapters apart by "adapter:NAME".

    Weights that an adapter is merged into are left out: merged or not, the adapter is the same.
    """
    adapter_of: dict[int, str | None] = {}  # by the parameter; None for those that do not act, or are not the model's
    for layer in _adapted(model):
        acting = _acting(layer)
        for part in map(layer._modules.get, (*layer.adapter_layer_names, *layer.other_param_names)):
            for name, parameter in part.named_parameters() if part is not None else ():
                adapter = name.split(".")[0]
                adapter_of[id(parameter)] = adapter if adapter in acting else None
        base = layer._modules.get("base_layer")
        if layer.merged_adapters and base is not None:
            adapter_of.update(dict.fromkeys(map(id, base.parameters())))
    own: dict[str, torch.Tensor] = {}
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not _can_be_read(parameter):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if id(parameter) not in adapter_of:
            own[plain] = parameter
        elif (adapter := adapter_of[id(parameter)]) is not None:
            group = ADAPTER + adapter
            adapters.setdefault(group, {})[f"{group}:{plain}"] = parameter
    return own, adapters


def _acting(layer: Any) -> list[str]:
    """List the adapters of one of PEFT's layers that have an effect."""
    return [] if layer.disable_adapters else list(layer.merged_adapters or layer.active_adapters)


def _can_be_read(parameter: torch.Tensor) -> bool:
    # Quantised weights can be tensors of other classes (torchao), which look like floats and cannot be indexed.
    return (
        type(parameter) in (torch.Tensor, torch.nn.Parameter)
        and parameter.is_floating_point()
        and parameter.itemsize > 1
        and not parameter.is_meta
        and bool(parameter.numel())
    )


def _sample(parameter: torch.Tensor) -> list[float]:
    flat = parameter.detach().flatten()
    index = torch.tensor(spread(range(flat.numel()), _NUMBERS), device=flat.device)
    return flat[index].float().tolist()


def spread(items: Any, count: int) -> list[Any]:
    """Choose at most `count` of the items, evenly spread, from within."""
    count = min(count, len(items))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
