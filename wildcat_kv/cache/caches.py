"""The caches: Transformers caches whose full-attention layers are compressed."""

from __future__ import annotations

import copy
import operator
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from typing_extensions import Self

from wildcat_kv.cache.disk import persistence
from wildcat_kv.cache.error_report import ErrorReport
from wildcat_kv.cache.layer import Shared, WildCatLayer
from wildcat_kv.cache.positions import RopeDeltas, names_positions
from wildcat_kv.cache.sizes import cache_bytes, layer_tensors, stored_entries, stored_tokens
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.static import StaticShared, StaticWildCatLayer
from wildcat_kv.compressors import Compressor, resolve
from wildcat_kv.config import WildCatConfig
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.hook.marks import NAME, AttentionName
from wildcat_kv.models.identity import ModelIdentity
from wildcat_kv.models.rope import check_images, rotation_limit, rotations_of
from wildcat_kv.models.support import cache_layers, decoder_config, dropped_from


class CompressedCache(Cache):
    """A Transformers cache that keeps its full-attention layers within a budget, by any method.

    Pass it to `generate(cache=...)` or to the model; before Transformers 5.24 that argument is `past_key_values=...`.
    Constructing it switches the config's attention implementation to "wildcat", which does what the previous one did
    wherever nothing is compressed, with other caches too; the switch can stay. It is for inference: compressed layers
    keep keys and values without their gradients.

    Args:
        config: the model's own config, `model.config`; a copy of it never reaches the model.
        settings: the budget and the exact ends; or give its fields by name.
        compressor: the method: a name from `wildcat_kv.compressors.available()`, or a `Compressor`.
        offloading: keep keys and values on the CPU while other layers work, as Transformers' own offloaded
            cache does; needs CUDA.
        offload_only_non_sliding: leave sliding-window layers on their device.
        static: with `max_tokens`: keep all shapes and addresses fixed, so that decoding can be compiled, see
            `compile_decoding`; not for models with other than full-attention layers, nor methods that learn from
            queries.
        **fields: of `WildCatConfig`: `ratio` or `max_tokens`, `sink`, `window` and so on.

    Raises:
        TypeError: config is no Transformers config, or compressor no method.
        ValueError: settings that do not fit, a name that is no method's, a model that cannot be compressed, or
            offloading without CUDA.

    Example:
        cache = CompressedCache(model.config, compressor="snapkv", ratio=0.25)
        out = model.generate(**inputs, cache=cache)
    """

    # Of a class that has one.
    _only_method: ClassVar[str | None] = None

    def __init__(
        self,
        config: Any,
        settings: WildCatConfig | None = None,
        *,
        compressor: str | Compressor,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        static: bool = False,
        **fields: Any,
    ) -> None:
        settings = _settings(settings, fields)
        compressor = resolve(compressor, settings)
        _check_bound(settings, compressor)
        if offloading and not torch.cuda.is_available():
            raise ValueError("offloading=True needs a CUDA device to offload from; leave it out on this machine")
        if offloading and compressor.waits:
            raise ValueError(
                f"offloading=True: the layers of {type(compressor).__name__} compress together, when the last has been "
                "read; leave it out, or take a method that compresses layer by layer, such as wildcat"
            )
        decoder = decoder_config(config)
        layers, full = cache_layers(decoder)
        if static:
            window = getattr(decoder, "sliding_window", None) if getattr(decoder, "use_sliding_window", True) else None
            _check_static(settings, compressor, offloading, len(full) < len(layers) or window is not None)
        exact = _exact_layers(settings, layers, full)
        positions = getattr(decoder, "max_position_embeddings", None)
        rotations = rotations_of(decoder, full) if compressor.needs_rotation else {}
        check_images(config, decoder, rotations)
        limit = rotation_limit(decoder, rotations)
        shared = StaticShared if static else Shared
        self._shared = shared(settings, compressor, positions, exact_layers=exact, rotation_limit=limit)
        sharing = [place for place, index in enumerate(full) if index not in exact]
        for place, index in enumerate(full):
            kind = StaticWildCatLayer if static else WildCatLayer
            layers[index] = kind(self._shared, index, place, sharing, rotations.get(index))
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        # To start anew from: not every layer of Transformers' can be reset in every version.
        self._beside = {index: copy.deepcopy(layer) for index, layer in enumerate(layers) if index not in full}
        self._model = ModelIdentity.of(decoder, config)
        if (length := dropped_from(decoder)) is not None:
            warnings.warn(
                f"config={type(config).__name__}: generate() of this model drops any cache where a text grows past "
                f"{length} tokens; read longer prompts by model(input_ids, {CACHE}=cache) before generate()",
                stacklevel=2,
            )
        current = decoder._attn_implementation
        if not isinstance(current, AttentionName):
            decoder._attn_implementation = AttentionName("eager" if current in (None, NAME) else str(current))

    @property
    def settings(self) -> WildCatConfig:
        """The budget and the exact ends."""
        return self._shared.settings

    @property
    def compressor(self) -> Compressor:
        """The method."""
        return self._shared.compressor

    @property
    def exact_layers(self) -> frozenset[int]:
        """The layers that are left uncompressed, by index."""
        return self._shared.exact_layers

    @property
    def static(self) -> bool:
        """Whether shapes and addresses are fixed."""
        return isinstance(self._shared, StaticShared)

    @property
    def model(self) -> ModelIdentity:
        """What the cache was built for."""
        return self._model

    @property
    def rope(self) -> RopeDeltas:
        """The positions that the model would keep on itself."""
        return self._shared.rope

    def stored_length(self, layer_idx: int | None = None) -> int:
        """Entries held a row: slots and exact tokens, and the padding among them.

        Args:
            layer_idx: the layer; by default the first that has a budget. The others hold as many, unless the
                method deals its budget out unequally between layers.
        """
        return stored_entries(self.layers[self._shared.leading if layer_idx is None else layer_idx])

    def memory_bytes(self) -> int:
        """Bytes of all tensors that the cache holds, free room included."""
        return cache_bytes(self)

    def error_report(self) -> ErrorReport:
        """How far the compressed layers' attention is estimated to be off, by layer and query head.

        The method's own estimate at the last fold, of queries to come; see `ErrorReport`. A cache from a file has none.

        Raises:
            ValueError: the method makes no estimate, or nothing has been compressed yet.

        Example:
            cache = CompressedCache(model.config, compressor="query_wildcat", ratio=0.25)
            model.generate(**inputs, cache=cache)
            print(cache.error_report())
        """
        if not self.compressor.estimates:
            raise ValueError(
                f"{type(self.compressor).__name__} does not estimate its error; take compressor='query_wildcat'"
            )
        states = {
            index: state for index, state in self._shared.states.items() if index not in self._shared.exact_layers
        }
        errors = {index: state.error.cpu() for index, state in states.items() if state.error is not None}
        if not errors:
            raise ValueError("nothing was compressed in this process yet: there is no error to report")
        kept = {index: _kept(states[index]) for index in errors}
        return ErrorReport(errors, kept)

    def reset(self) -> None:
        """Forget everything, as if new; the next text is read from its beginning."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WildCatLayer):
                layer.reset()
            else:
                self.layers[index] = copy.deepcopy(self._beside[index])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, bit for bit as if they had never been read.

        What can be taken back is what no fold has reached: everything since the last fold, or, of methods that
        learn from queries, as much of it as queries are held for, at least `window` tokens. After
        `activate_past_recording()` folds wait for `crop`, so that the last forward pass can be taken back,
        and of those since the crop before it at least `window` tokens. `crop(0)` takes nothing and folds what
        has waited.

        Args:
            tokens_to_remove: minus the number of tokens (columns, padding included).

        Raises:
            ValueError: a positive number, tokens that are folded, or a layer of Transformers' that cannot
                take tokens back. The cache is left as it was.
            RuntimeError: a forward pass failed half-way.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_in_step()
        for layer in self.layers:
            if isinstance(layer, WildCatLayer):
                layer.check_crop(tokens_to_remove)
            elif tokens_to_remove and layer_tensors(layer):
                _check_crop(layer, tokens_to_remove)
        if not self._compressed_layers()[0].get_seq_length():
            return
        for layer in self.layers:
            if tokens_to_remove or getattr(layer, "record_past", True):
                layer.crop(tokens_to_remove)
        if tokens_to_remove:
            self._shared.rope.crop(self._compressed_layers()[0].get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included. A caller that keeps positions on the model finds this cache's in place.

        Raises:
            ValueError: its positions are not known, or the model is another than the one that read.
        """
        seen = super().get_seq_length(layer_idx)
        # Only what runs can be looked at, not what is traced.
        if not torch.compiler.is_compiling() and names_positions(caller := sys._getframe(1)):
            self._shared.rope.place(caller, seen, self._model)
        return seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset for the mask of a forward pass, which begins with this call.

        Raises:
            RuntimeError: the forward pass before it failed half-way.
        """
        self.check_in_step()
        return super().get_mask_sizes(query_length, layer_idx)

    def announce_step(self, rows: int) -> Tensor:
        """Prepare a forward pass of one new token, all rows unpadded, that may be traced; of a static cache.

        Args:
            rows: of the batch.

        Returns:
            The 4D mask to pass to the model as `attention_mask`.
        """
        self.check_in_step()
        layer = self._compressed_layers()[0]
        layer.announce(rows, 1, None)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layer.device)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Of a linear-attention layer; see Transformers. Its state alone does not tell what it has read."""
        self._shared.begun = self._shared.begun or layer_idx < min(self._shared.states)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        self._shared.begun = self._shared.begun or layer_idx < min(self._shared.states)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; int64 (k,), rows may be left out or repeated."""
        self._shared.padded = self._shared.padded and None
        self._shared.rope.select_rows(beam_idx)
        # Read by the host once, and only where rows differ in what they hold.
        on_host = None if all(layer.state.alike for layer in self._compressed_layers()) else beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, WildCatLayer):
                layer.select_rows(beam_idx, on_host)
            else:
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side: several questions of one context.

        Raises:
            ValueError: repeats is no positive integer.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats={repeats!r} must be a positive integer, the copies of each row")
        self.reorder_cache(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep some rows, in the given order; rows may be repeated.

        Args:
            indices: int64 (k,) or a sequence of integers, negative ones counted from the end; or a bool mask
                over the rows.

        Raises:
            ValueError: rows that are not there, or none at all. The cache is left as it was.
        """
        rows, indices = self._rows(), torch.as_tensor(indices)
        if not rows:
            return
        kept = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        wrong_mask = indices.dtype == torch.bool and indices.shape != (rows,)
        if wrong_mask or kept.dim() != 1 or not kept.numel() or not -rows <= int(kept.min()) <= int(kept.max()) < rows:
            raise ValueError(
                f"indices={indices.tolist()} must name rows of the batch, of which the cache holds {rows}: int64 "
                "(k,), or a bool mask over all rows with at least one of them True"
            )
        self.reorder_cache(torch.where(kept < 0, kept + rows, kept))

    def go_on_from(self, other: CompressedCache) -> None:
        """Take over the positions of a cache that has read as many tokens and rows."""
        self._shared.rope = RopeDeltas(other.rope.carry(self.get_seq_length()))

    def clone(self) -> Self:
        """An independent copy: what is read into one is not seen by the other. The same as `copy.deepcopy`."""
        return copy.deepcopy(self)

    def fresh(self, settings: WildCatConfig | None = None) -> Self:
        """A cache of the same kind that has read nothing.

        Args:
            settings: another budget, which leaves the same layers exact.

        Raises:
            ValueError: it leaves others exact, or is a limit that the method cannot keep to.
        """
        if settings is not None:
            _check_bound(settings, self.compressor)
            exact = _exact_layers(settings, self.layers, list(self._shared.states))
            if exact != self.exact_layers:
                raise ValueError(
                    f"settings.exact_layers={list(settings.exact_layers)}: the cache leaves layers "
                    f"{sorted(self.exact_layers)} exact; give settings that do, too"
                )
        twin = self.clone()
        twin._shared.settings = settings or self.settings
        twin.reset()
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, to be loaded by another process.

        The file is complete or not there at all. It carries the settings and the shape of the model, not
        its weights: load it with the model that read the context.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            ValueError: nothing was read yet, or a layer of a kind that cannot be saved.
            RuntimeError: a forward pass failed half-way.
            OSError: the file cannot be written.
        """
        self._synchronize()
        persistence.write(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Self:
        """Read what `save` wrote.

        On the CPU the file is mapped into memory, not copied: processes that load one file share it, and pages are
        copied as they are written to. Do not write to the file itself while a cache uses it; `save` replaces it.
        A `clone()` of it goes on bit for bit as the cache that was saved; read in place, sums can differ in their last
        bits where a processor's kernels depend on how memory is aligned.

        Args:
            path: of the file.
            config: the config of the model that will go on, `model.config`.
            device: where to put the tensors. Full-attention layers follow the model from there by themselves;
                layers that Transformers keeps (sliding windows, linear attention) stay, so give theirs.
            **options: further arguments of the class. The settings are the file's, and so is the method, if it is one
                of ours; another must be given as `compressor`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no file of ours, a damaged one, one of another version, or of another model or method.
                Nothing is changed then.
        """
        return cls.restored(persistence.read(path, config, device), config, **options)

    @classmethod
    def restored(cls, saved: persistence.SavedContext, config: Any, **options: Any) -> Self:
        """The cache that was saved, from a file that was read; see `load`."""
        given = options.get("compressor") or cls._only_method
        method = given if isinstance(given, Compressor) else saved.method(given)
        saved.check_method(method)
        if cls._only_method is None:
            options["compressor"] = method
        cache = cls(config, saved.settings, **options)
        saved.restore(cache)
        return cache

    def check_in_step(self) -> None:
        """Refuse to go on from a forward pass that failed half-way.

        Raises:
            RuntimeError: some layers have read tokens that others have not.
        """
        layers = self._compressed_layers()
        windows = [layer for layer in self.layers if getattr(layer, "is_sliding", False)]
        if self._shared.begun or len({layer.get_seq_length() for layer in (*layers, *windows)}) > 1:
            raise RuntimeError(
                "some layers have read tokens that others have not: an earlier forward pass failed half-way, then call "
                "cache.reset() and read the text again; or the model has fewer layers than its config says"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._synchronize()
        # The method has no state, and a stream of the device cannot be copied: both are shared.
        for shared in (self.compressor, getattr(self, "prefetch_stream", None)):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __repr__(self) -> str:
        layers, mebibytes = self._compressed_layers(), self.memory_bytes() / 2**20
        return (
            f"{type(self).__name__}({self._chosen()}; {len(layers)} of {len(self.layers)} layers compressed; "
            f"{layers[0].get_seq_length()} tokens seen, {stored_tokens(self):.0f} stored, {mebibytes:.1f} MiB)"
        )

    def _chosen(self) -> str:
        """The method and the settings that are not its own."""
        budget = self.settings.model_dump(exclude_none=True, exclude={"temperature", "weights", "seed"})
        return ", ".join([repr(self.compressor), *(f"{name}={value!r}" for name, value in budget.items())])

    def _synchronize(self) -> None:
        """Wait for copies to and from the device, and for compiled steps: the host is about to read them."""
        layers = [layer for layer in self._compressed_layers() if layer.is_initialized] if self.offloading else []
        for layer in self._compressed_layers():
            layer.state  # noqa: B018  # a static layer catches up
        for layer in layers:
            layer.wait()
            if layer.device.type == "cuda":
                torch.cuda.synchronize(layer.device)

    def _compressed_layers(self) -> list[WildCatLayer]:
        return [layer for layer in self.layers if isinstance(layer, WildCatLayer)]

    def _rows(self) -> int:
        """Rows of the batch, 0 before the first forward pass."""
        return self._compressed_layers()[0].batch_rows


class WildCatCache(CompressedCache):
    """A Transformers cache that compresses keys and values by WildCat (arXiv 2602.10056).

    Args:
        config: the model's own config, `model.config`.
        settings: a `WildCatConfig`; or give its fields by name.
        offloading: keep keys and values on the CPU while other layers work; needs CUDA.
        offload_only_non_sliding: leave sliding-window layers on their device.
        static: with `max_tokens`: fixed shapes, so that decoding can be compiled, see `compile_decoding`.
        **fields: `ratio=0.25` to keep a quarter of the tokens, or `max_tokens=1024` to bound them, and
            further fields of `WildCatConfig`.

    Raises:
        TypeError: config is no Transformers config.
        ValueError: settings that do not fit, a model that cannot be compressed, or offloading without CUDA.

    Example:
        cache = WildCatCache(model.config, ratio=0.25)
        out = model.generate(**inputs, cache=cache)
    """

    _only_method = "wildcat"

    def __init__(
        self,
        config: Any,
        settings: WildCatConfig | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        static: bool = False,
        **fields: Any,
    ) -> None:
        settings = _settings(settings, fields)
        super().__init__(
            config,
            settings,
            compressor=self._only_method,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
            static=static,
        )

    def _chosen(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.model_dump(exclude_none=True).items())


def _kept(state: LayerState) -> float:
    """The share of the tokens seen that a layer holds, on average over rows and heads."""
    seen = torch.tensor([max(1, row.seen) for row in state.progress.rows], dtype=torch.float64)
    return float((state.entries.valid.sum(-1).cpu().double().mean(1) / seen).mean())


def _settings(settings: WildCatConfig | None, fields: dict[str, Any]) -> WildCatConfig:
    if settings is None:
        return WildCatConfig(**fields)
    if not isinstance(settings, WildCatConfig):
        raise ValueError(f"settings={settings!r} is no WildCatConfig; pass ratio=... or max_tokens=... by name")
    if fields:
        raise ValueError(f"{', '.join(fields)} given beside settings; put them into the WildCatConfig")
    return settings


def _check_bound(settings: WildCatConfig, compressor: Compressor) -> None:
    """Refuse a limit or a tolerance that the method cannot keep to."""
    if settings.max_tokens is not None and not compressor.decodes:
        raise ValueError(
            f"max_tokens={settings.max_tokens}: {type(compressor).__name__} compresses the prompt alone, so what "
            "is generated cannot be bounded; give a ratio, or another compressor"
        )
    if settings.ratio == "auto" and not compressor.estimates:
        raise ValueError(
            f"ratio='auto': {type(compressor).__name__} does not estimate its error; give a number, or take "
            "compressor='query_wildcat'"
        )
    own = getattr(compressor, "tolerance", None)
    if compressor.estimates and own != settings.tolerance:
        raise ValueError(
            f"tolerance={settings.tolerance}: {type(compressor).__name__} was made with tolerance={own}; give both the "
            "same, or name the method"
        )


def _exact_layers(settings: WildCatConfig, layers: Sequence[Any], full: Sequence[int]) -> frozenset[int]:
    """The layers to leave uncompressed, by index.

    Raises:
        ValueError: an index that is no full-attention layer's, or nothing left to compress.
    """
    named = f"exact_layers={list(settings.exact_layers)}"
    found = set()
    for index in settings.exact_layers:
        layer = index + len(layers) if index < 0 else index
        if layer not in full:
            raise ValueError(
                f"{named}: layer {index} is none of those that can be compressed, {list(full)}; name some of these"
            )
        found.add(layer)
    if len(found) == len(full):
        raise ValueError(f"{named}: nothing is left to compress; leave some of {list(full)} out")
    return frozenset(found)


def _check_static(settings: WildCatConfig, compressor: Compressor, offloading: bool, windows: bool) -> None:
    """Refuse what has no fixed shapes, or would need more of a traced step than keys and values."""
    method = type(compressor).__name__
    if settings.max_tokens is None:
        raise ValueError(f"static=True with ratio={settings.ratio}: what is stored grows; give max_tokens instead")
    if compressor.needs_queries or compressor.state_size:
        raise ValueError(
            f"static=True: {method} learns from the queries of every token; take a method that needs keys and values "
            "only, such as wildcat"
        )
    if offloading:
        raise ValueError("static=True with offloading=True: addresses change when layers move; choose one of them")
    if windows:  # one that is wider than the positions too: the model would ask for its mask
        raise ValueError(
            "static=True: the model has layers with windows or of other kinds; leave it out for this model"
        )


def _check_crop(layer: Any, tokens_to_remove: int) -> None:
    """Refuse what a layer of Transformers' would refuse after others were cropped, or would do wrongly."""
    name, refused = type(layer).__name__, f"tokens_to_remove={tokens_to_remove}"
    if not layer.is_croppable:
        raise ValueError(f"{refused}: {name} keeps no past to go back to; reset() the cache and read the text again")
    if getattr(layer, "is_sliding", False):
        left, held = layer.get_seq_length() + tokens_to_remove, layer.keys.shape[-2] + tokens_to_remove
        dropped = held < min(left, layer.sliding_window - 1)
    else:
        dropped = not getattr(layer, "record_past", True)
    if dropped:
        raise ValueError(
            f"{refused}: {name} has dropped older tokens that would be in sight again; call "
            "cache.activate_past_recording() before the tokens to take back are read, and crop once"
        )
