"""A plan is made of errors on a layer's real queries, keys and values, and leaves the model as it was."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.encoders import FAMILIES
from tests.attention.heads import heads
from tests.attention.test_use import BrokenError, assert_same, picture
from wildcat_kv.attention import (
    Attention,
    Exact,
    NearWildCat,
    PerHead,
    Plan,
    Reformer,
    Uniform,
    WildCatAttention,
    attention_layers,
    calibrate,
    compare_outputs,
    enable,
    use,
)
from wildcat_kv.attention.choosing import Option, within_cost, within_tolerance

VIT, BERT = FAMILIES["vit"], FAMILIES["bert"]
RANKS = (4, 8, 16, 32)


class Capture(Attention):
    """Exact attention that keeps what a layer attends with."""

    name, complexity = "capture", ""

    def __init__(self, seen, layer=None):
        super().__init__()
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "layer", layer)

    def for_layer(self, layer):
        return Capture(self.seen, layer)

    def forward(self, *tensors, scale=None, key_padding_mask=None):
        self.seen.append((self.layer, tensors, scale))
        return Exact()(*tensors, scale=scale, key_padding_mask=key_padding_mask)


def errors_alone(model, inputs, method):
    """Relative errors of every layer and head, from what the exact model attends with."""
    seen = []
    with torch.no_grad(), use(model, Capture(seen)):
        for each in inputs:
            model(**each)
    wrong, whole = {}, {}
    for layer, tensors, scale in seen:
        exact = Exact()(*tensors, scale=scale).double()
        found = method.for_layer(layer)(*tensors, scale=scale).double()
        wrong[layer] = wrong.get(layer, 0) + (found - exact).square().sum((0, 2, 3))
        whole[layer] = whole.get(layer, 0) + exact.square().sum((0, 2, 3))
    layers = [float((wrong[layer].sum() / whole[layer].sum()).sqrt()) for layer in sorted(wrong)]
    return layers, [(wrong[layer] / whole[layer]).sqrt().tolist() for layer in sorted(wrong)]


@pytest.fixture(scope="module")
def vit():
    model = VIT.build(num_hidden_layers=3)
    generator = torch.Generator().manual_seed(2)
    return model, [{"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)} for _ in range(2)]


def test_each_layer_takes_the_cheapest_setting_within_the_tolerance(vit):
    model, inputs = vit
    tolerance = 0.4
    plan = calibrate(model, inputs, Uniform(), RANKS, tolerance=tolerance)
    assert [layer.name for layer in plan.layers] == list(attention_layers(model))
    errors = {rank: errors_alone(model, inputs, Uniform(rank=rank))[0] for rank in RANKS}
    kinds = set()
    for number, layer in enumerate(plan.layers):
        able = [rank for rank in RANKS if errors[rank][number] <= tolerance]
        kinds.add(type(layer.method))
        assert layer.exact_cost == 2 * 4 * Exact().cost(65, 8)  # inputs, heads
        if not able:
            assert type(layer.method) is Exact and layer.error == 0 and layer.cost == layer.exact_cost
            continue
        assert layer.method.rank == able[0]
        assert layer.error == pytest.approx(errors[able[0]][number], rel=1e-4)
        assert layer.cost == 2 * 4 * Uniform(rank=able[0]).cost(65, 8)
    assert plan.cost == sum(layer.cost for layer in plan.layers) / sum(layer.exact_cost for layer in plan.layers)
    assert kinds == {Uniform, Exact}  # or the case is no test of both


def test_each_head_takes_its_own_setting(vit):
    model, inputs = vit
    tolerance = 0.4
    plan = calibrate(model, inputs, Uniform(), RANKS, tolerance=tolerance, per_head=True)
    errors = {rank: errors_alone(model, inputs, Uniform(rank=rank))[1] for rank in RANKS}
    mixed = 0
    for number, layer in enumerate(plan.layers):
        wanted = [next((rank for rank in RANKS if errors[rank][number][head] <= tolerance), None) for head in range(4)]
        if len(set(wanted)) == 1:
            assert getattr(layer.method, "rank", None) == wanted[0]
            continue
        mixed += 1
        found = [layer.method.methods[place] for place in layer.method.heads]
        assert [getattr(method, "rank", None) for method in found] == wanted
        cost = sum(Exact().cost(65, 8) if rank is None else Uniform(rank=rank).cost(65, 8) for rank in wanted)
        assert layer.cost == 2 * cost
        assert layer.error == pytest.approx(errors_alone(model, inputs, layer.method)[0][number], rel=1e-4)
    assert mixed


@pytest.mark.parametrize("per_head", [False, True])
def test_a_cost_is_kept_and_more_of_it_lowers_the_errors(vit, per_head):
    model, inputs = vit
    plans = [calibrate(model, inputs, Uniform(), RANKS, cost=cost, per_head=per_head) for cost in (0.1, 0.3, 0.6, 1.0)]
    for plan, cost in zip(plans, (0.1, 0.3, 0.6, 1.0), strict=True):
        assert plan.cost <= cost
    errors = [sum(layer.error for layer in plan.layers) for plan in plans]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[1] > errors[-1] == 0
    assert len(plans[-1]) == 0
    with pytest.raises(ValueError, match=r"cost=0.01 cannot be kept: the cheapest settings take .* operations"):
        calibrate(model, inputs, Uniform(), RANKS, cost=0.01, per_head=per_head)


def test_padding_counts_for_nothing():
    model, inputs = BERT.build(), BERT.inputs(True)
    together = calibrate(model, [inputs], Uniform(), (6,), tolerance=10.0)
    rows = [
        {name: value[:1] for name, value in inputs.items()},
        {name: value[1:, :18] for name, value in inputs.items()},
    ]
    alone = calibrate(model, rows, Uniform(), (6,), tolerance=10.0)
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
    padded = 30 * (Uniform(rank=6).cost(30, 8, queries=1) + Uniform(rank=6).cost(18, 8, queries=1)) * 4
    assert together.layers[0].cost == padded  # padded queries are computed, padded keys are not


@pytest.mark.parametrize("name", ["vit", "bert", "whisper"])
def test_the_model_is_left_as_it_was(name):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs(True)
    before = picture(model, inputs)
    plan = calibrate(model, [inputs], Uniform(), (4, 8), cost=0.5, per_head=True)
    compare_outputs(model, [inputs], plan)
    assert_same(dict(before), picture(model, inputs))

    def broken(model, given):
        model(**given)
        raise BrokenError

    with pytest.raises(BrokenError):
        calibrate(model, [inputs], Uniform(), (4, 8), cost=0.5, run=broken)
    assert_same(before, picture(model, inputs))


def test_a_plan_stands_in_the_place_of_a_method(vit):
    model, inputs = vit
    plan = calibrate(model, inputs, Uniform(), RANKS, tolerance=0.4)
    assert 0 < len(plan) < 3
    chosen = {layer.name: layer.method for layer in plan.layers if not isinstance(layer.method, Exact)}
    assert dict(plan) == chosen
    with torch.no_grad():
        with use(model, chosen):
            expected = model(**inputs[0]).last_hidden_state
        with use(model, plan) as replaced:
            assert torch.equal(model(**inputs[0]).last_hidden_state, expected)
    assert replaced == tuple(chosen)
    with pytest.raises(ValueError, match=r"layers names no layer; .* or give a plan that approximates one"):
        enable(model, calibrate(model, inputs, Uniform(), RANKS, cost=1.0))
    with pytest.raises(ValueError, match=r"there is no attention layer 'layers.1.attention'"):
        enable(BERT.build(), plan)


def test_layers_are_chosen_and_those_that_no_input_reaches_are_left_out(vit):
    model, inputs = vit
    plan = calibrate(model, inputs, Uniform(), (8,), layers=[-1], tolerance=9.0)
    assert list(plan) == ["layers.2.attention"]

    def first(model, given):
        return model.layers[0](torch.ones(1, 5, 32))

    plan = calibrate(model, inputs, Uniform(), (2,), tolerance=9.0, run=first)
    assert list(plan) == ["layers.0.attention"]
    with pytest.raises(ValueError, match="inputs reach none of the 3 layers"):
        calibrate(model, inputs, Uniform(), tolerance=9.0, run=lambda model, given: None)


def test_a_candidate_that_cannot_attend_is_left_out_or_refused(vit):
    model, inputs = vit
    many = WildCatAttention(rank=70, bins=70)  # 65 keys
    with pytest.raises(
        ValueError, match=r"attention: WildCatAttention\(.*\) can attend in none of the layers: bins=70"
    ):
        calibrate(model, inputs, [many, Uniform(rank=32)], tolerance=9.0)

    def one_is_short(model, given):
        for layer, length in ((0, 80), (1, 20)):
            model.layers[layer](torch.randn(1, length, 32))

    plan = calibrate(model, [None], replace(many, rank=30, bins=30), tolerance=9.0, run=one_is_short)
    assert [type(layer.method) for layer in plan.layers] == [WildCatAttention, Exact]


def test_all_ways_to_give_inputs_are_one(vit):
    model, inputs = vit
    pixels = inputs[0]["pixel_values"]
    plans = [
        calibrate(model, given, Uniform(), (8,), tolerance=9.0)
        for given in (pixels, inputs[0], [pixels], [(pixels,)], iter([inputs[0]]))
    ]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0] != calibrate(model, inputs, Uniform(), (8,), tolerance=9.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tolerance": None}, ValueError, "tolerance=None and cost=None: give one of them"),
        ({"cost": 0.5}, ValueError, "tolerance=0.1 and cost=0.5: give one of them"),
        ({"tolerance": 0}, ValueError, "tolerance=0 must be positive and finite"),
        ({"tolerance": math.nan}, ValueError, "tolerance=nan must be positive and finite"),
        ({"tolerance": None, "cost": 1.5}, ValueError, r"cost=1.5 must be in \(0, 1\]"),
        ({"inputs": []}, ValueError, "inputs is empty; give at least one"),
        ({"inputs": 3}, TypeError, "inputs=3 is no list of inputs"),
        ({"attention": "uniform"}, TypeError, "attention='uniform' is no Attention"),
        ({"attention": [Uniform, Exact()]}, TypeError, "attention=<class .*> is no Attention"),
        ({"attention": []}, ValueError, "attention names no candidate"),
        ({"ranks": []}, ValueError, "ranks is empty"),
        ({"ranks": [8, 0]}, ValueError, "ranks: 0 must be an integer of at least 1"),
        ({"attention": Reformer(), "ranks": [8]}, ValueError, r"ranks=\[8\]: Reformer has no rank"),
        ({"layers": [7]}, ValueError, "layers: 7 is none of the 2 layers"),
    ],
)
def test_bad_arguments_are_refused_before_work(changes, error, message):
    calls = []
    options = {"inputs": [{}], "attention": Uniform(), "tolerance": 0.1, **changes}
    with pytest.raises(error, match=message):
        calibrate(VIT.build(), run=lambda model, given: calls.append(given), **options)
    assert not calls


def test_a_model_in_training_is_refused():
    model = VIT.build()
    model.layers[1].train()
    for function in (
        lambda: calibrate(model, [{}], Exact(), tolerance=1),
        lambda: compare_outputs(model, [{}], Exact()),
    ):
        with pytest.raises(
            ValueError, match=r"model=ViTModel: its module 'layers.1' is in training mode; call model.eval"
        ):
            function()


# The plan


@pytest.fixture
def plan(vit):
    model, inputs = vit
    candidates = [Uniform(), NearWildCat(bins=4, grid=(8, 8), prefix=1)]
    return calibrate(model, inputs, candidates, RANKS, cost=0.7, per_head=True)


def test_a_plan_is_saved_and_loaded(plan, tmp_path, vit):
    model, inputs = vit
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan and [layer.error for layer in loaded.layers] == [layer.error for layer in plan.layers]
    methods = [each for method in plan.values() for each in getattr(method, "methods", (method,))]
    grids = [each.grid for each in methods if isinstance(each, NearWildCat)]
    assert (8, 8) in grids
    with torch.no_grad():
        with use(model, plan):
            expected = model(**inputs[0]).last_hidden_state
        with use(model, loaded):
            assert torch.equal(model(**inputs[0]).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no plan: "),
        ("[]", "holds no plan: "),
        ("{}", "holds no plan: 'version' is missing; write one by Plan.save"),
        ('{"version": 2, "layers": []}', "it has version 2, and this release reads 1"),
        ('{"version": 1, "layers": [{"method": {"name": "unifrom"}}]}', "no such method; did you mean 'uniform'"),
        ('{"version": 1, "layers": [{"method": {"name": "uniform"}}]}', "missing 4 required"),
        ('{"version": 1, "layers": [{"method": {"name": "uniform", "rank": 0}}]}', "rank=0 must be at least 1"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_a_method_without_a_name_is_not_saved(vit, tmp_path):
    class Own(Uniform):
        pass

    plan = calibrate(*vit, Own(), (8,), tolerance=9.0)
    with pytest.raises(ValueError, match="method Own cannot be saved: no installed package offers it by the name"):
        plan.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_is_printed_a_layer_a_line(vit):
    lines = str(calibrate(*vit, Uniform(), (8,), tolerance=9.0, layers=[0, 2])).splitlines()
    assert lines[0].split() == ["layer", "method", "error", "operations"]
    assert lines[1].split()[:2] == ["layers.0.attention", "Uniform(rank=8)"] and lines[1].endswith("12%")
    assert lines[-1].split() == ["2", "of", "2", "layers", "12%"]
    assert len({len(line) for line in lines}) == 1


def test_json_has_settings_as_they_are(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    layer = json.loads((tmp_path / "plan.json").read_text())["layers"][0]
    assert set(layer) == {"name", "method", "error", "cost", "exact_cost"}
    assert layer["name"] == "layers.0.attention" and isinstance(layer["cost"], int)


# Heads


def test_each_head_attends_by_its_own_method():
    query, key, value = heads(batch=(2,))  # four query heads, two key heads
    one, other = Uniform(rank=5, seed=3), Exact()
    found = PerHead((one, other), heads=(1, 0))(query, key, value)
    torch.testing.assert_close(found[:, :2], other(query[:, :2], key[:, :1], value[:, :1]))
    torch.testing.assert_close(found[:, 2:], one(query[:, 2:], key[:, 1:], value[:, 1:]))
    layered = PerHead((one, other), heads=(1, 0)).for_layer(4)(query, key, value)
    torch.testing.assert_close(layered[:, 2:], one.for_layer(4)(query[:, 2:], key[:, 1:], value[:, 1:]))


def test_heads_of_one_method_attend_together():
    query, key, value = (torch.randn(1, 5, 40, 4, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    method = WildCatAttention(rank=8, bins=2)
    found = PerHead((method, Exact()), heads=(0, 1, 0, 1, 0))(query, key, value)
    together = method(query[:, ::2], key[:, ::2], value[:, ::2])
    torch.testing.assert_close(found[:, ::2], together)
    assert PerHead((method, Exact()), (0, 1, 1)).cost(40, 4) == (method.cost(40, 4) + 2 * Exact().cost(40, 4)) // 3


@pytest.mark.parametrize(
    ("methods", "places", "error", "message"),
    [
        ((Exact(),), (), ValueError, r"heads=\(\) must name each of the 1 methods by its place"),
        ((Exact(), Uniform()), (0, 0), ValueError, r"heads=\(0, 0\) must name each of the 2 methods"),
        ((Exact(),), (0, 1), ValueError, r"heads=\(0, 1\) must name each of the 1 methods"),
        ((Exact,), (0,), TypeError, "is no Attention of whole layers"),
        ((PerHead((Exact(),), (0,)),), (0,), TypeError, "is no Attention of whole layers"),
    ],
)
def test_heads_that_do_not_fit_are_refused(methods, places, error, message):
    with pytest.raises(error, match=message):
        PerHead(methods, places)


def test_another_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="heads names methods for 3 key heads, and there are 2"):
        PerHead((Exact(),), (0, 0, 0))(*heads())


# The choice

OPTIONS = st.lists(
    st.builds(Option, error=st.sampled_from([0.1, 0.2, 0.5, 1.0, math.inf]), cost=st.integers(0, 12)), max_size=4
)
UNITS = st.lists(
    st.builds(lambda cost, others: [Option(0.0, cost), *others], st.integers(1, 12), OPTIONS), min_size=1, max_size=4
)


def totals(units, chosen):
    options = [unit[place] for unit, place in zip(units, chosen, strict=True)]
    return sum(one.error for one in options), sum(one.cost for one in options)


@given(UNITS, st.floats(0.05, 2.0))
def test_the_cheapest_within_the_tolerance_is_chosen(units, tolerance):
    chosen = within_tolerance(units, tolerance)
    assert all(unit[place].error <= tolerance for unit, place in zip(units, chosen, strict=True))
    able = [[one.cost for one in unit if one.error <= tolerance] for unit in units]
    assert totals(units, chosen)[1] == sum(map(min, able))


@given(UNITS, st.integers(0, 40))
def test_a_greedy_choice_keeps_the_cost_and_no_single_change_betters_it(units, limit):
    finite = [[place for place, one in enumerate(unit) if math.isfinite(one.error)] for unit in units]
    able = [each for each in itertools.product(*finite) if totals(units, each)[1] <= limit]
    if not able:
        with pytest.raises(ValueError, match=r"the cheapest settings take .* operations, and .* are allowed"):
            within_cost(units, limit)
        return
    chosen = within_cost(units, limit)
    error, cost = totals(units, chosen)
    assert cost <= limit
    for number, places in enumerate(finite):
        for place in places:
            changed = totals(units, [*chosen[:number], place, *chosen[number + 1 :]])
            assert changed[1] > limit or changed[0] >= error - 1e-12
    least = min(totals(units, each)[0] for each in able)
    assert error >= least - 1e-12
    if limit >= sum(unit[0].cost for unit in units):
        assert error == 0


def test_the_greedy_choice_takes_most_error_away_for_each_operation():
    units = [[Option(0.0, 9), Option(0.6, 4)], [Option(0.0, 9), Option(0.2, 8), Option(0.5, 4)]]
    assert within_cost(units, 13) == [0, 2]
    assert within_cost(units, 17) == [0, 1]


# The check


def test_outputs_are_compared(vit):
    model, inputs = vit
    same = compare_outputs(model, inputs, Exact())
    assert max(same.errors) < 1e-5 and min(same.cosines) > 1 - 1e-6 and len(same.errors) == 2
    method = Uniform(rank=4)
    found = compare_outputs(model, inputs, method)
    with torch.no_grad():
        without = model(**inputs[1]).last_hidden_state
        with use(model, method):
            inside = model(**inputs[1]).last_hidden_state
    assert found.errors[1] == pytest.approx(float((inside - without).norm() / without.norm()), rel=1e-5)
    cosine = torch.cosine_similarity(inside, without, dim=-1).mean()
    assert found.cosines[1] == pytest.approx(float(cosine), rel=1e-5)
    assert str(found).startswith(f"error {sum(found.errors) / 2:.3f} (worst {max(found.errors):.3f}), cosine ")
    first = compare_outputs(model, inputs, method, read=lambda output: output.last_hidden_state[:, 0])
    assert first.errors != found.errors


def test_outputs_that_cannot_be_compared_are_refused(vit):
    model, inputs = vit
    with pytest.raises(ValueError, match="read: a str holds no floating-point tensor"):
        compare_outputs(model, inputs, Exact(), run=lambda model, given: "text")
    lengths = itertools.count(1)
    with pytest.raises(ValueError, match=r"outputs have shapes \(2,\) with the method, \(1,\) without"):
        compare_outputs(model, inputs, Exact(), run=lambda model, given: torch.ones(next(lengths)))


def test_candidates_have_the_seeds_that_the_plan_has(vit):
    """A layer's error is that of its own draws."""
    model, inputs = vit
    errors = [calibrate(model, inputs, Uniform(seed=seed), (6,), tolerance=9.0).layers[1].error for seed in (0, 1)]
    alone = [errors_alone(model, inputs, replace(Uniform(rank=6), seed=seed))[0][1] for seed in (0, 1)]
    assert errors == pytest.approx(alone, rel=1e-4) and errors[0] != errors[1]
