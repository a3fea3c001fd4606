"""Positions that a model keeps on itself: every cache goes on with its own, whatever else the model has read."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from tests.cache.test_disk import header_change, rewrite
from tests.tiny import random_ids, tiny_model
from tests.vision import SEEING, image_prompt, seeing_model
from tests.words import tokenizer, words
from wildcat_kv import (
    CompressedCache,
    CompressedContext,
    Context,
    WildCatCache,
    compile_decoding,
    compress_context,
    join_caches,
)
from wildcat_kv.contexts.reading import read
from wildcat_kv.hook.keyword import CACHE

THREE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
# Lengths are chosen so that answers at ratio 0.25 come from compressed layers.
SMALL = {"sink": 4, "window": 8, "bin_rank": 4}
BUDGETS = [{"ratio": 1.0}, {"ratio": 0.25, **SMALL}]


@pytest.fixture(scope="module")
def models():
    """One model of a family, made once; tests must work whatever others have left on it."""
    made = {}
    return lambda family: made[family] if family in made else made.setdefault(family, seeing_model(family))


def seen(model, family, rows=1, **budget):
    """A cache that has read an image."""
    cache = WildCatCache(model.config, **(budget or {"ratio": 0.25, **SMALL}))
    model(**image_prompt(family, rows), use_cache=True, **{CACHE: cache})
    return cache


def ask(model, cache, rows=1, seed=7):
    """Logits (rows, n, vocabulary) of a question that is read token by token."""
    question = random_ids(rows, 6, seed)
    return torch.cat([model(ids, use_cache=True, **{CACHE: cache}).logits for ids in question.split(1, 1)], dim=1)


def generate(model, cache, ids, **options):
    """Logits and tokens of an answer by `generate()`, which is given all ids."""
    question = random_ids(ids.shape[0], 6, 7)
    out = model.generate(
        torch.cat((ids, question), dim=1),
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{CACHE: cache},
        **options,
    )
    return torch.stack(out.logits, dim=1)


def both_ways(model, cache, family, rows=1):
    """Answers by forward passes and by `generate()`, each of a copy of the cache."""
    copies = [cache.clone() if isinstance(cache, CompressedCache) else cache() for _ in range(2)]
    ids = image_prompt(family, rows)["input_ids"]
    return [ask(model, copies[0], rows), generate(model, copies[1], ids)]


def read_exactly(model, family, rows=1):
    """Answers over Transformers' own cache, on a model that reads nothing in between."""

    def cache():
        made = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(**image_prompt(family, rows), use_cache=True, **{CACHE: made})
        return made

    ids = image_prompt(family, rows)["input_ids"]
    return [ask(model, cache(), rows), generate(model, cache(), ids)]


def assert_equal(answers, expected):
    for one, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def disturb(model, family):
    """List what a model may do between two questions: texts and images, in other numbers of rows."""
    model(**image_prompt(family, 3, before=11, seed=9))
    model.generate(**image_prompt(family, before=50, after=3, seed=4), max_new_tokens=2, do_sample=False)
    model.generate(random_ids(4, 20), max_new_tokens=2, do_sample=False)
    model(random_ids(2, 9))
    seen(model, family, rows=2)


# Saved and loaded


@pytest.mark.parametrize("budget", BUDGETS, ids=["ratio 1", "ratio 0.25"])
@pytest.mark.parametrize("family", THREE)
def test_a_loaded_image_context_answers_as_the_saved_one(family, budget, tmp_path, models):
    cache = seen(models(family), family, **budget)
    expected = both_ways(models(family), cache, family)
    cache.save(tmp_path / "context.safetensors")
    other = seeing_model(family)
    loaded = WildCatCache.load(tmp_path / "context.safetensors", other.config)
    assert_equal(both_ways(other, loaded, family), expected)
    if budget["ratio"] == 1.0:
        assert_equal(expected, read_exactly(seeing_model(family), family))


def test_another_process_gives_the_very_same_answers(tmp_path, models):
    """Save all three families, and store and load their models too."""
    here, paths = {}, {}
    for family in THREE:
        cache = seen(models(family), family)
        paths[family] = str(tmp_path / f"{family}.safetensors")
        cache.save(paths[family])
        models(family).save_pretrained(tmp_path / family)
        here[family] = [answer.argmax(-1).tolist() for answer in both_ways(models(family), cache, family)]
    code = f"""
import json, torch, transformers
from tests.cache.test_positions import both_ways
from wildcat_kv import WildCatCache
torch.set_num_threads(1)
answers = {{}}
with torch.no_grad():
    for family, path in {paths!r}.items():
        model = transformers.AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r} + "/" + family).eval()
        cache = WildCatCache.load(path, model.config)
        answers[family] = [answer.argmax(-1).tolist() for answer in both_ways(model, cache, family)]
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_positions_of_several_rows_are_saved(tmp_path, models):
    """Rows whose images take unlike numbers of positions."""
    cache, expected = unlike_rows(models("qwen2_vl"))
    cache.save(tmp_path / "context.safetensors")
    loaded = WildCatCache.load(tmp_path / "context.safetensors", models("qwen2_vl").config).clone()
    disturb(models("qwen2_vl"), "qwen2_vl")
    assert_equal([ask(models("qwen2_vl"), loaded, 2)], [expected])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, tensors: tensors.pop("positions.0"), "positions of its rows"),
        (lambda metadata, tensors: tensors.update({"positions.0": torch.zeros(2, 1).long()}), "positions of its rows"),
        (lambda metadata, tensors: tensors.update({"positions.0": torch.zeros(1).long()}), "positions of its rows"),
        (lambda metadata, tensors: tensors.update({"positions.0": torch.zeros(1, 1).half()}), "positions of its rows"),
        (lambda metadata, tensors: tensors.update({"positions.1": torch.zeros(1, 1).long()}), "belongs to no layer"),
        (header_change(lambda header: header["positions"][0].update(known=False)), "positions of its rows"),
        (header_change(lambda header: header["positions"][0].update(start=3)), "do not fit the tokens read"),
        (
            header_change(lambda header: header["positions"].append({"start": 0, "known": True, "deltas": False})),
            "do not fit the tokens",
        ),
        (
            header_change(lambda header: header["positions"].append({"start": 999, "known": True, "deltas": False})),
            "fit the tokens",
        ),
        (header_change(lambda header: header["positions"][0].update(start="x")), "header does not fit"),
        (lambda metadata, tensors: metadata.update(version="3"), "has format version 3, and this release reads 4"),
    ],
)
def test_damaged_positions_are_refused(change, message, tmp_path, models):
    cache, path = seen(models("qwen2_vl"), "qwen2_vl"), tmp_path / "context.safetensors"
    cache.save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        WildCatCache.load(path, models("qwen2_vl").config)


@pytest.mark.parametrize("family", THREE)
def test_an_image_context_is_refused_for_a_model_with_another_vision_part(family, tmp_path, models):
    path, other = tmp_path / "context.safetensors", seeing_model(family, depth=3, num_hidden_layers=3)
    seen(models(family), family).save(path)
    with pytest.raises(ValueError, match=r"another model than config=\w+: vision_config.depth is 2 in the one and 3"):
        WildCatCache.load(path, other.config)
    assert other.config.get_text_config()._attn_implementation == "sdpa"
    cache = seen(models(family), family)
    WildCatCache(other.config, ratio=1.0)  # switches its attention
    for ask_it in (lambda: ask(other, cache), lambda: generate(other, cache, image_prompt(family)["input_ids"])):
        with pytest.raises(
            ValueError, match=r"is another than the one that read .*: vision_config.depth is 2"
        ) as error:
            ask_it()
        assert "\n" not in str(error.value)
    assert other.model.rope_deltas is None
    assert_equal([ask(models(family), cache)], [ask(models(family), seen(models(family), family))])


def test_a_text_context_does_not_depend_on_the_vision_part(tmp_path, models):
    cache, other = (
        WildCatCache(models("qwen2_vl").config, ratio=1.0),
        seeing_model("qwen2_vl", depth=3, num_hidden_layers=3),
    )
    models("qwen2_vl")(random_ids(1, 80), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    WildCatCache.load(tmp_path / "context.safetensors", other.config)


@pytest.mark.parametrize("family", THREE)
def test_questions_about_an_image(family, tmp_path):
    """A cache that has read an image, as a context; and a model whose vision part has other weights."""
    model, path, ids = seeing_model(family), tmp_path / "context.safetensors", image_prompt(family)["input_ids"]
    questions = ["w5 w9 w7", "w80", "w33 w44 w55 w66 w77"]
    context = CompressedContext(model, tokenizer(None), seen(model, family), ids, ids.shape[1])
    alone = [context.ask(question, max_new_tokens=6) for question in questions]
    disturb(model, family)
    assert context.ask_many(questions, max_new_tokens=6) == alone
    context.save(path)
    other = seeing_model(family)
    loaded = CompressedContext.load(path, other, tokenizer(None))
    assert loaded.ask_many(questions, max_new_tokens=6) == alone
    for weight in other.model.visual.parameters():
        weight.mul_(1.5)
    left = other.model.rope_deltas
    for refused in (lambda: CompressedContext.load(path, other, tokenizer(None)), lambda: loaded.ask("w5")):
        with pytest.raises(ValueError, match=r"other weights.*visual\..* differs") as error:
            refused()
        assert "\n" not in str(error.value)
    assert other.model.rope_deltas is left


# Whatever happens in between


@pytest.mark.parametrize("family", SEEING)
def test_nothing_in_between_changes_an_answer(family):
    """At ratio 1 as Transformers' own cache on a model that reads nothing else, and at 0.25 as before."""
    model, expected = seeing_model(family), read_exactly(seeing_model(family), family)
    disturb(model, family)
    exact, compressed = seen(model, family, ratio=1.0), seen(model, family)
    before = both_ways(model, compressed, family)
    disturb(model, family)
    assert_equal(both_ways(model, exact, family), expected)
    disturb(model, family)
    assert_equal(both_ways(model, compressed, family), before)


@pytest.mark.parametrize("family", SEEING)
def test_a_text_after_an_image_is_read_as_by_a_new_model(family):
    model, fresh = seeing_model(family), seeing_model(family)
    disturb(model, family)
    ids, logits = random_ids(2, 60), []
    for one in (model, fresh):
        caches = [WildCatCache(one.config, ratio=1.0), DynamicCache(config=one.config.get_text_config(decoder=True))]
        cache = caches[one is fresh]
        one(ids, use_cache=True, **{CACHE: cache})
        logits.append([ask(one, cache, rows=2)])
    assert_equal(*logits)


@pytest.mark.parametrize("family", THREE)
def test_compressed_texts_answer_alike_before_and_after_an_image(family):
    model = seeing_model(family)
    questions = ["w5 w9 w7", "w80", "w33 w44 w55 w66 w77"]

    def answers(context):
        talk = context.conversation()
        return context.ask_many(questions, max_new_tokens=6), [talk.ask(one, max_new_tokens=6) for one in questions]

    old = compress_context(model, tokenizer(), words(150), ratio=0.5)
    before = answers(old)
    disturb(model, family)
    assert answers(old) == before
    disturb(model, family)
    assert answers(compress_context(model, tokenizer(), words(150), ratio=0.5)) == before


@pytest.mark.parametrize("family", THREE)
def test_two_contexts_take_turns_on_one_model(family, models):
    model = models(family)
    pair = [seen(model, family, **BUDGETS[1]), WildCatCache(model.config, **BUDGETS[1])]
    model(**image_prompt(family, before=90, after=9, seed=3), use_cache=True, **{CACHE: pair[1]})
    expected = [ask(model, cache.clone()) for cache in pair]
    question, logits = random_ids(1, 6, 7), ([], [])
    for ids in question.split(1, 1):
        for cache, answer in zip(pair, logits, strict=True):
            answer.append(model(ids, use_cache=True, **{CACHE: cache}).logits)
    assert_equal([torch.cat(answer, dim=1) for answer in logits], expected)


# Copies, rows and rollback


def unlike_rows(model):
    """A cache of two rows whose images take unlike numbers of positions, and the answers of Transformers' cache."""
    ids = image_prompt("qwen2_vl", 2)["input_ids"]
    pixels = torch.randn(128, 3 * 2 * 16, generator=torch.Generator().manual_seed(1))
    grids = torch.tensor([[1, 8, 8], [1, 4, 16]])
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == 120).long(),
    }
    cache, exact = WildCatCache(model.config, ratio=1.0), DynamicCache(config=model.config.get_text_config())
    model(**inputs, **{CACHE: cache})
    fresh = seeing_model("qwen2_vl")
    fresh(**inputs, **{CACHE: exact})
    assert fresh.model.rope_deltas.unique().numel() == 2
    return cache, ask(fresh, exact, 2)


def test_positions_follow_the_rows(models):
    model = models("qwen2_vl")
    cache, expected = unlike_rows(model)
    selected, repeated, reordered = cache.clone(), cache.clone(), cache.clone()
    selected.batch_select_indices([1])
    repeated.batch_repeat_interleave(2)
    reordered.reorder_cache(torch.tensor([1, 0]))
    disturb(model, "qwen2_vl")
    question = random_ids(2, 6, 7)

    def answer(cache, rows):
        ids = question[rows].split(1, 1)
        return torch.cat([model(one, **{CACHE: cache}).logits for one in ids], dim=1)

    close = {"rtol": 1e-4, "atol": 1e-4}  # batches of another size
    torch.testing.assert_close(answer(selected, [1]), expected[1:], **close)
    torch.testing.assert_close(answer(repeated, [0, 0, 1, 1])[[0, 2]], expected, **close)
    again = random_ids(2, 6, 7).flip(0)
    logits = torch.cat([model(one, **{CACHE: reordered}).logits for one in again.split(1, 1)], dim=1)
    torch.testing.assert_close(logits.flip(0), expected, **close)


@pytest.mark.parametrize("family", THREE)
def test_several_questions_of_one_image(family, models):
    """A batch of questions, by both ways, each as if it were the only one; and by beams."""
    model, ids = models(family), image_prompt(family)["input_ids"]
    cache = seen(model, family)
    questions = random_ids(3, 6, 7)
    rows = cache.clone()
    rows.batch_repeat_interleave(3)
    disturb(model, family)
    prompts = torch.cat((ids.expand(3, -1), questions), dim=1)
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(prompts, **options, **{CACHE: rows})
    alone = [model.generate(prompt[None], **options, **{CACHE: cache.clone()})[0] for prompt in prompts]
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    beams = cache.clone()
    beams.batch_repeat_interleave(6)
    disturb(model, family)
    together = model.generate(prompts, num_beams=2, **options, **{CACHE: beams})
    for prompt, tokens in zip(prompts, together, strict=True):
        copies = cache.clone()
        copies.batch_repeat_interleave(2)
        assert model.generate(prompt[None], num_beams=2, **options, **{CACHE: copies})[0].tolist() == tokens.tolist()


def test_rows_of_one_prompt_at_unlike_positions_are_refused(models):
    cache, _ = unlike_rows(models("qwen2_vl"))
    with pytest.raises(ValueError, match="rotary positions differ within the 2 rows of a prompt"):
        models("qwen2_vl").generate(random_ids(1, 100), num_beams=2, max_new_tokens=2, **{CACHE: cache})


@pytest.mark.parametrize("family", THREE)
def test_a_reset_cache_reads_the_next_text_as_a_new_one(family, models):
    model, cache = models(family), seen(models(family), family, ratio=1.0)
    for empty in (cache, cache.fresh()):
        empty.reset()
        model(random_ids(1, 50), **{CACHE: empty})
        new = WildCatCache(model.config, ratio=1.0)
        model(random_ids(1, 50), **{CACHE: new})
        assert_equal([ask(model, empty)], [ask(model, new)])


def test_an_image_that_is_taken_back_leaves_the_positions_before_it(models):
    """A text, an image by generate(), which counts its positions anew, and back."""
    model = models("qwen2_5_vl")
    cache = WildCatCache(model.config, ratio=1.0)
    text, prompt = text_and_image("qwen2_5_vl")
    model(text, **{CACHE: cache})
    expected = ask(model, cache.clone())
    cache.activate_past_recording()
    model.generate(**prompt, max_new_tokens=1, do_sample=False, **{CACHE: cache})
    assert cache.rope.after(cache.get_seq_length(), model).item() == -12
    cache.crop(20 - cache.get_seq_length())
    assert_equal([ask(model, cache)], [expected])


def text_and_image(family, length=20):
    """A text before an image, as one prompt."""
    text, prompt = random_ids(1, length), image_prompt(family)
    prompt["input_ids"] = torch.cat((text, prompt["input_ids"]), dim=1)
    prompt["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (length, 0))
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    return text, prompt


def images_in_turn(model, cache, family):
    for seed in (3, 4):
        inputs = image_prompt(family, before=9, seed=seed)
        model(**{**inputs, "attention_mask": None}, use_cache=True, **{CACHE: cache})


def text_then_image(model, cache, family):
    model(random_ids(1, 20), use_cache=True, **{CACHE: cache})
    model(**{**image_prompt(family), "attention_mask": None}, use_cache=True, **{CACHE: cache})


def text_then_image_by_generate(model, cache, family):
    text, prompt = text_and_image(family)
    model(text, use_cache=True, **{CACHE: cache})
    model.generate(**prompt, max_new_tokens=1, do_sample=False, **{CACHE: cache})


@pytest.mark.parametrize("reading", [images_in_turn, text_then_image, text_then_image_by_generate])
@pytest.mark.parametrize("family", THREE)
def test_an_image_in_a_later_pass(family, reading, tmp_path, models):
    """Whatever positions Transformers gives it, the cache keeps them."""
    fresh, exact = seeing_model(family), DynamicCache(config=models(family).config.get_text_config())
    reading(fresh, exact, family)
    model, cache = models(family), WildCatCache(models(family).config, ratio=1.0)
    disturb(model, family)
    reading(model, cache, family)
    disturb(model, family)
    cache.save(tmp_path / "context.safetensors")
    loaded = WildCatCache.load(tmp_path / "context.safetensors", model.config).clone()
    expected = ask(fresh, exact)
    assert_equal([ask(model, cache), ask(model, loaded)], [expected, expected])


def test_compressing_again_and_joining_keep_positions(models):
    model = models("qwen2_vl")
    disturb(model, "qwen2_vl")
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[0, :30] = 0
    context = Context(model, random_ids(2, 90), mask)
    disturb(model, "qwen2_vl")
    again = context.compress(ratio=1.0)
    ids = torch.cat((random_ids(2, 90), random_ids(2, 4, 8)), dim=1)
    longer = torch.cat((mask, torch.ones(2, 4, dtype=torch.int64)), dim=1)
    fresh, cache = seeing_model("qwen2_vl"), DynamicCache(config=model.config.get_text_config())
    expected = read(fresh, cache, ids, longer, last=4)
    read(fresh, DynamicCache(config=model.config.get_text_config()), random_ids(2, 90), mask)
    torch.testing.assert_close(read(model, again, ids, longer, last=4), expected, rtol=1e-4, atol=1e-4)
    parts = [seen(model, "qwen2_vl", ratio=1.0) for _ in range(2)]
    joined = join_caches(parts)
    disturb(model, "qwen2_vl")
    one = join_caches(parts[:1])
    # A joined cache counts as folded: it attends by weights.
    torch.testing.assert_close(ask(model, one), ask(model, parts[1].clone()), rtol=1e-4, atol=1e-4)
    assert joined.rope.after(joined.get_seq_length(), model).tolist() == [[-12]]


def test_positions_count_as_memory(models):
    cache = seen(models("qwen2_vl"), "qwen2_vl")
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer.tensors())
    assert cache.memory_bytes() == held + 8


def test_positions_of_inference_mode_serve_elsewhere(models):
    model = models("qwen2_vl")
    with torch.inference_mode():
        cache = seen(model, "qwen2_vl")
    twin = cache.clone()
    twin.batch_repeat_interleave(2)
    with torch.enable_grad():
        assert torch.isfinite(ask(model, twin, 2)).all()


# Compiled steps


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("qwen2_vl", "aot_eager"),
        ("qwen2_vl", "eager"),
        ("qwen2_5_vl", "eager"),
        ("qwen3_vl", "eager"),
        ("glm4v", "eager"),
    ],
)
def test_compiled_steps_after_an_image(family, backend, models):
    torch._dynamo.reset()
    model = models(family)
    cache = seen(model, family, max_tokens=64, static=True, **SMALL)
    eager = seen(model, family, max_tokens=64, **SMALL)
    disturb(model, family)
    step, tokens = compile_decoding(model, cache, backend=backend), random_ids(1, 9, 6)
    logits = [step(ids) for ids in tokens.split(1, 1)]
    disturb(model, family)
    expected = [model(ids, use_cache=True, **{CACHE: eager}).logits for ids in tokens.split(1, 1)]
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_compiled_steps_after_a_text(models):
    torch._dynamo.reset()
    model, caches = models("qwen2_vl"), []
    for static in (True, False):
        caches.append(WildCatCache(model.config, max_tokens=64, static=static, **SMALL))
        model(random_ids(2, 70), **{CACHE: caches[-1]})
        disturb(model, "qwen2_vl")
    step, tokens = compile_decoding(model, caches[0], backend="eager"), random_ids(2, 9, 6)
    logits = [step(ids) for ids in tokens.split(1, 1)]
    expected = [model(ids, **{CACHE: caches[1]}).logits for ids in tokens.split(1, 1)]
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_compiled_steps_after_padded_images(models):
    """Each row goes on after its own tokens, as generate() does."""
    torch._dynamo.reset()
    model, prompt = models("qwen2_vl"), image_prompt("qwen2_vl", 2)
    prompt["attention_mask"][1, :13] = 0
    cache = WildCatCache(model.config, max_tokens=64, static=True, **SMALL)
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False, **{CACHE: cache})
    tokens = out[:, -1:]
    step, logits = compile_decoding(model, cache, backend="eager"), []
    for _ in range(6):
        logits.append(step(tokens))
        tokens = logits[-1].argmax(-1)
    ours = WildCatCache(model.config, max_tokens=64, **SMALL)
    options = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**prompt, **options, **{CACHE: ours}).logits[1:]
    torch.testing.assert_close(torch.cat(logits, 1), torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


# Refusals


def test_positions_that_were_given_must_go_on_being_given(models):
    model, ids = models("qwen2_vl"), random_ids(1, 30)
    cache = WildCatCache(model.config, max_tokens=200, static=True)
    model(ids, position_ids=torch.arange(30)[None] + 5, **{CACHE: cache})
    disturb(model, "qwen2_vl")
    left = model.model.rope_deltas
    for go_on in (
        lambda: model(random_ids(1, 1), **{CACHE: cache}),
        lambda: model.generate(random_ids(1, 40), max_new_tokens=2, **{CACHE: cache}),
        lambda: read(model, cache, random_ids(1, 40), torch.ones(1, 40)),
        lambda: compile_decoding(model, cache),
    ):
        with pytest.raises(ValueError, match=r"those of the 30 tokens in the cache were given as position_ids="):
            go_on()
    assert model.model.rope_deltas is left and cache.get_seq_length() == 30
    model(random_ids(1, 1), position_ids=torch.tensor([[35]]), **{CACHE: cache})


def test_a_model_that_keeps_more_than_offsets_is_refused():
    with pytest.raises(ValueError, match="GlmImageConfig: the model keeps the positions of the image that it draws"):
        WildCatCache(tf.GlmImageConfig(), ratio=0.5)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows_is_refused_as_ever(rows, models):
    cache = seen(models("qwen2_vl"), "qwen2_vl", rows=2)
    with pytest.raises(ValueError, match=f"the batch has {rows} rows and the cache holds 2"):
        models("qwen2_vl")(random_ids(rows, 1), **{CACHE: cache})


def test_other_models_have_no_positions_to_carry():
    model = tiny_model("llama")
    cache = WildCatCache(model.config, ratio=0.5)
    model.generate(random_ids(2, 40), max_new_tokens=3, **{CACHE: cache})
    assert cache.rope.tensors() == []
