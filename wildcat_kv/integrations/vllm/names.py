"""Names by which vLLM finds the parts of the plugin."""

from __future__ import annotations

CONNECTOR = "WildCatConnector"
MIDDLEWARE = "wildcat_kv.integrations.vllm.middleware.ContextMiddleware"
