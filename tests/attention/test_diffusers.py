"""Models of diffusers attend by a method inside `use`, and have afterwards the processors that they had."""

import copy
import inspect
import pickle

import pytest
import torch

from wildcat_kv.attention import Exact, Plan, Uniform, WildCatAttention, calibrate, compare_outputs
from wildcat_kv.attention.diffusers import Processor, attention_layers, disable, enable, use

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[attention]'")
processors = pytest.importorskip("diffusers.models.attention_processor")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BLOCKS = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "norm_num_groups": 4}
# Class, config, inputs, number of layers with self-attention.
MODELS = {
    "unet_condition": (
        "UNet2DConditionModel",
        {
            **BLOCKS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda: {
            "sample": noise(2, 4, 16, 16),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 9, 32),
            "encoder_attention_mask": torch.arange(9).lt(torch.tensor([[9], [5]])),
        },
        4,
    ),
    "unet": (
        "UNet2DModel",
        {
            **BLOCKS,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        },
        lambda: {"sample": noise(2, 3, 16, 16), "timestep": torch.tensor(7)},
        4,
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**HEADS, "num_layers": 2, "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 10},
        lambda: {
            "hidden_states": noise(2, 4, 16, 16),
            "timestep": torch.tensor([3, 9]),
            "class_labels": torch.tensor([1, 2]),
        },
        2,
    ),
    "transformer": (
        "Transformer2DModel",
        {**HEADS, "num_layers": 2, "cross_attention_dim": 32},
        lambda: {"hidden_states": noise(2, 4, 12, 12), "encoder_hidden_states": noise(2, 9, 32)},
        2,
    ),
}
NAMES = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(0)
    kind, config, inputs, _ = MODELS[name]
    model = getattr(diffusers, kind)(**config).eval()
    for part, parameter in model.named_parameters():
        if ".to_q." in part or ".to_k." in part:  # attention that is not uniform
            parameter.data.mul_(6.0)
    return model, inputs()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def picture(model, inputs):
    return {
        "output": model(**inputs).sample,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "processors": [id(module.processor) for module in attention_layers(model).values()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_same(one, other):
    assert torch.equal(one["output"], other["output"])
    assert all(torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items())
    assert all(one[part] == other[part] for part in ("processors", "attributes"))


@NAMES
def test_exact_attention_changes_nothing(name):
    model, inputs = build(name)
    before = picture(model, inputs)
    with use(model, Exact()) as layers:
        inside = model(**inputs).sample
    assert len(layers) == MODELS[name][-1]
    assert not any(attention_layers(model)[layer].is_cross_attention for layer in layers)
    torch.testing.assert_close(inside, before["output"], rtol=1e-5, atol=1e-5)
    assert_same(before, picture(model, inputs))


@NAMES
def test_another_method_is_used_and_all_is_as_it_was(name):
    model, inputs = build(name)
    before = picture(model, inputs)
    layers = enable(model, Uniform(rank=4))
    assert layers == tuple(
        name for name, module in attention_layers(model).items() if isinstance(module.processor, Processor)
    )
    inside = model(**inputs).sample
    assert not torch.allclose(inside, before["output"], atol=1e-3)
    assert torch.equal(model(**inputs).sample, inside)  # noise is the method's own
    assert len({attention_layers(model)[layer].processor.method.seed for layer in layers}) == len(layers)
    with pytest.raises(ValueError, match=r"has a method in '\S+' already; disable\(model\) first"):
        enable(model, Exact())
    disable(model)
    assert_same(before, picture(model, inputs))
    with pytest.raises(ValueError, match="has no method of attention; there is nothing to disable"):
        disable(model)


def test_an_exception_leaves_nothing_behind():
    model, inputs = build("unet_condition")
    before = picture(model, inputs)

    class BrokenError(Exception):
        pass

    class Broken(Exact):
        def attend(self, *tensors):
            raise BrokenError

    with pytest.raises(BrokenError), use(model, Broken()):
        model(**inputs)
    assert_same(before, picture(model, inputs))


def test_cross_attention_is_replaced_only_if_it_is_named():
    model, inputs = build("unet_condition")
    before = model(**inputs).sample
    cross = [name for name, module in attention_layers(model).items() if module.is_cross_attention]
    assert len(cross) == 4
    with use(model, Exact(), cross) as layers:
        assert layers == tuple(cross)
        torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-5, atol=1e-5)
    with use(model, Uniform(rank=2), cross):
        assert not torch.allclose(model(**inputs).sample, before, atol=1e-4)


def test_layers_are_chosen_by_number_or_name_each_with_its_method():
    model, _ = build("dit")
    names = list(attention_layers(model))
    assert enable(model, Exact(), [-1]) == (names[1],)
    disable(model)
    assert enable(model, {names[1]: Uniform(), 0: Exact()}) == tuple(names)
    assert isinstance(attention_layers(model)[names[1]].processor.method, Uniform)
    disable(model)
    with pytest.raises(ValueError, match="layers: 2 is none of the 2 layers that can be replaced"):
        enable(model, Exact(), [2])
    with pytest.raises(ValueError, match="layers: there is no attention layer 'attn'"):
        enable(model, Exact(), ["attn"])
    with pytest.raises(TypeError, match="is no Attention"):
        enable(model, "exact")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_enabled_by_itself(duplicate):
    model, inputs = build("dit")
    before = model(**inputs).sample
    enable(model, Uniform(rank=3))
    inside = model(**inputs).sample
    other = duplicate(model)
    disable(model)
    assert torch.equal(other(**inputs).sample, inside)
    disable(other)
    assert torch.equal(other(**inputs).sample, before)


def test_processors_of_other_kinds_are_refused_and_stay():
    model, _ = build("unet_condition")
    names = list(attention_layers(model))
    sliced = processors.SlicedAttnProcessor(slice_size=2)
    attention_layers(model)[names[0]].set_processor(sliced)
    assert names[0] not in enable(model, Exact())
    disable(model)
    with pytest.raises(ValueError, match=r"layers: '\S+' has the processor SlicedAttnProcessor, which works in a way"):
        enable(model, Exact(), [names[0]])
    model.set_attn_processor(sliced)
    with pytest.raises(
        ValueError, match=r"model=UNet2DConditionModel has no attention layer to replace: '\S+' has the"
    ):
        enable(model, Exact())
    with pytest.raises(ValueError, match=r"model=Linear has no attention layer to replace: none is self-attention"):
        enable(torch.nn.Linear(2, 2), Exact())


def test_a_processor_that_is_set_inside_stays():
    model, _ = build("dit")
    own = processors.AttnProcessor()
    with use(model, Exact()) as layers:
        attention_layers(model)[layers[0]].set_processor(own)
    found = [module.processor for module in attention_layers(model).values()]
    assert found[0] is own and type(found[1]) is processors.AttnProcessor2_0


# One layer beside diffusers' own processors

CROSS = {"cross_attention_dim": 24}
LAYER = {"query_dim": 32, "heads": 4, "dim_head": 8}
TOKENS, IMAGE, OTHER = (2, 20, 32), (2, 32, 4, 5), (2, 9, 32)


def layer_and_reference(processor, **config):
    torch.manual_seed(0)
    layer = processors.Attention(**{**LAYER, **config}, processor=processor).eval()
    for parameter in layer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return layer, Processor(Exact(), "layer", layer.processor)


@pytest.mark.parametrize("kind", ["AttnProcessor2_0", "AttnProcessor"])
@pytest.mark.parametrize(
    ("config", "shape", "other"),
    [
        ({}, TOKENS, None),
        ({"bias": True, "out_bias": False}, TOKENS, OTHER),
        ({"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 1.7}, IMAGE, None),
        ({"norm_num_groups": 8, "residual_connection": True}, TOKENS, None),
        ({"qk_norm": "layer_norm"}, TOKENS, None),
        ({"qk_norm": "rms_norm"}, TOKENS, OTHER),
        (CROSS | {"cross_attention_norm": "layer_norm"}, TOKENS, (2, 9, 24)),
        (CROSS | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}, TOKENS, (2, 9, 24)),
        ({"scale_qk": False}, TOKENS, None),
        ({"spatial_norm_dim": 6}, IMAGE, None),
    ],
)
def test_a_layers_work_is_diffusers_own(kind, config, shape, other):
    layer, processor = layer_and_reference(getattr(processors, kind)(), **config)
    given = {"encoder_hidden_states": None if other is None else noise(*other, seed=2)}
    if "spatial_norm_dim" in config:
        given["temb"] = noise(2, 6, 4, 5, seed=3)
    states = noise(*shape)
    expected = layer(states, **given)
    layer.set_processor(processor)
    torch.testing.assert_close(layer(states, **given), expected, rtol=1e-5, atol=1e-5)


def test_fused_projections_are_followed():
    layer, _ = layer_and_reference(processors.AttnProcessor2_0())
    layer.fuse_projections()
    layer.set_processor(processors.FusedAttnProcessor2_0())
    expected = layer(noise(*TOKENS))
    with use(torch.nn.Sequential(layer), Exact()):
        torch.testing.assert_close(layer(noise(*TOKENS)), expected, rtol=1e-5, atol=1e-5)


def test_it_has_the_arguments_of_diffusers_own():
    """`Attention.forward` passes on what the processor's signature names."""
    own, theirs = (
        list(inspect.signature(kind.__call__).parameters) for kind in (Processor, processors.AttnProcessor2_0)
    )
    assert own == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool])
def test_padding_is_followed(dtype):
    layer, processor = layer_and_reference(processors.AttnProcessor2_0())
    seen = torch.arange(20).lt(torch.tensor([[20], [12]])).unsqueeze(1)
    mask = seen if dtype == torch.bool else (1 - seen.to(dtype)) * -10000.0
    if mask.is_floating_point():
        layer = layer.to(dtype)
    states = noise(*TOKENS).to(layer.to_q.weight.dtype)
    expected = layer(states, attention_mask=mask)
    layer.set_processor(processor)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.bool) else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(layer(states, attention_mask=mask), expected, **close)
    changed = states.clone()
    changed[1, 12:] += 1
    assert torch.equal(layer(changed, attention_mask=mask)[1, :12], layer(states, attention_mask=mask)[1, :12])


def test_a_bias_on_all_scores_of_a_row_changes_nothing():
    layer, processor = layer_and_reference(processors.AttnProcessor2_0())
    mask = torch.zeros(2, 1, 20)
    mask[1] = -10000.0
    expected = layer(noise(*TOKENS), attention_mask=mask)
    layer.set_processor(processor)
    torch.testing.assert_close(layer(noise(*TOKENS), attention_mask=mask), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 1, 20), -1.5), "layer 'layer': attention_mask adds a bias to scores"),
        (torch.ones(2, 20, 20).tril().bool(), r"layer 'layer': attention_mask .* differs between queries or heads"),
        (torch.zeros(2, 1, 7), "layer 'layer': attention_mask has 7 keys, and there are 20"),
    ],
)
def test_other_masks_are_refused(mask, message):
    layer, processor = layer_and_reference(processors.AttnProcessor2_0())
    layer.set_processor(processor)
    with pytest.raises(ValueError, match=message):
        layer(noise(*TOKENS), attention_mask=mask)


def test_gradients_flow():
    layer, processor = layer_and_reference(processors.AttnProcessor2_0())
    layer.set_processor(processor)
    with torch.enable_grad():
        layer(noise(*TOKENS)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# Plans


def test_a_model_is_calibrated(tmp_path):
    model, inputs = build("unet_condition")
    before = picture(model, inputs)
    candidates = [Uniform(), WildCatAttention(bins=4)]
    plan = calibrate(model, [inputs], candidates, (8, 16, 64), tolerance=0.5, use=use)
    assert_same(before, picture(model, inputs))
    assert [layer.name for layer in plan.layers] == [
        name for name, module in attention_layers(model).items() if not module.is_cross_attention
    ]
    assert len(plan) > 0 and all(layer.error <= 0.5 for layer in plan.layers)
    plan.save(tmp_path / "plan.json")
    with use(model, Plan.load(tmp_path / "plan.json")) as layers:
        assert layers == tuple(plan)
        inside = model(**inputs).sample
    error = float((inside - before["output"]).norm() / before["output"].norm())
    found = compare_outputs(model, [inputs], plan, use=use)
    assert 0 < found.errors[0] == pytest.approx(error, rel=1e-4)
