"""A fitted scorer for Query WildCat: what it is fitted to, what it scores, and which models and files it refuses."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from tests.driver import METHODS, SCALE, assert_row_is_alone, read, tokens
from tests.tiny import SMALL, random_ids, tiny_model
from wildcat_kv import CompressedCache
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import FittedScorer, load_scorer, scorer_names
from wildcat_kv.compressors.query_wildcat.fitted_scores import fitted_scores, item_features
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint
from wildcat_kv.contexts.profiling import measure_profile
from wildcat_kv.contexts.scorer_fitting import _Regression, fit_scorer
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model_path
from wildcat_kv.models.rope import rotation_of

SIZES = {"sink": 3, "window": 8, "bin_rank": 4}
OURS = METHODS["query_wildcat"]
# Of two heads of 16 channels: key, value, query, recall, and the constant.
WIDTH = 3 * 16 + 2


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def scorer_of(config, layers=None, width=WIDTH, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(heads, width, generator=generator) for _ in range(layers or config.num_hidden_layers)]
    return FittedScorer.of(weights, model="tiny", match=fingerprint(config), texts="none", tokens=1)


def two_layers():
    return tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})


def build(config, scorer, **settings):
    return CompressedCache(config, compressor=replace(OURS, scorer=scorer), **{**SIZES, **settings})


class _Blocks(QueryWildCat):
    """Query WildCat that notes the blocks that it surveys."""

    def survey(self, block):
        self.seen.append(block)
        return super().survey(block)


def blocks_of(config, passes, **settings):
    method = _Blocks(bin_rank=4, queries=20, carried=6, ahead=5, apart=40)
    object.__setattr__(method, "seen", [])
    cache = CompressedCache(config, compressor=method, **{**SIZES, **settings})
    keys, values = tokens(1, sum(passes))
    start = 0
    for count in passes:
        read(cache, keys, values, start, count)
        start += count
    return method.seen, keys, values


# What it scores


def test_scores_are_the_larger_of_recall_and_a_logistic_function_of_what_a_token_was_unrotated():
    config = two_layers()
    [block, *_], keys, values = blocks_of(config, [60], ratio=0.5)
    weights = scorer_of(config).layer(0) / 5
    recall = torch.rand(1, 2, block.items)
    found = fitted_scores(block, recall, weights)
    rotation = rotation_of(config, 0)
    queries = keys[0].repeat_interleave(2, 1) + 0.5
    for head in range(2):
        for item in range(block.items):
            place = torch.tensor([[block.first + item]])
            key = rotation.back(keys[0][:, head : head + 1, place[0]], place).flatten()
            mean = queries[:, 2 * head : 2 * head + 2, place[0]].mean(1, keepdim=True)
            query = rotation.back(mean, place).flatten()
            value = values[0][0, head, place[0]].flatten()
            features = torch.cat((key, value, query, recall[0, head, item].log().view(1), torch.ones(1)))
            expected = torch.maximum(torch.sigmoid(features @ weights[head]), recall[0, head, item])
            torch.testing.assert_close(found[0, head, item], expected, rtol=1e-4, atol=1e-5)


def test_later_folds_score_new_tokens_by_their_positions_and_leave_slots_to_the_recall():
    config = two_layers()
    seen, keys, _ = blocks_of(config, [60, *[1] * 40], max_tokens=40)
    block = seen[-1]
    assert block.exact < block.keys.shape[2] and block.seen > 60 and block.layer_index == 1
    recall = torch.rand(1, 2, block.items)
    features, known = item_features(block, recall)
    slots = block.keys.shape[2] - min(block.exact, block.queries.shape[2]) - block.first
    assert 0 < known == slots < block.items
    scores = fitted_scores(block, recall, scorer_of(config).layer(0))
    assert torch.equal(scores[..., :known], recall[..., :known])
    assert not torch.equal(scores[..., known:], recall[..., known:])
    # The oldest token that is scored, and where it stood in the text.
    place = block.seen - (block.keys.shape[2] - block.first - known)
    position = torch.tensor([[place]])
    unrotated = rotation_of(config, 1).back(keys[1][:, :, place : place + 1], position)
    torch.testing.assert_close(features[:, :, :1, :16], unrotated, rtol=1e-4, atol=1e-5)


def test_items_without_queries_keep_their_recall():
    """Those of tokens that were quantised under a budget in bytes, when a question fills it."""
    config = two_layers()
    [block, *_], _, _ = blocks_of(config, [60], ratio=0.5)
    recall, weights = torch.rand(1, 2, block.items), scorer_of(config).layer(0)
    behind = block.keys.shape[2] - block.first - block.items
    assert behind == SIZES["window"]
    for count in (behind, 3):
        short = replace(block, queries=block.queries[:, :, -count:])
        assert torch.equal(fitted_scores(short, recall, weights), recall), count


def test_padding_stays_out():
    config = two_layers()
    [block, *_], _, _ = blocks_of(config, [60], ratio=0.5)
    recall = torch.rand(1, 2, block.items)
    recall[..., 5] = -torch.inf
    scores = fitted_scores(block, recall, scorer_of(config).layer(0))
    assert bool((scores[..., 5] == -torch.inf).all()) and bool((scores[..., 6:] >= 0).all())


def test_the_second_part_is_for_what_the_scorer_marks():
    # Only the value's first channel counts, far above the recall: the tokens in which it is largest stay.
    config = two_layers()
    weights = torch.zeros(2, WIDTH)
    weights[:, 16], weights[:, -1] = 1.0, 8.0
    scorer = FittedScorer.of([weights] * 2, model="tiny", match=fingerprint(config), texts="none", tokens=1)
    method = replace(OURS, scorer=scorer, attended=0.0, recalled=1.0, ridge=0.0, share="layers")
    cache = CompressedCache(config, compressor=method, ratio=0.25, **SIZES)
    keys, values = tokens(1, 120)
    read(cache, keys, values, 0, 120)
    for number, layer in enumerate(cache.layers):
        kept = layer.state.entries.valid[0].sum(-1) - 11
        for head in range(2):
            middle = values[number][0, head, 3:112]
            best = middle[:, 0].topk(int(kept[head])).indices.sort().values
            held = layer.state.entries.values[0, head][layer.state.entries.valid[0, head]][3:-8]
            torch.testing.assert_close(held, middle[best])


@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 40}])
def test_a_padded_row_is_what_it_is_alone(budget):
    config = two_layers()
    scorer = scorer_of(config)
    keys, values = tokens(3, 130)
    mask = torch.ones(3, 130, dtype=torch.bool)
    mask[0, :57] = mask[2, :13] = False
    rotation = rotation_of(config, 0)
    shift = torch.tensor([[-57], [0], [-13]])
    keys = torch.stack([rotation.forward(layer, shift) for layer in keys])  # positions count from a row's first token
    together = build(config, scorer, **budget)
    read(together, keys, values, 0, 130, mask)
    for row, padding in enumerate((57, 0, 13)):
        single = build(config, scorer, **budget)
        read(single, keys[:, row : row + 1, :, padding:], values[:, row : row + 1, :, padding:], 0, 130 - padding)
        for ours, theirs in zip(together.layers, single.layers, strict=True):
            assert_row_is_alone(ours.state.entries, row, theirs.state.entries)


# The fit


def test_the_regression_is_ridge_regression_of_standardised_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 90, 4, generator=generator) * torch.tensor([1.0, 9.0, 0.2, 1.0]) + 3
    logits = torch.randn(2, 90, generator=generator)
    found = _Regression()
    found.add(features[:, :30], logits[:, :30])
    found.add(features[:, 30:], logits[:, 30:])
    weights = found.solve(0.1)
    for head in range(2):
        own, wanted = features[head].double(), logits[head].double()
        mean, deviation = own.mean(0), own.std(0, unbiased=False)
        scaled = (own - mean) / deviation
        gram = scaled.T @ scaled / 90 + 0.1 * torch.eye(4, dtype=torch.float64)
        solved = torch.linalg.solve(gram, scaled.T @ (wanted - wanted.mean()) / 90)
        predicted = own @ weights[head, :-1] + weights[head, -1]
        torch.testing.assert_close(predicted, scaled @ solved + wanted.mean())


def test_it_is_fitted_to_a_second_reading(llama, monkeypatch):
    # In place of the scores of a second reading: a function of the keys, which a linear fit finds again.
    _, tokenizer = llama, object()
    texts = [random_ids(1, 300, seed=seed) for seed in range(2)]
    rotations = [rotation_of(llama.config, index) for index in range(3)]

    def reread(context, compressor, given):
        assert given is tokenizer
        states = []
        for layer, rotation in zip(context.exact.layers, rotations, strict=True):
            keys = layer.state.storage.entries.keys
            unrotated = rotation.back(keys, torch.arange(keys.shape[2])[None])
            states.append(torch.sigmoid(unrotated[..., :1] - 1))
        return states

    monkeypatch.setattr("wildcat_kv.contexts.scorer_fitting.Context.reread", reread)
    scorer = fit_scorer(llama, tokenizer, texts, name="tiny", description="random ids", ridge=1e-6)
    assert scorer.tokens == 600 and scorer.heads == (2, 2, 2)
    for place in range(3):
        weights = scorer.layer(place)
        torch.testing.assert_close(weights[:, 0], torch.ones(2), rtol=0.02, atol=0.02)
        torch.testing.assert_close(weights[:, -1], -torch.ones(2), rtol=0.2, atol=0.2)


@pytest.mark.parametrize(("length", "ridge", "message"), [(100, 0.1, "at least 256"), (300, 0.0, "ridge=0.0 must be")])
def test_a_fit_to_too_little_is_refused(llama, length, ridge, message):
    with pytest.raises(ValueError, match=message):
        fit_scorer(llama, None, [random_ids(1, length)], name="tiny", description="none", ridge=ridge)


# With a profile


def test_a_profile_that_was_measured_with_a_scorer_needs_this_one(llama):
    scorer, other = scorer_of(llama.config), scorer_of(llama.config, seed=1)
    texts, parameters = [random_ids(1, 300)], {"name": "tiny", "description": "random ids", "ratios": (0.25,)}
    found = measure_profile(llama, texts, method=replace(OURS, scorer=scorer), **parameters)
    assert found.scorer == scorer.digest != other.digest
    assert found != measure_profile(llama, texts, method=OURS, **parameters).model_copy(update={"scorer": found.scorer})
    assert QueryWildCat(profile=found, scorer=scorer).scorer == scorer
    for wrong in (None, other):
        with pytest.raises(ValueError, match=r"profile=Profile\('tiny', 3 layers\) was measured with a scorer, and"):
            QueryWildCat(profile=found, scorer=wrong)


def test_a_scorer_beside_a_profile_that_knows_none_is_warned_of(llama):
    profile = measure_profile(
        llama, [random_ids(1, 300)], name="tiny", description="random ids", ratios=(0.25,), method=OURS
    )
    with pytest.warns(UserWarning, match=r"measured without a scorer.*`wildcat-kv profile MODEL --scorer SCORER`"):
        QueryWildCat(profile=profile, scorer=scorer_of(llama.config))


def test_a_process_with_a_share_of_the_heads_does_without():
    config = two_layers()
    with_scorer, without = (build(config, scorer, ratio=0.25) for scorer in (scorer_of(config, heads=4), None))
    keys, values = tokens(1, 60)
    with pytest.warns(UserWarning, match="left out: this process has 2 of a layer's 4 heads"):
        read(with_scorer, keys, values, 0, 60)
    read(without, keys, values, 0, 60)
    for ours, theirs in zip(with_scorer.layers, without.layers, strict=True):
        assert torch.equal(ours.state.entries.keys, theirs.state.entries.keys)


# Files


def test_a_saved_cache_keeps_its_scorer(llama, tmp_path):
    cache = build(llama.config, scorer_of(llama.config), ratio=0.25)
    llama(random_ids(1, 120), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", llama.config)
    assert loaded.compressor == cache.compressor and loaded.compressor.scorer is not None
    question = random_ids(1, 40, seed=1)
    again, expected = (llama(question, **{CACHE: each}).logits for each in (loaded, cache))
    torch.testing.assert_close(again, expected)


def test_a_file_gives_the_scorer_back(tmp_path):
    scorer = scorer_of(two_layers())
    path = tmp_path / "tiny.safetensors"
    scorer.save(path)
    assert load_scorer(path) == load_scorer(str(path)) == scorer == load_scorer(scorer.model_dump(mode="json"))
    assert "weights" not in repr(scorer)
    assert torch.equal(load_scorer(path).layer(1), scorer.layer(1))


def test_the_scorers_of_the_package_fit_their_models():
    assert scorer_names() == ["qwen2.5-coder-0.5b", "smollm2-135m"]
    config = tf.AutoConfig.from_pretrained(default_model_path())
    cache = CompressedCache(config, compressor=QueryWildCat(scorer="smollm2-135m"), ratio=0.25)
    scorer = cache.compressor.scorer
    assert scorer.heads == (3,) * 30 and scorer.layer(29).shape == (3, 3 * 64 + 2)
    assert "half develop" in scorer.texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"scorer=FittedScorer\('tiny', 3 layers\) is of a model with hidden_size=64"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=3, and this one has 4; fit one by `wildcat-kv fit-scorer MODEL`"),
    ],
)
def test_a_scorer_of_another_model_is_refused(change, message):
    config = tf.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match=message):
        build(tf.LlamaConfig(**{**SMALL, **change}), scorer_of(config), ratio=0.25)


def test_a_scorer_of_other_layers_or_sizes_is_refused():
    config = two_layers()
    with pytest.raises(ValueError, match="has 3 layers, and this model has 2 that can be compressed"):
        build(config, scorer_of(config, layers=3), ratio=0.25)
    keys, values = tokens(1, 60)
    for wrong in ({"width": WIDTH - 1}, {"heads": 1}):
        cache = build(config, scorer_of(config, **wrong), ratio=0.25)
        cache.layers[0].announce(1, 60, None)
        cache.update(keys[0], values[0], 0)
        with pytest.raises(ValueError, match=r"for layer 0, and this layer needs \(2, 50\); leave scorer out"):
            cache.layers[0].after_attention(keys[0].repeat_interleave(2, 1), SCALE)


def damaged(scorer, **change):
    return {**scorer.model_dump(mode="json"), **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "scorer: version=2"),
        ({"heads": [2]}, "weights: 2 layers, and heads has 1"),
        ({"heads": [2, 3]}, "weights: layer 1 needs finite numbers, as many for each of its 3 heads"),
        ({"weights": ["AAAA", "?"]}, "weights: layer 0 is no base64 of float32"),
        ({"heads": [1, 1], "weights": ["AADAfw==", "AADAfw=="]}, "weights: layer 0 needs finite numbers"),
        ({"other": 1}, "other=1: no such setting"),
    ],
)
def test_damaged_fields_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        QueryWildCat(scorer=damaged(scorer_of(two_layers()), **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("smollm2-135", "scorer='smollm2-135': no such scorer; did you mean 'smollm2-135m'"),
        ("nowhere.safetensors", "scorer='nowhere.safetensors' is no file of a scorer"),
    ],
)
def test_what_is_no_scorer_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QueryWildCat(scorer=given)
    with pytest.raises(TypeError, match="scorer=7 is no scorer"):
        QueryWildCat(scorer=7)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0": torch.zeros(2, 3)}, None),
        ({"other": torch.zeros(2, 3)}, {"wildcat_kv_scorer": "{}"}),
        ({"0": torch.zeros(6)}, {"wildcat_kv_scorer": "{}"}),
        ({"0": torch.zeros(2, 3)}, {"wildcat_kv_scorer": json.dumps({"version": 3})}),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, tensors, metadata):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"other\.safetensors'") as error:
        load_scorer(path)
    assert "\n" not in str(error.value)
