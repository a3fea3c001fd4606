"""The kernels of one token's attention beside the reference, in a process with Triton's interpreter."""

from dataclasses import dataclass

import torch

import tests.interpreter  # noqa: F401  # before the kernels
from tests.coreset.test_wtdattn import definition
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.coreset import decoding
from wildcat_kv.coreset.decoding import DecodePlan, HeldBand, PackedPart, supports
from wildcat_kv.coreset.quantised import Quantised
from wildcat_kv.coreset.wtdattn import AttentionOptions, mass_of
from wildcat_kv.hook.keyword import CACHE


@dataclass(frozen=True)
class Case:
    """What one comparison is about.

    Attributes:
        rows: rows of the batch.
        kv_heads: key heads of a row.
        group: query heads of a key head.
        d: channels of a key.
        d_v: channels of a value.
        dtype: dtype of query, keys and values.
        bands: for each band the columns of open entries, the free ones among them, and the groups of slots.
        bits: bits of the slots.
        size: slots of a group.
        share: channels of a value that share a scale.
        signed: True for negative and very small weights.
        added: tokens that come after the plan was made.
        least: entries of an item, at least.
        softcap: c, or None.
        sinks: True for learned logits in the denominator.
        clipped: True to clip to a box.
        seed: seed of all numbers.
    """

    rows: int
    kv_heads: int
    group: int
    d: int
    d_v: int
    dtype: torch.dtype
    bands: tuple[tuple[int, int, int], ...]
    bits: int = 4
    size: int = 8
    share: int = 16
    signed: bool = True
    added: int = 0
    least: int = 128
    softcap: float | None = None
    sinks: bool = False
    clipped: bool = False
    seed: int = 0


TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def compare(fields):
    """Attend by the kernels and by the reference, head by head; `fields` are those of a `Case`."""
    case = Case(**fields)
    torch.manual_seed(case.seed)
    places = torch.randperm(case.rows * case.kv_heads).tolist()
    bands, per = [], -(-len(places) // len(case.bands))
    for number, (columns, free, groups) in enumerate(case.bands):
        own = sorted(places[number * per : (number + 1) * per])
        if own:
            bands.append(_band(case, own, columns, free, groups))
    query = torch.randn(case.rows, case.kv_heads * case.group, 1, case.d).to(case.dtype)
    sinks = torch.randn(case.kv_heads * case.group) if case.sinks else None
    box = None
    if case.clipped:
        box = tuple(side * torch.rand(case.rows, case.kv_heads, 1, case.d_v).to(case.dtype) for side in (-0.3, 0.3))
    assert supports(bands, case.dtype, case.group)
    plan = DecodePlan.of(bands, case.kv_heads, case.group, case.least)
    later = [band._replace(length=band.length + case.added) for band in bands]
    options = AttentionOptions(0.3, None, False, box, case.softcap, sinks)
    found = plan.attend(query, case.added, options).flatten(0, 1).unflatten(0, (-1, case.group))
    for band in later:
        for line, place in enumerate(band.places):
            tol = TOLERANCES[case.dtype]
            of = slice(place % case.kv_heads * case.group, (place % case.kv_heads + 1) * case.group)
            expected = definition(
                query.flatten(0, 1).unflatten(0, (-1, case.group))[place],
                **_unpacked(band, line),
                scale=0.3,
                softcap=case.softcap,
                sinks=None if sinks is None else sinks[of],
                box=None if box is None else tuple(side.flatten(0, 1)[place : place + 1] for side in box),
            )
            torch.testing.assert_close(found[place].double(), expected, rtol=tol, atol=tol)


def _band(case, places, columns, free, groups):
    """A band of random entries: padding, weights of both signs, and NaN in free columns."""
    batch, length = len(places), columns - free
    keys, values = torch.randn(batch, columns, case.d), torch.randn(batch, columns, case.d_v)
    keys[:, length:] = values[:, length:] = torch.nan
    weights, valid = _weights(case, batch, length)
    rest = torch.zeros(batch, free)
    packed = []
    if groups:
        for size, count in [(case.size, groups), (8, 1)][: 1 + case.seed % 2]:
            sides = None, None
            if count > 1 or case.signed:
                sides = _weights(case, batch, size * count)
                sides = sides[0].half(), sides[1]
            # Channels far from 0, as keys have them.
            numbers = torch.randn(batch, size * count, case.d) + torch.randn(case.d) * 3
            packed.append(
                PackedPart(
                    Quantised.keys(numbers, case.bits, size),
                    Quantised.values(torch.randn(batch, size * count, case.d_v), case.bits, size, case.share),
                    *sides,
                )
            )
    return HeldBand(
        places,
        keys.to(case.dtype),
        values.to(case.dtype),
        torch.cat((weights, rest), dim=-1),
        torch.cat((valid, rest.bool()), dim=-1),
        length - case.added,
        packed,
    )


def _weights(case, batch, n):
    weights = 0.5 + torch.rand(batch, n) * 3
    if case.signed:
        weights[:, ::5] *= -0.05
        weights[:, 3::7] *= 2**-9
    valid = torch.rand(batch, n) < 0.8
    valid[:, -1:] = True
    return weights.masked_fill(~valid, 0.0), valid


def _unpacked(band, line):
    """Entries of one head in float64, as `definition` takes them."""
    stop = band.length
    sides = [(band.keys[line, :stop], band.values[line, :stop], band.weights[line, :stop], band.valid[line, :stop])]
    for part in band.packed:
        ones = torch.ones(part.keys.slots)
        weights = ones if part.weights is None else part.weights[line].float()
        valid = ones.bool() if part.valid is None else part.valid[line]
        sides.append((part.keys.unpack()[line], part.values.unpack()[line], weights, valid))
    keys, values, weights, valid = (torch.cat([side.double() for side in pair]) for pair in zip(*sides, strict=True))
    numerators = values * mass_of(weights.float()).double().unsqueeze(-1)
    return {"keys": keys[None], "values": numerators[None], "weights": weights[None], "valid": valid.bool()[None]}


def cancelled():
    """Outputs where weights cancel out, inside a box and without one."""
    keys = torch.ones(1, 2, 16)
    values = torch.tensor([2.0, 5.0])[None, :, None].expand(1, 2, 16).contiguous()
    band = HeldBand([0], keys, values, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool), 2)
    plan, query = DecodePlan.of([band], 1, 1), torch.ones(1, 1, 1, 16)
    box = torch.full((1, 1, 1, 16), 0.5), torch.full((1, 1, 1, 16), 4.0)
    found = (
        plan.attend(query, 0, AttentionOptions(0.25)),
        plan.attend(query, 0, AttentionOptions(0.25, value_range=box)),
    )
    return [one.unique().tolist() for one in found]


def nothing_is_hidden():
    """Outputs beside a NaN among the values, and where nothing is valid."""
    keys, values = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    values[0, 1, 4] = torch.nan
    weights, valid = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    band, query = HeldBand([0], keys, values, weights, valid, 3), torch.randn(1, 1, 1, 16)
    found = DecodePlan.of([band], 1, 1).attend(query, 0, AttentionOptions(0.25)).isnan().flatten()
    band = HeldBand([0], keys, values, 0 * weights, ~valid, 3)
    return found.nonzero().flatten().tolist(), DecodePlan.of([band], 1, 1).attend(query, 0, AttentionOptions(1.0)).max()


def decode(method, settings, tokens=3):
    """Decode with a tiny model by the kernels and without: logits of both, and launches."""
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(1, 90 + tokens)
    launches, launch = [], DecodePlan.attend

    def noted(self, *args):
        launches.append(self)
        return launch(self, *args)

    logits = []
    ordinary, DecodePlan.attend = decoding.DEVICES, noted
    try:
        for devices in ((), ("cpu",)):
            decoding.DEVICES = devices
            cache = WildCatCache(model.config, compressor=method, sink=2, window=8, **settings)
            with torch.no_grad():
                model(ids[:, :90], **{CACHE: cache})
                steps = [model(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(90, 90 + tokens)]
                if devices:
                    twin = cache.clone()
                    again = [one(ids[:, :1]) for one in (_step(model, cache), _step(model, twin))]
                    assert torch.equal(*again), "a copy attends to its own memory"
            logits.append(torch.cat(steps, dim=1))
    finally:
        decoding.DEVICES, DecodePlan.attend = ordinary, launch
    return logits, len(launches), len(set(map(id, launches)))


def _step(model, cache):
    return lambda ids: model(ids, **{CACHE: cache}).logits
