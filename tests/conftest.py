"""Shared strategies and tiny models."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# They switch Triton's interpreter on, once and for all of a process: for those that ask for it.
collect_ignore = ["interpreter.py", "coreset/kernel_compare.py", "coreset/decode_compare.py"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile(
    "default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Shared out between the processes that run tests side by side.
_THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(autouse=True)
def _seeded(request):
    # Tiny models are too small to share out: more threads only wait for each other.
    torch.set_num_threads(_THREADS if request.node.get_closest_marker("real") else 1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _no_message_of_slow_work(monkeypatch):
    """Show no "Loading ..." on a slow machine: what a command says must not depend on how fast it is."""
    monkeypatch.setattr("wildcat_kv.data.downloads.DELAY", 3600.0)
