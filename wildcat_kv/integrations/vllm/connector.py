"""Connector of vLLM: loads the entries of a context into the engine's cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from wildcat_kv.integrations.vllm.backend import wants_weights
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.folder import LayerTensors
from wildcat_kv.integrations.vllm.heads import heads_of_rank
from wildcat_kv.integrations.vllm.identity import ServedModel
from wildcat_kv.integrations.vllm.placeholders import read_placeholder

logger = init_logger(__name__)


@dataclass(frozen=True)
class Load:
    """Entries to load for one request.

    Attributes:
        digest: digest of the context.
        slots: entries of a head.
        start: first entry to load; those before it are in the engine's cache.
        blocks: blocks of the request, from its first token on.
        fault: reason to load nothing and to fail the request; None for none.
    """

    digest: bytes
    slots: int
    start: int
    blocks: list[int]
    fault: str | None = None


@dataclass
class Loads(KVConnectorMetadata):
    """Loads of one step.

    Attributes:
        loads: one a request.
    """

    loads: list[Load] = field(default_factory=list)


class WildCatConnector(KVConnectorBase_V1, SupportsHMA):
    """Connector that serves exported contexts.

    `kv_connector_extra_config` has `contexts`, the folder of contexts, and `weighted`, False to leave vLLM's attention
    as it is.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        root = self._kv_transfer_config.get_from_extra_config("contexts", None)
        if not root:
            raise ValueError("kv_connector_extra_config has no 'contexts'; give the folder of exported contexts")
        groups = len(kv_cache_config.kv_cache_groups)
        if groups > 1:
            raise ValueError(f"the model's cache has {groups} groups of layers, and a context fits one; serve another")
        model = vllm_config.model_config
        served = ServedModel.of(model.model, model.revision, model.hf_config)
        self._contexts = ContextFolder(Path(root), served, weighted=wants_weights(vllm_config))
        self._vocabulary = served.vocabulary
        self._block_size = vllm_config.cache_config.block_size
        self._waiting: list[Load] = []
        self._failed: set[int] = set()

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the prompt's tokens that the connector can load beyond those computed."""
        found = read_placeholder(request.prompt_token_ids or (), self._vocabulary)
        if found is None:
            return 0, False
        # At least one token is computed.
        return max(0, min(found[1], request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the blocks that entries are to be loaded into."""
        if num_external_tokens == 0:
            return
        found = read_placeholder(request.prompt_token_ids or (), self._vocabulary)
        assert found is not None
        digest, slots = found
        stop = min(slots, request.num_tokens - 1)
        own = blocks.get_block_ids()[0]
        fault = None
        if request.lora_request is not None:
            fault = "a context was read without an adapter; ask the model itself"
        elif request.num_tokens <= slots:
            fault = "a prompt ends within its context; ask something about it"
        self._waiting.append(Load(digest, slots, stop - num_external_tokens, own, fault))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hand over the loads of this step."""
        loads, self._waiting = Loads(self._waiting), []
        return loads

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Keep nothing of a finished request."""
        return False, None

    # Worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load entries; blocks that cannot be loaded fail their requests, and nothing else."""
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads)
        for load in loads.loads:
            try:
                self._load(load, forward_context.no_compile_layers)
            except (ValueError, OSError) as error:
                logger.error("A context was not loaded: %s", error)
                self._failed.update(load.blocks[load.start // self._block_size :][: -(-load.slots // self._block_size)])

    def _load(self, load: Load, layers: dict[str, Any]) -> None:
        """Copy the entries of a context into its blocks.

        Raises:
            FileNotFoundError: no context has the digest.
            ValueError: the context cannot be loaded.
        """
        if load.fault is not None:
            raise ValueError(load.fault)
        context = self._contexts.find(load.digest)
        if context.header.slots != load.slots:
            raise ValueError(f"a prompt names {load.slots} slots, and the context has {context.header.slots}")
        own = {extract_layer_index(name): layer for name, layer in layers.items() if hasattr(layer, "impl")}
        heads = heads_of_rank(context.header.heads, *self._rank)
        for found in context.layers(own, heads):
            _write(own[found.index], found, load, self._block_size)

    @cached_property
    def _rank(self) -> tuple[int, int]:
        return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: all is loaded before the pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Save nothing: contexts come from files."""

    def wait_for_save(self) -> None:
        """Return at once: nothing is saved."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Give the blocks that were not loaded since the last call."""
        failed, self._failed = self._failed, set()
        return failed


def slots_of(load: Load, block_size: int) -> Tensor:
    """Give the places in the cache of the entries to load, int64 (n,)."""
    places = torch.arange(load.start, load.slots)
    return torch.tensor(load.blocks)[places // block_size] * block_size + places % block_size


def _write(layer: Any, found: LayerTensors, load: Load, block_size: int) -> None:
    """Write entries of one layer through the backend's own update of its cache.

    Raises:
        ValueError: the entries have weights, and the backend knows none.
    """
    cache, impl = layer.kv_cache, layer.impl
    slots = slots_of(load, block_size).to(cache.device)

    def placed(tensor: Tensor) -> Tensor:
        return tensor[:, load.start :].transpose(0, 1).to(cache.device, layer.kv_cache_torch_dtype).contiguous()

    keys, values = placed(found.keys), placed(found.values)
    if hasattr(impl, "write_entries"):
        weights = None if found.weights is None else placed(found.weights)
        impl.write_entries(layer, keys, values, weights, cache, slots)
    elif found.weights is not None:
        raise ValueError(
            f"backend={type(impl).__name__} knows no weights; start the engine with --attention-backend CUSTOM, or "
            "export the context with --stock"
        )
    else:
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
