"""Find out what each layer does to queries and keys, without weights.

The model is built from its config on the meta device, so that it takes no memory. Its own code then reads four tokens,
with stand-ins for whatever needs weights: every token has the same hidden state, so that what differs between the
queries of one layer comes from their positions. A layer is left as soon as it attends.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.hook.marks import NAME, Forward, MarkedLength, mark

# Far enough apart for slow frequencies to show, and close enough for every model to have such positions.
_POSITIONS = (0, 1, 7, 250)
# A length that no text has.
_NEVER = 1 << 40


@dataclass(frozen=True)
class Seen:
    """Queries and keys of tokens that differ by position alone.

    Attributes:
        query: queries, float32 (1, query_heads, n, d).
        keys: keys, float32 (1, kv_heads, n, d).
    """

    query: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Probe:
    """Result of one probe.

    Attributes:
        model: model on the meta device; its rotary modules alone are real, with the frequencies of short texts.
        rotaries: modules that make cosines and sines, one for each class and config.
        positions: positions of the tokens, int64 (1, n).
        layers: queries and keys of each layer, by its index.
    """

    model: nn.Module
    rotaries: list[Any]
    positions: Tensor
    layers: dict[int, Seen]


def probe(config: Any, layers: Sequence[int]) -> Probe:
    """Read four tokens with a model and watch its full-attention layers.

    Args:
        config: the decoder's config; it is left as it is.
        layers: indices of all full-attention layers.

    Raises:
        Exception: whatever the model's code raises when it cannot be run in this way.
        NotImplementedError: a layer did not attend through the "wildcat" attention.
    """
    with torch.no_grad():
        model = _hollow(config)
        seen: dict[int, Seen] = {}
        with torch.device("cpu"), _StandIns():
            _read(model, layers, seen)
    if missing := sorted(set(layers) - set(seen)):
        raise NotImplementedError(f"layer {missing[0]} was not seen to attend")
    rotaries = {(type(rotary), id(getattr(rotary, "config", None))): rotary for rotary in _rotaries(model)}
    return Probe(model, list(rotaries.values()), torch.tensor([_POSITIONS], device="cpu"), seen)


def _hollow(config: Any) -> nn.Module:
    """Build a model without memory but for its rotary frequencies."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = _model_class(type(config))(config).eval()
    model.config._attn_implementation = NAME  # some make a copy of their config
    with torch.device("cpu"):
        for rotary in _rotaries(model):
            vars(rotary).update(vars(type(rotary)(getattr(rotary, "config", config)).eval()))
            _steady(rotary)
    return model


def _steady(rotary: Any) -> None:
    """Keep the frequencies of short texts for texts of any length."""
    rotary.max_seq_len_cached = rotary.original_max_seq_len = _NEVER
    config: Any = getattr(rotary, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            each["original_max_position_embeddings"] = _NEVER
            if hasattr(config, "original_max_position_embeddings"):  # the parameters are filled in from it again
                config.original_max_position_embeddings = _NEVER


def _model_class(config_class: type) -> Any:
    """Find the class of models with this config, preferably decoders."""
    for mapping in (AutoModelForCausalLM._model_mapping, AutoModel._model_mapping):
        if config_class in mapping:
            return mapping[config_class]
    # Decoders of models with images have no entry in some families.
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    for value in vars(module).values():
        model: Any = value if isinstance(value, type) and issubclass(value, PreTrainedModel) else PreTrainedModel
        if model.config_class is config_class and CACHE in inspect.signature(model.forward).parameters:
            return model
    raise NotImplementedError(f"no model with a {config_class.__name__} found")


def _rotaries(model: nn.Module) -> Iterable[Any]:
    """Yield the modules that make cosines and sines of text positions."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RotaryEmbedding") and "Vision" not in name:
            yield module


def _read(model: nn.Module, layers: Sequence[int], seen: dict[int, Seen]) -> None:
    """Run a model's forward pass, its wanted layers up to their attention."""
    config: Any = model.config
    cache = DynamicCache(config=config)
    for index in layers:
        cache.layers[index] = _Watched(index, seen)
    wanted = set(layers)
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            if indices := {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")}:
                block.forward = _until_it_attends(block.forward if indices & wanted else None)
    names = inspect.signature(model.forward).parameters
    positions = torch.tensor([_POSITIONS])
    arguments = {"input_ids": torch.zeros_like(positions), CACHE: cache, "use_cache": True}
    if "position_ids" in names:
        arguments["position_ids"] = positions
    try:
        model(**arguments)
    except Exception:  # behind the last layer nothing matters
        if not wanted <= set(seen):
            raise


def _until_it_attends(forward: Callable | None) -> Callable:
    """Make a forward pass that ends at attention and returns its input."""

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if forward is not None:
            with contextlib.suppress(_AttendedError):
                forward(hidden.as_subclass(Tensor), *args[1:], **kwargs)
        return hidden.as_subclass(_Result)

    return run


class _Result(Tensor):
    """Hidden states that pass for the result of any layer."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


class _AttendedError(Exception):
    """A layer has come to its attention."""


class _Watched(DynamicLayer):
    """A cache layer that notes the first queries and keys that attend."""

    uses_fallback = needs_module = False

    def __init__(self, index: int, seen: dict[int, Seen]) -> None:
        super().__init__()
        self._index, self._seen = index, seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return mark(key_states, value_states, self)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return MarkedLength(query_length, self), 0

    def announce(self, rows: int, queries: int, mask: Tensor | None, **told: Any) -> Forward:
        return Forward(0, queries, None, uses_fallback=False)

    def check_reading(self, query: Tensor, config: Any, options: dict[str, Any]) -> None:
        """Nothing was read before."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> NoReturn:
        self._seen.setdefault(self._index, Seen(query.float(), keys.float()))
        raise _AttendedError

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Never reached."""


class _StandIns(TorchFunctionMode):
    """Have the model's code run on weights that are not there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and args[1].is_meta:
            return _features(args[0], args[1].shape[0])
        if func is torch.addmm and args[2].is_meta:  # GPT-2's linear layer
            return _features(args[1], args[2].shape[1])
        if func is functional.embedding and args[1].is_meta:
            return torch.ones(*args[0].shape, args[1].shape[1], dtype=torch.float32)
        if func is torch.Tensor.device.__get__:
            return torch.device("cpu")
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        return func(*(_real(value) for value in args), **{name: _real(value) for name, value in kwargs.items()})


def _features(inputs: Tensor, channels: int) -> Tensor:
    """Make a linear layer's output (..., channels), the same for all tokens."""
    feature = torch.sin(1.3 * torch.arange(channels, dtype=torch.float32) + 0.7)
    return feature.expand(*inputs.shape[:-1], -1).contiguous()


def _real(value: Any) -> Any:
    """Replace a tensor on the meta device by one without memory."""
    if isinstance(value, Tensor) and value.is_meta:
        return torch.ones((), dtype=torch.float32 if value.is_floating_point() else value.dtype).expand(value.shape)
    return type(value)(map(_real, value)) if type(value) in (list, tuple) else value
