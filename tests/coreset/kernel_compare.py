"""What the Triton kernel computes beside the PyTorch version and the paper; for a process of its own.

Triton takes its interpreter, or not, once and for all of a process: see `test_kernels.py`.
"""

import tests.interpreter  # noqa: F401  # isort: skip  # before any kernel is imported

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

from tests.coreset.kernel_cases import Case, Comparison
from wildcat_kv.coreset import noise, reference
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.compresskv import compress_bins
from wildcat_kv.coreset.draws import GivenDraws, KeyedDraws
from wildcat_kv.coreset.kernels import device
from wildcat_kv.coreset.kernels.noise import absorb, gumbel_row

torch.set_num_threads(1)


def beside_torch(case: Case) -> Comparison:
    """Compare the kernel with the PyTorch version."""
    tokens, options, layout = case.tokens(), case.options(), BinLayout.build(case.n, case.rank, case.bins)
    assert device.supports(tokens, layout, options), case
    draws = KeyedDraws(layout, case.seed, 3, case.n, case.rows)
    if case.given:
        draws = GivenDraws(draws.gumbel(range(case.heads), range(case.bins)).flip(-2))
    theirs, source = compress_bins(tokens, layout, draws, options)
    ours = device._compress(tokens, layout, draws, options)
    both = [(getattr(ours, name), getattr(theirs, name)) for name in ("keys", "values", "weights", "valid")]
    assert [(our.shape, our.dtype) for our, _ in both] == [(their.shape, their.dtype) for _, their in both]
    empty = ~ours.valid
    assert not any(bool(our[empty].any()) for our, _ in both)
    found = theirs.valid & ours.valid
    largest = float(theirs.values.float().abs().max().clamp_min(1.0))
    masses = 1.0 if tokens.weights is None else float(tokens.weights.abs().sum(-1).max().clamp_min(1.0))
    return Comparison(
        slots=int(found.sum()),
        marks=int((theirs.valid != ours.valid).sum()),
        pivots=int(((source != ours.source) | (theirs.keys != ours.keys).any(-1))[found].sum()),
        weights=_largest((theirs.weights - ours.weights)[found]) / masses,
        values=_largest((theirs.values.float() - ours.values.float())[found]) / largest,
    )


def beside_reference(case: Case) -> Comparison:
    """Compare a whole compression by the kernel with the paper in plain lines, head by head."""
    tokens, options, layout = case.tokens(), case.options(), BinLayout.build(case.n, case.rank, case.bins)
    draws = KeyedDraws(layout, case.seed, 3, case.n, case.rows)
    gumbel = layout.tokens.line(draws.gumbel(range(case.heads), range(case.bins)).transpose(-1, -2))
    with on_cpu():
        coreset, source = compress_bins(tokens, layout, draws, options)
    slots, pivots, weights, values = 0, 0, 0.0, 0.0
    for row in range(case.rows):
        for head in range(case.heads):
            K, V = tokens.keys[row, head], tokens.values[row, head]
            K_S, U, w = reference.compress_kv(
                K, V, case.rank, gumbel[row, head].T, scale=options.scale, R_Q=case.query_norm, B=case.bins,
                rule=case.temperature,
            )  # fmt: skip
            assert bool(coreset.valid[row, head].all()) and len(K_S) == case.rank
            places, order = (K_S[:, None] - K.double()).abs().sum(-1).argmin(-1).sort()
            slots += len(places)
            pivots += int((places != source[row, head]).sum())
            weights = max(weights, _largest(w[order] - coreset.weights[row, head]))
            values = max(values, _largest(U[order] - coreset.values[row, head]) / float(U.abs().max().clamp_min(1.0)))
    return Comparison(slots, 0, pivots, weights, values)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let the kernel serve tensors on the CPU."""
    device._devices.add("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it would say that PyTorch takes over
            yield
    finally:
        device._devices.discard("cpu")


def compare(cases: list[Case], with_reference: bool) -> list[Comparison]:
    """Compare the kernel in some cases."""
    return [(beside_reference if with_reference else beside_torch)(case) for case in cases]


@triton.jit
def _fill(out, key: tl.int64, head, bin, steps, C: tl.constexpr):
    state = absorb(absorb(key.to(tl.uint64), head), bin)
    for step in range(steps):
        places = tl.arange(0, C)
        tl.store(out + step * C + places, gumbel_row(absorb(state, tl.full((), step, tl.int64)), places))


def own_noise(key: int, head: int, bin: int, steps: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise in a kernel and in PyTorch: float32 (steps, columns) each."""
    out = torch.empty(steps, columns)
    _fill[1,](out, key, head, bin, steps, C=columns)
    counters = (torch.tensor(head), torch.tensor(bin), torch.arange(steps))
    return out, noise.gumbel_rows(key, *counters, columns=columns)


def _largest(differences: torch.Tensor) -> float:
    return float(differences.abs().max()) if differences.numel() else 0.0
