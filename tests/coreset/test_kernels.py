"""The Triton kernel that compresses, beside the PyTorch version and the paper, under Triton's interpreter.

Triton runs in a process of its own: it takes its interpreter, or not, once and for all of a process.
"""

import importlib
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.coreset.kernel_cases import WIDTHS, Case
from tests.coreset.kernel_compiling import compile_slots
from wildcat_kv import compress_kv
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.kernels import device, switch
from wildcat_kv.coreset.noise import fold_key

pytest.importorskip("triton", reason="Triton is for Linux")


def _call(name, *arguments):
    return getattr(importlib.import_module("tests.coreset.kernel_compare"), name)(*arguments)


@contextmanager
def _process(**environment):
    """Run another process with variables of its own; gives its executor."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment):
            pool.submit(int).result()  # it has begun
        yield pool


@pytest.fixture(scope="module")
def interpreted():
    """Calls functions of `kernel_compare` by name, in a process with the interpreter."""
    with _process(TRITON_INTERPRET="1") as pool:
        yield lambda name, *arguments: pool.submit(_call, name, *arguments).result()


def _cases(first, count, **fixed):
    return [Case.draw(seed, **fixed) for seed in range(first, first + count)]


def _check(interpreted, cases, *, with_reference=False):
    """Ask for the same slots and pivots, and weights within 1e-4."""
    found = interpreted("compare", cases, with_reference)
    for case, one in zip(cases, found, strict=True):
        rounding = 1e-4 if case.dtype == torch.float32 else 2.0**-6  # of values in half precision
        exact = (one.marks, one.pivots) == (0, 0)
        assert exact and one.weights <= 1e-4 and one.values <= rounding, (case, one)
    assert sum(one.slots for one in found) >= len(cases)  # it did compare


@pytest.mark.parametrize(("first", "count", "programs"), [(0, 60, 1), (100, 12, 3)])
def test_slots_are_those_of_the_pytorch_version(interpreted, first, count, programs):
    """Signed and clipped weights, both temperatures, ragged bins, exhausted points, noise of its own and given."""
    _check(interpreted, _cases(first, count, programs=programs))


@pytest.mark.parametrize("shown", [0.05, 0.6, 0.9])
def test_padding_takes_part_in_nothing(interpreted, shown):
    _check(interpreted, _cases(int(1000 * shown), 15, shown=shown))


@pytest.mark.parametrize("fixed", [{}, {"bounded": True}, {"bounded": True, "shown": 0.7}])
def test_weighted_tokens_are_drawn_by_their_importance(interpreted, fixed):
    _check(interpreted, _cases(2000 + 100 * len(fixed), 15, weighted=True, **fixed))


@pytest.mark.parametrize("temperature", ["released", "theory"])
def test_slots_are_those_of_the_paper(interpreted, temperature):
    cases = _cases(3000, 40, programs=2, temperature=temperature, kind="random", dtype=torch.float32, weights="nystrom")
    _check(interpreted, [case for case in cases if case.n // case.bins > case.rank // case.bins], with_reference=True)


def test_bins_and_ranks_are_as_large_as_claimed(interpreted):
    sizes = [(128, 16, 1), (100, 16, 1), (65, 12, 1), (130, 3, 2), (256, 31, 2)]
    _check(interpreted, [Case(seed, n=n, rank=rank, bins=bins) for seed, (n, rank, bins) in enumerate(sizes)])


@pytest.mark.parametrize("d", WIDTHS)
def test_widths_of_models_are_claimed(d):
    case = Case(0, n=480, d=d, d_v=d, rank=120, bins=10)
    assert device.supports(case.tokens(), BinLayout.build(case.n, case.rank, case.bins), case.options())


@pytest.mark.parametrize(
    "fixed", [{"n": 129}, {"rank": 17}, {"d": 257}, {"d_v": 257}, {"dtype": torch.float64}], ids=str
)
def test_what_is_too_large_is_left_to_pytorch(fixed):
    case = Case(0, **({"n": 128, "rank": 16, "d": 256, "d_v": 256} | fixed))
    layout = BinLayout.build(case.n, case.rank, case.bins)
    assert not device.supports(case.tokens(), layout, case.options())
    assert not device.supports(case.tokens(), layout, replace(case.options(), blocked=True))


def test_tensors_on_the_cpu_are_left_to_pytorch():
    case = Case(0)
    layout = BinLayout.build(case.n, case.rank, case.bins)
    assert device.supports(case.tokens(), layout, case.options())
    assert not device.serves(case.tokens(), layout, case.options())


def test_a_machine_that_cannot_compile_is_told_once_and_served_by_pytorch(monkeypatch):
    keys, values, noise = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.randn(2, 4, 40)
    wanted = compress_kv(keys, values, rank=4, noise=noise)

    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(device, "_devices", {"cpu"})
    monkeypatch.setattr(device, "_compress", fail)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        found = compress_kv(keys, values, rank=4, noise=noise)
    assert torch.equal(found.values, wanted.values) and torch.equal(found.keys, wanted.keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress_kv(keys, values, rank=4, noise=noise)


@pytest.mark.parametrize(
    ("value", "cuda", "triton", "reason"),
    [("yes", "13.0", True, "must be 1 or 0"), ("1", None, True, "no CUDA"), ("1", "13.0", False, "not installed")],
)
def test_a_switch_that_switches_nothing_on_says_so(value, cuda, triton, reason):
    with pytest.warns(UserWarning, match=f"WILDCAT_KV_KERNELS='{value}' switches nothing on: .*{reason}"):
        assert switch.kernel_devices(value, cuda, triton) == ()


def test_the_switch():
    assert switch.kernel_devices("1", "13.0", True) == ("cuda",)
    assert switch.kernel_devices("0", "13.0", True) == switch.kernel_devices("", "13.0", True) == ()


def test_memory_that_runs_out_is_no_reason_to_compress_otherwise(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(device, "_devices", {"cpu"})
    monkeypatch.setattr(device, "_compress", fail)
    with pytest.raises(torch.OutOfMemoryError):
        compress_kv(torch.randn(2, 40, 8), torch.randn(2, 40, 8), rank=4)


def test_noise_is_that_of_the_pytorch_version(interpreted):
    """Wrong bits would show: the last bit of a logarithm moves noise by 1e-6 at most."""
    for key in (0, 7, -(2**63), 2**63 - 1, fold_key(3, 5, 12345)):
        ours, theirs = interpreted("own_noise", key, 3, 1000, 5, 64)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.unique().numel() > 300


def test_the_kernel_compiles_for_a_gpu(tmp_path):
    """Without one at hand: what the interpreter takes, a compiler may not."""
    with _process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) as pool:
        assert pool.submit(compile_slots, 90).result() > 0
