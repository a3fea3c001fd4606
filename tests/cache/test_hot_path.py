"""One decoded token between two folds: nothing waits for the device."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache
from wildcat_kv.hook.keyword import CACHE

# Operations whose result, or the shape of it, the host has to know.
READING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"}
# Methods of a tensor that copy it to the host, of which the dispatcher sees nothing where it is there already.
TO_HOST = {"cpu", "tolist", "numpy", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"}


class Operations(TorchDispatchMode):
    """Lists the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.strip("_").startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for part in args
            if isinstance(part, (list, tuple))
            for index in part
        )
        if name in READING or masks:
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Lists the calls that copy a tensor to the host."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        there = [*args[1:], *(kwargs or {}).values()]
        moves = name == "to" and any(str(each) == "cpu" for each in there if isinstance(each, (str, torch.device)))
        if (moves and args[0].device.type != "cpu") or name in TO_HOST:
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


def waits(work):
    """Collect what waits for the device while `work` is done."""
    with Methods() as methods, Operations() as operations:
        work()
    return methods.waiting + operations.waiting


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["wildcat", "query_wildcat"])
@torch.no_grad()
def test_a_step_waits_for_nothing(model, method, bits, masked):
    cache = CompressedCache(model.config, compressor=method, ratio=0.25, sink=4, bits=bits)

    def read(ids):
        seen = cache.get_seq_length() + ids.shape[1]
        mask = torch.ones(2, seen, dtype=torch.int64) if masked else None
        return lambda: model(ids, **{CACHE: cache}, attention_mask=mask)

    assert waits(read(random_ids(2, 200)))  # of a prompt, which folds
    for step in range(4):
        work = read(random_ids(2, 1, seed=step))
        assert waits(work) == []


def test_the_watch_sees_what_waits():
    numbers = torch.arange(4.0)
    for work in (
        lambda: bool(numbers.any()),
        lambda: numbers.sum().item(),
        lambda: numbers.tolist(),
        lambda: numbers[numbers > 1],
        lambda: numbers.nonzero(),
        lambda: numbers.cpu(),
        lambda: numbers.new_zeros(4).masked_select(numbers > 1),
        lambda: int(numbers[0]),
    ):
        assert waits(work)
    assert waits(lambda: numbers.clone().masked_fill_(numbers > 1, 0.0).to(torch.float64)) == []
