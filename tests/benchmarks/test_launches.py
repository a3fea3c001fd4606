"""How much a device has to launch, and the host to wait, while a prompt is compressed."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.launches import Launches, prefill_cost
from wildcat_kv.coreset import compresskv
from wildcat_kv.coreset.kernels import device

TOKENS = 1024  # as many launches as at 4,096


def test_only_what_runs_on_a_device_counts():
    numbers = torch.arange(6.0)
    with Launches() as launches:
        numbers.view(2, 3).T.unsqueeze(0)
        torch.empty(3)
        numbers[:0].clone()
        numbers.add_(1)
        float(numbers.sum())
        numbers[numbers > 2]
        numbers.tolist()
    assert launches.operations == {"add_": 1, "sum": 1, "gt": 1, "index": 1}
    assert launches.reads.total() == 3


@pytest.mark.parametrize(("method", "launches", "reads"), [("wildcat", 255, 1), ("query_wildcat", 565, 1)])
def test_a_fold_launches_no_more_than_it_did(method, launches, reads):
    cost = prefill_cost(method, TOKENS)
    assert 0 < cost.launches_per_layer <= launches
    assert 0 < cost.reads_per_layer <= reads
    assert cost.reads_per_pass <= (2 if method == "query_wildcat" else 0)


@pytest.mark.parametrize(("method", "launches"), [("wildcat", 40), ("query_wildcat", 325)])
def test_a_fold_by_the_kernel_launches_few(monkeypatch, method, launches):
    """In place of the kernel PyTorch compresses unseen, beside what the launch itself takes."""

    def compress(tokens, layout, draws, options):
        device._head_means(tokens.keys, tokens.valid).clone()  # the clone stands for the launch
        with _disable_current_modes(), monkeypatch.context() as inside:
            inside.setattr(device, "_devices", set())
            coreset, source = compresskv.compress_bins(tokens, layout, draws, options)
        return device.Compressed(source, coreset.valid, coreset.keys, coreset.values, coreset.weights)

    monkeypatch.setattr(device, "_devices", {"cpu"})
    monkeypatch.setattr(device, "_compress", compress)
    assert 0 < prefill_cost(method, TOKENS).launches_per_layer <= launches
