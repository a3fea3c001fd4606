"""What the Triton kernel claims, and its launch."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import Draws
from wildcat_kv.coreset.kernels.switch import DEVICES
from wildcat_kv.coreset.temperature import constant_temperature, squared_temperature
from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens

# A bin's kernel matrix is held by one program: 128 x 128 numbers are the most that fit.
_LONGEST = 128
_LARGEST_RANK = 16
_LARGEST_WIDTH = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Devices whose tensors the kernel takes; tests add the CPU, under Triton's interpreter. Empty once a launch has failed.
_devices = set(DEVICES)


class Compressed(NamedTuple):
    """The slots of all bins, in one line, as `compresskv.Coreset` has them.

    Attributes:
        source: int64 (rows, heads, rank), the token of each slot; 0 for empty ones.
        valid: bool (rows, heads, rank).
        keys: (rows, heads, rank, d).
        values: (rows, heads, rank, d_v).
        weights: float32 (rows, heads, rank).
    """

    source: Tensor
    valid: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor


def serves(tokens: WeightedTokens, layout: BinLayout, options: KernelOptions) -> bool:
    """Tell if the kernel is there, and claims these tokens."""
    return tokens.keys.device.type in _devices and supports(tokens, layout, options)


def supports(tokens: WeightedTokens, layout: BinLayout, options: KernelOptions) -> bool:
    """Tell if the kernel claims these tokens, on a device that Triton knows.

    Bins of up to 128 tokens and 16 slots, keys and values of up to 256 channels in half precision or float32.
    """
    both = (tokens.keys, tokens.values)
    return (
        not options.blocked
        and layout.longest <= _LONGEST
        and layout.bin_rank <= _LARGEST_RANK
        and all(tensor.dtype in _DTYPES and tensor.shape[-1] <= _LARGEST_WIDTH for tensor in both)
    )


def compress(tokens: WeightedTokens, layout: BinLayout, draws: Draws, options: KernelOptions) -> Compressed | None:
    """Compress all bins, as `compress_bins` does.

    Pivots and weights are those of the PyTorch version but for rounding: a draw that two points tie for to about 1e-6
    may go to the other one.

    Returns:
        The slots; None if Triton cannot compile or launch the kernel on this machine. A warning says so, once.
    """
    try:
        with torch.cuda.device_of(tokens.keys):  # Triton launches on the current device
            return _compress(tokens, layout, draws, options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(
            f"Triton cannot run the kernel that compresses ({type(error).__name__}: {error}); PyTorch compresses "
            "instead, more slowly. Triton needs a C compiler: install gcc, or uninstall triton to silence this",
            stacklevel=2,
        )
        _devices.clear()
        return None


def _compress(tokens: WeightedTokens, layout: BinLayout, draws: Draws, options: KernelOptions) -> Compressed:
    from wildcat_kv.coreset.kernels.slots import bin_slots

    keys, values = _rows_of_channels(tokens.keys), _rows_of_channels(tokens.values)
    (rows, heads, n, d), rank = keys.shape, layout.slots.total
    valid = None if tokens.valid is None else tokens.valid.contiguous()
    mass = None if tokens.weights is None else tokens.weights.to(torch.float32).contiguous()
    bound = None if mass is None or tokens.value_bound is None else tokens.value_bound.contiguous()
    centre = _head_means(keys, valid)
    root, roots = _roots(keys, valid, centre, layout, options)
    noise = None if draws.key is not None else draws.gumbel(range(heads), range(layout.bins)).contiguous()
    made = Compressed(
        source=keys.new_empty(rows, heads, rank, dtype=torch.int64),
        valid=keys.new_empty(rows, heads, rank, dtype=torch.bool),
        keys=keys.new_empty(rows, heads, rank, d),
        values=values.new_empty(rows, heads, rank, values.shape[-1]),
        weights=keys.new_empty(rows, heads, rank, dtype=torch.float32),
    )
    bin_slots[layout.bins, heads, rows](
        keys, values, mass, valid, bound, centre, roots, noise, *made,
        draws.key or 0, root, n, layout.bins, rank, layout.longest, layout.bin_rank,
        *keys.stride()[:3], *values.stride()[:3], 0 if noise is None or len(noise) == 1 else noise.stride(0),
        LIMIT=torch.finfo(values.dtype).max, KEEP=layout.mixed or layout.lossless or valid is not None,
        CLIPPED=options.weights_rule == "clipped", D=d, D_V=values.shape[-1], R=_LARGEST_RANK, **_sizes(layout),
    )  # fmt: skip
    return made


def _roots(
    keys: Tensor, valid: Tensor | None, centre: Tensor, layout: BinLayout, options: KernelOptions
) -> tuple[float, Tensor | None]:
    """Compute sqrt(b) / tau: one number for all bins, or in its place float32 (rows, heads, bins)."""
    from wildcat_kv.coreset.kernels.slots import bin_norms

    rule, scale, query_norm = options.temperature, options.scale, options.query_norm
    known = constant_temperature(rule) if query_norm is None else None
    if known is not None:
        return (scale / known) ** 0.5, None
    rows, heads, n, d = keys.shape
    norms = torch.empty(rows, heads, layout.bins, dtype=torch.float32, device=keys.device)
    counts = torch.empty(norms.shape, dtype=torch.int32, device=keys.device)
    bin_norms[layout.bins, heads, rows](
        keys, valid, centre, norms, counts, n, layout.bins, *keys.stride()[:3], D=d, **_sizes(layout)
    )
    if query_norm is not None:
        query_norm = query_norm.unsqueeze(-1).expand_as(norms)
    return 1.0, (scale / squared_temperature(norms, query_norm, counts, scale, rule)).sqrt_()


def _head_means(keys: Tensor, valid: Tensor | None) -> Tensor:
    """Compute the mean of each head's valid keys, float32 (rows, heads, d); 0 without any."""
    if valid is None:
        return keys.mean(2, dtype=torch.float32)
    total = keys.masked_fill(~valid.unsqueeze(-1), 0.0).sum(2, dtype=torch.float32)
    return total.div_(valid.sum(2, keepdim=True).clamp_min_(1))


def _sizes(layout: BinLayout) -> dict[str, int]:
    """Choose the sizes of a program."""
    places = max(16, 1 << (layout.longest - 1).bit_length())
    large = places > 64  # fewer channels at a time, or registers spill
    return {"T": places, "BLOCK": 16 if large else 32, "num_warps": 8 if large else 4, "num_stages": 1}


def _rows_of_channels(tensor: Tensor) -> Tensor:
    """Give a tensor whose channels lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
