"""Calibration: which layers of a model may be approximated, and how, measured on example inputs.

measuring.py   candidates beside exact attention, on a layer's own queries, keys and values
choosing.py    the choice within an error or a cost
plan.py        the result
comparison.py  the check that must follow
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wildcat_kv.attention import encoders
from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.choosing import Option, within_cost, within_tolerance
from wildcat_kv.attention.exact import Exact
from wildcat_kv.attention.measuring import Recorder, Tally
from wildcat_kv.attention.per_head import PerHead
from wildcat_kv.attention.plan import LayerPlan, Plan
from wildcat_kv.attention.runs import Run, Use, call, check_runs


def calibrate(
    model: nn.Module,
    inputs: Any,
    attention: Attention | Iterable[Attention],
    ranks: Iterable[int] | None = None,
    *,
    tolerance: float | None = None,
    cost: float | None = None,
    layers: Iterable[int | str] | None = None,
    per_head: bool = False,
    use: Use = encoders.use,
    run: Run = call,
) -> Plan:
    """Choose a setting for every layer of a model, by its error on example inputs.

    The model runs exactly. Beside it every candidate attends with each layer's own queries, keys and values. Exact
    attention is always a candidate; one that a layer refuses, with more bins than keys for example, is left out there.
    **The error of a layer does not predict the model's**: a plan narrows the choice, and a check of the model's own
    output must follow, see `compare_outputs`. The model is left as it was, to the bit.

    Args:
        model: the model, in eval mode.
        inputs: list of what `run` takes: mappings of keywords, tuples of arguments, or tensors; one alone is one run.
        attention: the candidate, or several.
        ranks: ranks to try with every candidate; each candidate's own by default.
        tolerance: the largest relative error of a layer's attention output; each takes the cheapest setting within it.
        cost: share of exact attention's operations, in (0, 1], that all layers may take together; it is spent for a
            small sum of relative errors, by the greedy choice of `choosing.within_cost`.
        layers: layers to measure, by number or name; all that `use` replaces by default.
        per_head: True to choose for every key head by itself.
        use: function that puts a method into the model; for diffusers `wildcat_kv.attention.diffusers.use`.
        run: function of the model and one of the inputs; by default it calls the model.

    Raises:
        TypeError: a candidate is no `Attention`.
        ValueError: bad arguments, a layer that cannot be replaced, or a cost below the cheapest settings'.
    """
    candidates, bench = _candidates(attention, ranks), _Bench(model, check_runs(model, inputs), use, run)
    _check_bound(tolerance, cost)
    tallies = bench.measure(candidates, layers)
    _check_refusals(candidates, tallies)
    plan = _choose(tallies, (Exact(), *candidates), tolerance, cost, per_head)
    return _measure_mixed(plan, bench)


@dataclass(frozen=True)
class _Bench:
    """A model and its inputs.

    Attributes:
        model: the model.
        inputs: what `run` takes.
        use: function that puts methods into the model.
        run: function that runs it.
    """

    model: nn.Module
    inputs: list[Any]
    use: Use
    run: Run

    def measure(
        self, candidates: tuple[Attention, ...] | Mapping[str, Attention], layers: Iterable[int | str] | None = None
    ) -> dict[str, Tally]:
        """Measure candidates in all layers, or a method in each of a mapping, where inputs reach them."""
        tallies: list[Tally] = []
        recorders: Attention | dict[str, Attention]
        if isinstance(candidates, Mapping):
            recorders = {name: Recorder((method,), tallies) for name, method in candidates.items()}
        else:
            recorders = Recorder(candidates, tallies)
        with torch.no_grad(), self.use(self.model, recorders, layers) as names:
            for given in self.inputs:
                self.run(self.model, given)
        reached = {name: tally for name, tally in zip(names, tallies, strict=True) if tally.exact is not None}
        if not reached:
            raise ValueError(f"inputs reach none of the {len(names)} layers; give inputs that the layers attend in")
        return reached


def _choose(
    tallies: Mapping[str, Tally],
    methods: Sequence[Attention],
    tolerance: float | None,
    cost: float | None,
    per_head: bool,
) -> Plan:
    """Choose among exact attention, which is the first method, and the candidates."""
    heads = {name: [*range(tally.kv_heads)] if per_head else [None] for name, tally in tallies.items()}
    # The sum of errors is that of layers: a head counts for its share of one.
    units = [
        _options(tallies[name], head, len(own), 1.0 if cost is None else 1 / len(own))
        for name, own in heads.items()
        for head in own
    ]
    if tolerance is not None:
        chosen = iter(within_tolerance(units, tolerance))
    elif cost is not None:
        try:
            chosen = iter(within_cost(units, cost * sum(unit[0].cost for unit in units)))
        except ValueError as error:
            raise ValueError(f"cost={cost} cannot be kept: {error}; raise it, or give cheaper candidates") from None
    places = {name: [next(chosen) for _ in own] for name, own in heads.items()}
    return Plan(tuple(_layer_plan(name, tallies[name], methods, places[name]) for name in tallies))


def _options(tally: Tally, head: int | None, units: int, weight: float) -> list[Option]:
    """List the options of a key head, or of the whole layer, with weighted errors; exact attention is the first."""
    heads = tally.kv_heads // units
    candidates = (Option(weight * tally.error(place, head), cost * heads) for place, cost in enumerate(tally.costs))
    return [Option(0.0, tally.exact_cost * heads), *candidates]


def _layer_plan(name: str, tally: Tally, methods: Sequence[Attention], places: list[int]) -> LayerPlan:
    """Make a layer's setting of the methods' places in it, one for all heads or one for each."""
    used = sorted(set(places))
    if len(used) == 1:
        method = methods[used[0]]
        error = tally.error(used[0] - 1) if used[0] else 0.0
    else:
        method = PerHead(tuple(methods[place] for place in used), tuple(used.index(place) for place in places))
        error = float("nan")  # measured anew, with the heads' own draws
    heads, costs = tally.kv_heads // len(places), (tally.exact_cost, *tally.costs)
    cost = sum(costs[place] for place in places) * heads
    return LayerPlan(name, method, error, cost, tally.exact_cost * tally.kv_heads)


def _measure_mixed(plan: Plan, bench: _Bench) -> Plan:
    """Measure the layers with several methods: fewer heads at once draw other keys."""
    mixed = {each.name: each.method for each in plan.layers if isinstance(each.method, PerHead)}
    if not mixed:
        return plan
    tallies = bench.measure(mixed)
    layers = (
        dataclasses.replace(each, error=tallies[each.name].error(0)) if each.name in mixed else each
        for each in plan.layers
    )
    return Plan(tuple(layers))


def _candidates(attention: Attention | Iterable[Attention], ranks: Iterable[int] | None) -> tuple[Attention, ...]:
    """List the candidates, each with every rank."""
    given: tuple[Any, ...] = (attention,) if isinstance(attention, (Attention, str)) else tuple(attention)
    for one in given:
        if not isinstance(one, Attention):
            raise TypeError(f"attention={one!r} is no Attention; give one of wildcat_kv.attention's, such as Uniform()")
    if not given:
        raise ValueError("attention names no candidate; give at least one, such as Uniform()")
    if ranks is None:
        return given
    wanted = list(dict.fromkeys(ranks))
    if not wanted:
        raise ValueError("ranks is empty; leave it out to keep each candidate's own rank")
    for one in given:
        if "rank" not in {field.name for field in dataclasses.fields(one)}:
            raise ValueError(
                f"ranks={wanted}: {type(one).__name__} has no rank; leave ranks out, and list its settings"
            )
    for rank in wanted:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"ranks: {rank!r} must be an integer of at least 1")
    return tuple(dataclasses.replace(one, rank=rank) for one in given for rank in wanted)


def _check_bound(tolerance: float | None, cost: float | None) -> None:
    if (tolerance is None) == (cost is None):
        raise ValueError(
            f"tolerance={tolerance} and cost={cost}: give one of them, a bound on the error or on the cost"
        )
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance={tolerance} must be positive and finite, such as 0.1 for errors of a tenth")
    if cost is not None and not 0 < cost <= 1:
        raise ValueError(f"cost={cost} must be in (0, 1], a share of exact attention's operations")


def _check_refusals(candidates: Sequence[Attention], tallies: Mapping[str, Tally]) -> None:
    """Refuse a candidate that can attend in no layer."""
    for place, candidate in enumerate(candidates):
        reasons = [tally.refusals.get(place) for tally in tallies.values()]
        if None not in reasons:
            raise ValueError(f"attention: {candidate!r} can attend in none of the layers: {reasons[0]}")
