"""Rotary positions undone: of one token repeated, all queries are the same but for their positions."""

import sys

import pytest
import torch
import transformers as tf

from tests.families import REGISTRY
from tests.tiny import SMALL, random_ids, tiny_config, tiny_model
from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models.rope import rotation_of, rotations_of
from wildcat_kv.models.support import decoder_config

pytestmark = pytest.mark.filterwarnings("ignore:config=Phi3Config. generate.. of this model drops any cache")

# The queries' rotation comes from a table of sinusoids: `rotation_of` says that it does not understand it.
TABLES = ("gptj",)
# Positions are added to what the first layer reads, so that its queries differ and nothing is to be undone.
LEARNED = ("opt", "gpt2")
# Layers with a state know how many equal tokens came before: attention layers take their places.
ATTENTION_ONLY = {
    "qwen3_next": {"layer_types": ["full_attention"] * 3},
    "qwen3_5": {"layer_types": ["full_attention"] * 3},
    "lfm2": {"layer_types": ["full_attention"] * 3},
    "granite4": {"layer_types": ["attention"] * 3},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 1},
    "bamba": {"attn_layer_indices": [0, 1, 2]},
}
# Ways to configure a family that change where it has positions.
VARIANTS = {
    "exaone4 without windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "granite4 with positions": ("granite4", {**ATTENTION_ONLY["granite4"], "position_embedding_type": "rope"}),
    "granite4 with the type nope": ("granite4", {**ATTENTION_ONLY["granite4"], "position_embedding_type": "nope"}),
    "gemma3 with two bases": ("gemma3", {"rope_local_base_freq": 100.0, "rope_theta": 5000.0}),
    "llama with scaled frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama with yarn, which stretches": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
LENGTH = 40


def cases():
    """Parameters of a test."""
    parameters = []
    chosen = {
        name: (name, ATTENTION_ONLY.get(name, {})) for name in REGISTRY if name not in (*LEARNED, *TABLES)
    } | VARIANTS
    for name, (family, changes) in chosen.items():
        entry = REGISTRY[family]
        if entry.status != "refused":
            marks = pytest.mark.skipif(entry.missing, reason="not in this version of Transformers")
            parameters.append(pytest.param(family, changes, id=name, marks=marks))
    return parameters


@pytest.mark.parametrize(("family", "changes"), cases())
def test_queries_of_one_repeated_token_are_equal_once_their_rotation_is_undone(family, changes):
    model = tiny_model(family, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # their share of the attention falls as tokens come
            parameter.data.fill_(-1e4)
    cache = CompressedCache(model.config, compressor="expected_attention", ratio=1.0)
    model(torch.full((2, LENGTH), 7), **{CACHE: cache})
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, WildCatLayer):
            continue
        rotation = rotation_of(decoder_config(model.config), index)
        queries = layer.state.log.recent().float()
        back = rotation.back(queries, torch.arange(LENGTH).expand(2, -1))
        assert (back - back[:, :, :1]).norm(dim=-1).max() <= 1e-3 * back.norm(dim=-1).max()


@pytest.mark.parametrize(("family", "changes"), cases())
@pytest.mark.parametrize("alike", [False, True])
def test_what_is_moved_is_what_it_would_be_there(family, changes, alike):
    model = tiny_model(family, **changes)
    cache = CompressedCache(model.config, compressor="expected_attention", ratio=1.0)
    model(torch.arange(22).view(2, 11) + 3, **{CACHE: cache})
    at, by = torch.arange(11).expand(2, -1), torch.tensor([[30], [-7]]) if alike else torch.arange(22).view(2, 11)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, WildCatLayer):
            rotation = rotation_of(decoder_config(model.config), index)
            moved = rotation.forward(layer.keys, by)
            torch.testing.assert_close(
                rotation.back(moved, at + by), rotation.back(layer.keys, at), rtol=1e-3, atol=1e-4
            )
            radii = rotation.radii(layer.keys)
            torch.testing.assert_close(rotation.radii(moved), radii, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(radii.norm(dim=-1), layer.keys.norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LEARNED)
def test_learned_positions_are_no_rotation(family):
    rotation, queries = rotation_of(tiny_config(family), 0), torch.randn(1, 2, 5, 16)
    positions = torch.arange(5)[None]
    assert torch.equal(rotation.back(queries, positions), queries)
    assert torch.equal(rotation.average(queries, positions), queries)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_oss", "glm4", "gemma3", "phi3_longrope"])
def test_the_average_over_positions_is_that_of_each_rotation(family):
    rotation = rotation_of(tiny_config(family), 1)
    vectors, positions = torch.randn(2, 3, 4, 16), torch.tensor([[3, 9, 300], [0, 1, 2]])
    each = [rotation.average(vectors, positions[:, j : j + 1]) for j in range(3)]
    torch.testing.assert_close(rotation.average(vectors, positions), torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)
    for j, rotated in enumerate(each):
        back = rotation.back(rotated, positions[:, j : j + 1].expand(2, 4))
        torch.testing.assert_close(back, vectors, rtol=1e-4, atol=1e-4)


def test_a_family_that_rotates_in_another_way_is_refused(monkeypatch):
    config = tiny_config("llama")
    module = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    with pytest.raises(ValueError, match="LlamaConfig: the rotary positions of this family are not understood"):
        CompressedCache(config, compressor="expected_attention", ratio=0.5)


def test_an_attention_that_rotates_by_other_angles_is_refused(monkeypatch):
    attention = sys.modules["transformers.models.llama.modeling_llama"].LlamaAttention
    plain = attention.forward

    def slower(self, hidden_states, position_embeddings, *args, **kwargs):
        cos, sin = position_embeddings
        return plain(self, hidden_states, (cos.flip(-1), sin.flip(-1)), *args, **kwargs)

    monkeypatch.setattr(attention, "forward", slower)
    with pytest.raises(ValueError, match="layer 0 tells positions apart in another way"):
        rotation_of(tiny_config("llama"), 0)


def test_a_layer_is_judged_by_itself(monkeypatch):
    attention = sys.modules["transformers.models.llama.modeling_llama"].LlamaAttention
    plain = attention.forward

    def none_in_the_second(self, hidden_states, position_embeddings, *args, **kwargs):
        if self.layer_idx == 1:
            position_embeddings = tuple(angles[:, :1].expand_as(angles) for angles in position_embeddings)
        return plain(self, hidden_states, position_embeddings, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", none_in_the_second)
    rotations = rotations_of(tiny_config("llama"), [0, 1, 2])
    assert [rotation.rotates for rotation in rotations.values()] == [True, False, True]


def test_a_probe_leaves_no_trace():
    config = tiny_config("gemma3")
    fields, name = config.to_dict(), config._attn_implementation
    state = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        rotation = rotation_of(config, 2)
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.bfloat16, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert rotation.rotates
    assert torch.equal(torch.get_rng_state(), state)
    assert (config.to_dict(), config._attn_implementation) == (fields, name)


def test_a_model_larger_than_memory_is_probed():
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8192}
    config = tf.Qwen3MoeConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128, **experts
    )
    rotations = rotations_of(config, range(80))
    assert len(rotations) == 80 and all(rotation.rotates for rotation in rotations.values())


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
# Frequencies that are others in texts longer than 64 tokens.
LONGER = {
    "llama with dynamic frequencies": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "llama with long rope": (
        "llama",
        {"rope_parameters": {**LONGROPE, "rope_theta": 10000.0, "original_max_position_embeddings": 64}},
    ),
    "phi3 with long rope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {**LONGROPE, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        },
    ),
}


@pytest.mark.parametrize("case", LONGER)
def test_positions_to_come_are_rotated_by_the_frequencies_of_the_text_at_hand(case):
    family, changes = LONGER[case]
    rotation, vectors = rotation_of(tiny_config(family, **changes), 1), torch.randn(1, 2, 3, 16)
    near, far = torch.tensor([[3, 20, 60]]), torch.tensor([[300]])
    moved = rotation.forward(rotation.forward(vectors, near + far), -far)
    torch.testing.assert_close(moved, rotation.forward(vectors, near), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", LONGER)
@pytest.mark.parametrize("method", ["expected_attention", "query_wildcat"])
def test_a_text_that_changes_the_frequencies_is_refused_before_it_is_read(case, method):
    family, changes = LONGER[case]
    model = tiny_model(family, **changes)
    cache = CompressedCache(model.config, compressor=method, ratio=0.5)
    model(random_ids(1, 60), **{CACHE: cache})
    with pytest.raises(ValueError, match="65 tokens long: beyond 64 this model rotates by other frequencies"):
        model(random_ids(1, 5), **{CACHE: cache})
    model(random_ids(1, 4), **{CACHE: cache})
    assert cache.get_seq_length() == 64
    plain = CompressedCache(model.config, compressor="snapkv", ratio=0.5)
    model(random_ids(1, 70), **{CACHE: plain})
    assert plain.get_seq_length() == 70


VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}


def test_images_with_positions_in_time_height_and_width_are_refused_and_text_alone_is_not():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = tf.Qwen2VLConfig(text_config={**SMALL, "rope_parameters": rope}, vision_config=VISION)
    with pytest.raises(ValueError, match=r"images have positions in time, height and width.*get_text_config"):
        CompressedCache(config, compressor="query_wildcat", ratio=0.5)
    CompressedCache(config, compressor="snapkv", ratio=0.5)
    cache = CompressedCache(config.get_text_config(), compressor="query_wildcat", ratio=0.5)
    torch.manual_seed(1)
    model = tf.Qwen2VLForConditionalGeneration(config).eval()
    model(random_ids(1, 50), **{CACHE: cache})
    assert cache.get_seq_length() == 50


def test_images_with_positions_of_a_text_are_not_refused():
    config = tf.LlavaConfig(text_config=tiny_config("llama"), vision_config=tf.CLIPVisionConfig())
    CompressedCache(config, compressor="query_wildcat", ratio=0.5)
