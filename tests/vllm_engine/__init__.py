"""Tests that need vLLM, in an environment of its own: `make test-vllm`."""
