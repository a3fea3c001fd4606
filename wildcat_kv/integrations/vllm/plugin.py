"""Entry point of vLLM's plugins: registers the connector and the backends in each of its processes."""

from __future__ import annotations

from wildcat_kv.integrations.vllm.names import CONNECTOR
from wildcat_kv.integrations.vllm.versions import check_version

_PACKAGE = "wildcat_kv.integrations.vllm"


def register() -> None:
    """Register what vLLM may be asked for; nothing changes for those who do not ask.

    Raises:
        ValueError: a vLLM outside of the tested range.
    """
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_version(vllm.__version__)
    if CONNECTOR in KVConnectorFactory._registry:  # a process may load plugins twice
        return
    KVConnectorFactory.register_connector(CONNECTOR, f"{_PACKAGE}.connector", CONNECTOR)
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{_PACKAGE}.backend.CPU")
    register_backend(AttentionBackendEnum.CUSTOM, f"{_PACKAGE}.backend.CUDA")
