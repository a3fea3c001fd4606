"""Rotary positions undone in every family of Transformers: a dozen by default, all in the nightly run.

Every attention layer reads one hidden state at all positions: its queries are equal once their rotation is undone.
All families, with the reasons of those that are skipped:
    HYPOTHESIS_PROFILE=nightly python -m pytest -q -rs tests/test_rope_families.py
"""

import os

import pytest
import torch

from tests import zoo
from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.compressors import Everything
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models.rope import rotations_of
from wildcat_kv.models.support import cache_layers, decoder_config

# Not to be skipped: positions in some layers, in none, learned, in pairs, on some channels, by layer type.
TEXT = (
    "afmoe",
    "cohere2_moe",
    "cohere",
    "exaone4",
    "flint",
    "gemma3_text",
    "gpt2",
    "kolibri1",
    "llama",
    "modernbert-decoder",
    "phimoe",
    "qwen3_next",
    "smollm3",
)
IMAGE = ("internvl", "muse_glimmer", "qwen2_vl", "qwen3_vl")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LENGTH = 40


def names(few, every):
    """The families of a run, the few that must work first."""
    return [*few, *(name for name in every() if name not in few)] if NIGHTLY else list(few)


def hold(module, args, kwargs):
    """Give an attention layer the first token's hidden state at all positions."""

    def held(value):
        sequence = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3
        return value[:, :1].expand_as(value).contiguous() if sequence and value.shape[1] > 1 else value

    return tuple(map(held, args)), {**kwargs, **{k: held(v) for k, v in kwargs.items() if k == "hidden_states"}}


def spread(vectors, whole):
    """How far apart vectors (rows, heads, n, d) of several positions are, beside the largest channel of `whole`."""
    return float((vectors - vectors[:, :, :1]).abs().max() / whole.abs().max())


def check(name, image, required):
    """Undo the rotations of a tiny model's queries; skip a family that is refused, unless it is required."""
    if name not in (zoo.image_families() if image else zoo.text_families()):
        pytest.skip("not in this version of Transformers")
    give_up = pytest.fail if required else pytest.skip
    try:
        tiny = zoo.tiny(name, image)
    except zoo.NotBuiltError as error:
        give_up(f"not built: {error}")
    model = tiny.model
    try:
        decoder = decoder_config(model.config)
        layers = cache_layers(decoder)[1]
    except Exception as error:
        give_up(f"not compressed: {error}")
    try:
        rotations = rotations_of(decoder, layers)
    except ValueError as error:
        give_up(f"refused: {error}")
    cache = CompressedCache(model.config, compressor=Everything(queries=True), ratio=1.0)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        # Images whose positions are not those of a text are refused beside methods that undo rotations.
        text = not image or any(rotation.grids for rotation in rotations.values())
        model(**({"input_ids": zoo.words(1, LENGTH)} if text else tiny.inputs(LENGTH)), **{CACHE: cache})
    except Exception as error:
        give_up(f"not read: {type(error).__name__}: {error}")
    for index in layers:
        queries = cache.layers[index].state.log.recent().float()
        assert queries.shape[2] >= LENGTH
        back = rotations[index].back(queries, torch.arange(queries.shape[2])[None])
        assert spread(back, queries) < 0.01
        assert rotations[index].rotates == (spread(queries, queries) > 0.01)


@pytest.mark.parametrize("name", names(TEXT, zoo.text_families))
def test_queries_of_one_hidden_state_are_equal_once_their_rotation_is_undone(name):
    check(name, False, name in TEXT)


@pytest.mark.parametrize("name", names(IMAGE, zoo.image_families))
def test_so_they_are_in_models_of_images(name):
    check(name, True, name in IMAGE)
