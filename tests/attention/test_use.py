"""A model attends by a method inside `use`, and is afterwards exactly what it was."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wildcat_kv.attention
from tests.attention.encoders import FAMILIES, WHISPER, Family
from wildcat_kv.attention import Attention, Exact, Uniform, attention_layers, disable, enable, use
from wildcat_kv.attention.masks import key_padding

VIT, BERT = FAMILIES["vit"], FAMILIES["bert"]
LAYERS = ("layers.0.attention", "layers.1.attention")


class BrokenError(Exception):
    pass


def picture(model, inputs):
    """All that may not change: outputs, weights, configs and the very config objects."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "output": model(**inputs).last_hidden_state,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": [config.to_dict() for config in configs],
        "objects": [id(config) for config in configs],
        "implementations": [config._attn_implementation for config in configs],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "training": model.training,
    }


def assert_same(one, other):
    assert torch.equal(one.pop("output"), other.pop("output"))
    states = one.pop("state"), other.pop("state")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert one == other


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "bert", "modernbert"])
def test_all_is_as_it_was(name, implementation):
    family = FAMILIES[name]
    model, inputs = family.build(implementation), family.inputs(True)
    before = picture(model, inputs)
    with use(model, Uniform(rank=4)):
        model(**inputs)
        for module in model.modules():  # the model's own config is not touched, so that it can be saved
            if isinstance(module, type(model)):
                assert module.config._attn_implementation == implementation
    assert_same(before, picture(model, inputs))


def test_an_exception_leaves_nothing_behind():
    model, inputs = VIT.build(), VIT.inputs(False)
    before = picture(model, inputs)
    with pytest.raises(BrokenError), use(model, Exact()):
        raise BrokenError
    assert_same(copy.copy(before), picture(model, inputs))

    class Broken(Exact):
        def attend(self, *tensors):
            raise BrokenError

    with pytest.raises(BrokenError), use(model, Broken()):
        model(**inputs)
    assert_same(before, picture(model, inputs))


def test_enable_and_disable_are_the_two_halves():
    model, inputs = VIT.build(), VIT.inputs(False)
    before = picture(model, inputs)
    assert enable(model, Uniform(rank=4)) == tuple(attention_layers(model))
    with use(VIT.build(), Uniform(rank=4)) as layers:
        assert layers == tuple(attention_layers(model))
    inside = model(**inputs).last_hidden_state
    assert not torch.allclose(inside, before["output"])
    with pytest.raises(ValueError, match=r"model=ViTModel has a method in '\S+' already; disable\(model\) first"):
        enable(model, Exact())
    assert torch.equal(model(**inputs).last_hidden_state, inside)
    disable(model)
    assert_same(before, picture(model, inputs))
    with pytest.raises(ValueError, match="model=ViTModel has no method of attention; there is nothing to disable"):
        disable(model)


class Counting(Attention):
    """Exact attention that notes the calls of every layer."""

    name, complexity, calls = "counting", "", []

    def for_layer(self, layer):
        made = Counting()
        object.__setattr__(made, "layer", layer)
        return made

    def attend(self, query, key, value, scale):
        self.calls.append(self.layer)
        return Exact().attend(query, key, value, scale)


@pytest.mark.parametrize(
    ("layers", "called"),
    [(None, [0, 1, 2]), ([0], [0]), ([-1, 0], [0, 2]), (["second"], [1]), (range(1, 3), [1, 2])],
)
def test_layers_are_chosen_by_number_or_name(layers, called):
    model, inputs = VIT.build(num_hidden_layers=3), VIT.inputs(False)
    names = tuple(attention_layers(model))
    layers = [names[1]] if layers == ["second"] else layers
    Counting.calls.clear()
    with use(model, Counting(), layers) as replaced:
        model(**inputs)
    assert Counting.calls == called and replaced == tuple(names[layer] for layer in called)


def test_every_layer_may_have_a_method_of_its_own():
    model, inputs = VIT.build(num_hidden_layers=3), VIT.inputs(False)
    Counting.calls.clear()
    with use(model, {2: Counting(), 0: Uniform(rank=3)}) as replaced:
        both = model(**inputs).last_hidden_state
    names = tuple(attention_layers(model))
    assert replaced == (names[0], names[2]) and Counting.calls == [2]
    with use(model, Uniform(rank=3), [0]):
        assert torch.allclose(model(**inputs).last_hidden_state, both, atol=1e-5)


def test_layers_have_seeds_of_their_own_and_runs_repeat():
    model, inputs = VIT.build(), VIT.inputs(False)
    enable(model, Uniform(rank=3))
    seeds = {module.wildcat_attention.method.seed for module in attention_layers(model).values()}
    assert len(seeds) == 2
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_enabled_by_itself(duplicate):
    model, inputs = VIT.build(), VIT.inputs(False)
    before = model(**inputs).last_hidden_state
    enable(model, Uniform(rank=3))
    inside = model(**inputs).last_hidden_state
    # A subclass of str, which could carry the method, is beyond torch.compile before torch 2.13.
    assert all(type(module.config._attn_implementation) is str for module in attention_layers(model).values())
    other = duplicate(model)
    disable(model)
    assert torch.equal(other(**inputs).last_hidden_state, inside)
    disable(other)
    assert torch.equal(other(**inputs).last_hidden_state, before)
    for module in attention_layers(other).values():
        assert module.config is other.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layers: 2 is none of the 2 layers that can be replaced, counted from 0"),
        ({"layers": [-3]}, "layers: -3 is none of the 2 layers"),
        ({"layers": ["encoder"]}, "layers: there is no attention layer 'encoder'; the first is '"),
        ({"layers": []}, "layers names no layer; leave it out for all of them"),
        ({"method": {}}, "layers names no layer"),
        ({"method": {0: Exact()}, "layers": [1]}, "layers is given beside a method for each layer; give one of them"),
    ],
)
def test_layers_that_are_not_there_are_refused(options, message):
    model, inputs = VIT.build(), VIT.inputs(False)
    before = picture(model, inputs)
    with pytest.raises(ValueError, match=message):
        enable(model, **{"method": Exact(), **options})
    assert_same(before, picture(model, inputs))


@pytest.mark.parametrize("method", ["wildcat", Exact, {0: None}, None])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match=r"is no Attention; give one of wildcat_kv\.attention's"):
        enable(VIT.build(), method)


def test_dropout_in_training_is_refused_and_a_gradient_flows_without():
    model, inputs = VIT.build(attention_probs_dropout_prob=0.1).train(), VIT.inputs(False)
    with use(model, Exact()):
        with pytest.raises(ValueError, match=r"layer '\S+' drops probabilities in training \(dropout=0.1; eval"):
            model(**inputs)
        model.eval()
        with torch.enable_grad():
            model(**inputs).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in next(iter(attention_layers(model).values())).parameters())


def test_a_cross_attention_is_replaced_only_if_it_is_named():
    model = Family("WhisperModel", "WhisperConfig", WHISPER, FAMILIES["whisper"].inputs).build()
    cross = "decoder.layers.0.encoder_attn"
    with use(model, Exact()) as layers:
        assert cross not in layers
    inputs = FAMILIES["whisper"].inputs(False)
    before = model(**inputs).last_hidden_state
    with use(model, Exact(), [cross]):
        torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"layers: 'decoder.layers.0.self_attn' is causal: compress its cache"):
        enable(model, Exact(), ["decoder.layers.0.self_attn"])


def test_a_mask_with_holes_of_its_own_for_every_query_is_refused():
    model, inputs = BERT.build(), BERT.inputs(False)
    packed = torch.block_diag(torch.ones(10, 10), torch.ones(20, 20)).bool().expand(2, 1, 30, 30)
    before = picture(model, inputs)
    with (
        use(model, Exact()),
        pytest.raises(
            ValueError,
            match=r"layer '\S+': attention_mask \(2, 1, 30, 30\) differs between queries or heads",
        ),
    ):
        model(inputs["input_ids"], attention_mask=packed)
    assert_same(before, picture(model, inputs))


# Masks


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from(["bool", "float32", "bfloat16", "int", "rows"]),
    st.booleans(),
    st.data(),
)
def test_padding_is_read_from_masks_of_every_kind(rows, heads, n, kind, expanded, data):
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * n, max_size=rows * n))).view(rows, n)
    if kind in ("int", "rows"):
        mask = seen.long() if kind == "int" else seen
    else:
        mask = seen[:, None, None]
        if kind != "bool":
            dtype = getattr(torch, kind)
            mask = torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
        mask = mask.expand(rows, heads, 5, n)
        mask = mask if expanded else mask.contiguous()
    found = key_padding(mask, rows, n)
    assert found is None if seen.all() else torch.equal(found, ~seen)


def test_masks_that_are_more_than_padding_are_refused():
    assert key_padding(None, 2, 5) is None
    with pytest.raises(ValueError, match="attention_mask adds a bias to scores"):
        key_padding(torch.full((1, 1, 1, 4), -1.5), 1, 4)
    with pytest.raises(ValueError, match="differs between queries or heads"):
        key_padding(torch.ones(1, 1, 4, 4).tril().bool(), 1, 4)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 4, 4\); it must be \(rows, n\)"):
        key_padding(torch.ones(1, 4, 4), 1, 4)
    with pytest.raises(ValueError, match="attention_mask is a tuple; load the model with attn_implementation='sdpa'"):
        key_padding((), 1, 4)


def test_the_wing_names_them_and_imports_transformers_for_them_alone():
    names = ("attention_layers", "calibrate", "compare_outputs", "disable", "enable", "use")
    assert set(names) <= set(wildcat_kv.attention.__all__)
    assert [getattr(wildcat_kv.attention, name).__name__ for name in names] == list(names)
    with pytest.raises(AttributeError, match=r"'wildcat_kv\.attention' has no attribute 'uses'"):
        _ = wildcat_kv.attention.uses
    code = (
        "import sys, wildcat_kv.attention as attention; assert 'transformers' not in sys.modules; "
        "attention.use; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_enabled_model_can_be_compiled():
    model, inputs = VIT.build(), VIT.inputs(False)
    with torch.no_grad(), use(model, Uniform(rank=4)):
        expected = model(**inputs).last_hidden_state
        compiled = torch.compile(model, backend="eager")  # not whole: Transformers 5.17 gives ViT a mask, which is read
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)
