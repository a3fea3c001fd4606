"""What makes two models alike to a cache: the shape of their keys and values, how positions are written in, weights."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from transformers import PreTrainedConfig

from wildcat_kv.validation import plain

# Parameters that are looked at, evenly spread over the model, and numbers of each.
_PARAMETERS = 8
_NUMBERS = 8
# Further apart than a weight and itself in bfloat16 or, near 0, in float16.
_ROUNDING, _LEAST = 0.01, 1e-6
# Before the name of an adapter's parameter.
_ADAPTER = "adapter:"


class ModelIdentity(BaseModel):
    """The parts of a decoder's config that a stored context depends on. Its weights are not among them.

    Attributes:
        model_type: the architecture, as Transformers names it.
        num_hidden_layers: layers.
        layer_types: the kind of each layer, None where all are alike.
        sliding_window: tokens that sliding-window layers see, None where there are none.
        hidden_size: channels of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: key heads; a list where layers differ.
        head_dim: channels of a key, None where it follows from the others.
        vocab_size: tokens of the vocabulary.
        rope_parameters: of the rotary positions, None where there are none.
        senses: the configs of the other parts (vision, audio) by name, empty where there are none.
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
            decoder: its Transformers config.
            config: that of the whole model.
        """
        found = decoder.to_dict()  # attributes raise where layers differ
        fields = {name: plain(found.get(name)) for name in ModelIdentity.model_fields}
        return ModelIdentity.model_validate({**fields, "senses": _senses(decoder, config)})

    def without_senses(self) -> ModelIdentity:
        """The same for a cache that has read text alone, which the other parts do not matter to."""
        return self.model_copy(update={"senses": {}})

    def difference(self, other: ModelIdentity) -> str | None:
        """The first field in which they differ, as "name: this one's and that one's"; None for alike.

        The senses count as far as both have them.
        """
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "senses":
                name, mine, theirs = _differing_sense(mine, theirs)
            if mine != theirs:
                return f"{name} is {mine!r} in the one and {theirs!r} in the other"
        return None

    def differing_sense(self, config: Any) -> str | None:
        """The first field of the senses that is another in the whole model's config, as in `difference`."""
        decoder = config.get_text_config(decoder=True)
        return self.difference(self.model_copy(update={"senses": _senses(decoder, config)}))


def _senses(decoder: Any, config: Any) -> dict[str, dict[str, JsonValue]]:
    """The configs beside the decoder's, without the fields that every config has."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    common = (PreTrainedConfig().to_dict().keys() if parts else set()) - {"model_type"}
    return {
        name: {key: plain(value) for key, value in part.to_dict().items() if key not in common}
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig) and part is not decoder
    }


def _differing_sense(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first field that differs, with both its values; of parts and fields that one alone has, none do."""
    for part, fields in mine.items():
        for name, value in fields.items():
            if part in theirs and name in theirs[part] and value != theirs[part][name]:
                return f"{part}.{name}", value, theirs[part][name]
    return "senses", None, None


def weight_samples(model: Any) -> dict[str, list[float]]:
    """Take a few numbers of a few parameters, by the parameter's name: they tell models of one shape apart.

    Adapters of PEFT are sampled by themselves, those that act alone. The other names are those of the model without
    them.

    Args:
        model: a torch module. Parameters that are quantised, not in memory, or tensors of a class of their own are
            left out.
    """
    own, adapters = _parameters(model)
    groups = [own, *adapters.values()]
    return {name: _sample(group[name]) for group in groups for name in _spread(list(group), _PARAMETERS)}


def differing_weight(samples: dict[str, list[float]], model: Any) -> str | None:
    """The first parameter whose sample is another in this model, None for none; the dtype may differ.

    Args:
        samples: of `weight_samples`.
        model: a torch module. Its own weights may be missing in part, where they are quantised or not in memory, but
            not all of them; the adapters that act must be the same.
    """
    own, adapters = _parameters(model)
    acting = {name: parameter for group in adapters.values() for name, parameter in group.items()}
    sampled = {name.rsplit(":", 1)[0] for name in samples if name.startswith(_ADAPTER)}
    if extra := adapters.keys() - sampled:
        return next(name for name in acting if name.rsplit(":", 1)[0] in extra)
    known = 0
    for name, numbers in samples.items():
        parameter = own.get(name, acting.get(name))
        if parameter is None:
            if name.startswith(_ADAPTER):
                return name
            continue
        known += 1
        if _differs(parameter, numbers):
            return name
    return None if known or not samples else next(iter(samples))


class WeightWatch:
    """The weights of a model at one time, to tell later whether they are the same.

    Attributes:
        samples: of `weight_samples`.
    """

    def __init__(self, model: Any) -> None:
        self.samples = weight_samples(model)
        self._state = _adapter_state(model)
        own, adapters = _parameters(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = (own, *adapters.values())
        self._places = {name: names[id(group[name])] for group in groups for name in group if name in self.samples}

    def difference(self, model: Any) -> str | None:
        """The first parameter that has become another, None for none; takes far less time than the first look."""
        if _adapter_state(model) == self._state:
            try:
                found = {name: model.get_parameter(place) for name, place in self._places.items()}
            except AttributeError:  # its modules are others
                found = {}
            if found and all(map(_can_be_read, found.values())):
                return next((name for name in found if _differs(found[name], self.samples[name])), None)
        return differing_weight(self.samples, model)


def _adapter_state(model: Any) -> list[Any]:
    """Which adapters act in which layer, and which are merged into its weights."""
    return [(id(layer), _acting(layer), list(layer.merged_adapters)) for layer in _adapted(model)]


def _adapted(model: Any) -> list[Any]:
    """The layers of PEFT's within a model. As `modules()`, which takes three times as long to name them all."""
    waiting, found = [model], []
    while waiting:
        module = waiting.pop()
        waiting += [child for child in module._modules.values() if child is not None]
        if getattr(type(module), "adapter_layer_names", ()):
            found.append(module)
    return found


def _differs(parameter: torch.Tensor, numbers: list[float]) -> bool:
    pairs = zip(_sample(parameter), numbers, strict=False)
    return min(parameter.numel(), _NUMBERS) != len(numbers) or any(
        abs(here - there) > _ROUNDING * max(abs(here), abs(there)) + _LEAST for here, there in pairs
    )


def _parameters(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """The parameters of a model by name, and those of PEFT's adapters that act, by "adapter:its name" before.

    Only those that can be read, and no weights that an adapter is merged into: with it or beside it, it is the same.
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
            group = _ADAPTER + adapter
            adapters.setdefault(group, {})[f"{group}:{plain}"] = parameter
    return own, adapters


def _acting(layer: Any) -> list[str]:
    """The adapters of one of PEFT's layers that have an effect."""
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
    index = torch.tensor(_spread(range(flat.numel()), _NUMBERS), device=flat.device)
    return flat[index].float().tolist()


def _spread(items: Any, count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, from within."""
    count = min(count, len(items))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
