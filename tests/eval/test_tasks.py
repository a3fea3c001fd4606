"""Our own tasks: their samples, what they score, and that no method sees a question before its time."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eval.cells import EXACT, Cell, make_cells
from eval.config import RunConfig
from eval.tasks.asking import Asked, Clock, Prompt
from eval.tasks.attention_error import AttentionError
from eval.tasks.drift import Drift
from eval.tasks.needle import Needle
from eval.tasks.perplexity import Perplexity
from tests.driver import assert_same, state
from wildcat_kv import CompressedCache, Context
from wildcat_kv.compressors import AdaKV, Compactor, CriticalKV, ExpectedAttention, RereadingWildCat, available
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.data.haystack import make_needles
from wildcat_kv.hook.keyword import CACHE

pytest_plugins = ["tests.eval_fixtures"]

TASKS = {
    "needle": Needle(lengths=[180], depths=[0.2, 0.8], needles=2, repeats=2),
    "drift": Drift(lengths=[150, 160], tokens=20, repeats=2),
    "perplexity": Perplexity(lengths=[150, 160], skip=40, repeats=2),
    "decoding": Perplexity(lengths=[60, 70], skip=20, repeats=2, chunk=1),
    "attention_error": AttentionError(lengths=[150, 160], tokens=12, repeats=2),
}
EXACT_CELL = Cell(EXACT, None)
METHODS = [method.name for method in available()]
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def measured(sample, model, tokenizer, *cells):
    measure = sample.open(model, tokenizer)
    return [measure(cell) for cell in cells]


def negative_log_likelihoods(plain, ids):
    """Of each token after those before it, by one forward pass without a cache."""
    return torch.nn.functional.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="none")


def test_the_exact_cache_has_the_bytes_of_its_keys_and_values(model, tokenizer, setting):
    """Not those of the queries that its context keeps, nor of free room: it is what others are compared with."""
    for task in TASKS.values():
        sample = task.samples(setting())[0]
        [outcome] = measured(sample, model, tokenizer, EXACT_CELL)
        # A key and a value of 16 numbers of 4 bytes, for each of 2 heads in 3 layers.
        assert outcome.memory_bytes == outcome.seen_tokens * 2 * 3 * 2 * 16 * 4, task.name


# Samples


@each_task
def test_the_same_setting_gives_the_same_samples_and_another_seed_others(task, setting):
    first, again, others = (task.samples(setting(seed=seed)) for seed in (3, 3, 4))
    hashes = [sample.prompt_hash for sample in first]
    assert hashes == [sample.prompt_hash for sample in again]
    assert len({*hashes, *(sample.prompt_hash for sample in others)}) == 8
    assert [sample.index for sample in first] == [0, 1, 2, 3]


@each_task
def test_samples_are_numbered_length_by_length(task, setting):
    facets = [dict(sample.facets) for sample in task.samples(setting())]
    assert facets == sorted(facets, key=lambda facet: list(facet.values()))
    assert {facet["length"] for facet in facets} == set(task.lengths)


@each_task
@pytest.mark.parametrize(
    ("own", "run", "count"), [(None, 1, 2), (1, None, 2), (1, 2, 2), (None, 9, 4), (None, None, 4)]
)
def test_a_limit_counts_repeats_and_the_task_s_own_wins(task, setting, own, run, count):
    limited = task.model_copy(update={"limit": own})
    assert len(limited.samples(setting(limit=run))) == count


@each_task
def test_a_sample_knows_how_many_positions_it_needs(task, setting):
    for sample in task.samples(setting()):
        if isinstance(task, Needle):
            assert sample.tokens == len(sample.asked) + len(sample.answer)
            continue
        assert sample.tokens == sample.ids.shape[1] == sample.facets["length"] + getattr(task, "tokens", 0)


def test_tasks_are_called_as_their_options_are():
    assert [task.name for task in TASKS.values()] == ["needle_2", *list(TASKS)[1:]]
    config = RunConfig(tasks=["needle", "perplexity", "decoding", {"task": "needle", "needles": 4}])
    assert [task.name for task in config.make_tasks()] == ["needle", "perplexity", "decoding", "needle_4"]
    assert [task.chunk for task in config.make_tasks()[1:3]] == [64, 1]


@each_task
@pytest.mark.parametrize("fields", [{"length": [100]}, {"repeats": 0}, {"limit": 0}, {"lengths": []}])
def test_a_wrong_option_is_refused(task, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        type(task)(**fields)


@each_task
@pytest.mark.parametrize("length", [0, -100])
def test_a_length_that_is_none_is_refused(task, length):
    with pytest.raises(ValidationError, match="lengths"):
        type(task)(lengths=[length])


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan")])
def test_a_depth_outside_the_text_is_refused(depth):
    with pytest.raises(ValidationError, match="depths"):
        Needle(depths=[depth])


def test_a_continuation_of_one_token_is_refused_or_scored(model, tokenizer, setting):
    try:
        task = Drift(lengths=[100], tokens=1, repeats=1)
    except ValidationError:
        return
    [outcome] = measured(task.samples(setting())[0], model, tokenizer, EXACT_CELL)
    assert all(score == score for score in outcome.scores.values()), outcome.scores


def test_documents_shorter_than_what_is_skipped_are_refused(setting):
    with pytest.raises(ValueError, match="task='perplexity': lengths=260 must exceed skip=256"):
        Perplexity(lengths=[260]).samples(setting())
    assert len(Perplexity(lengths=[261]).samples(setting(limit=1))) == 1


# Needles


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_needle_that_is_asked_for_lies_at_its_depth(setting, tokenizer, depth, protocol):
    [sample] = Needle(lengths=[400], depths=[depth], needles=3, repeats=1).samples(setting(protocol=protocol))
    [asked, *others] = make_needles(3, 0)
    text = sample.prompt.removesuffix(f"\n\n{asked.question}\nThe special magic number for {asked.key} is ")
    assert text != sample.prompt and sample.reference == asked.value
    place, length = text.index(asked.sentence), len(text)
    if depth == 0:
        assert place == 0 or all(
            other.sentence in text[:place] for other in others if text.index(other.sentence) < place
        )
        assert place < 200
    elif depth == 1:
        assert place > 0.85 * length
    else:
        assert 0.35 * length < place < 0.65 * length
    assert all(text.count(needle.sentence) == 1 for needle in (asked, *others))


@pytest.mark.parametrize(("needles", "name"), [(1, "needle"), (8, "needle_8")])
def test_needles_of_any_number_fit_the_length(setting, tokenizer, needles, name):
    task = Needle(lengths=[300, 500], depths=[0, 1], needles=needles, repeats=1)
    assert task.name == name
    for sample in task.samples(setting()):
        assert sample.prompt.count("The special magic number for") == needles + 1
        assert sample.facets["length"] - 20 < len(sample.asked.context) < sample.facets["length"] + 50
        assert tokenizer.decode(sample.answer) == sample.reference


def test_more_needles_than_the_task_has_are_refused():
    with pytest.raises(ValidationError, match="needles"):
        Needle(needles=9)


def test_the_context_ends_before_the_question(setting, tokenizer):
    [sample] = Needle(lengths=[300], depths=[0.5], repeats=1).samples(setting())
    [needle] = make_needles(1, 0)
    context, question = (tokenizer.decode(part) for part in (sample.asked.context, sample.asked.question))
    assert needle.sentence in context and needle.question not in context
    assert question.startswith(needle.question) and needle.value not in question
    assert question.rstrip().endswith(f"for {needle.key} is")


def test_both_protocols_ask_the_same(setting):
    task = Needle(lengths=[300], depths=[0.5], repeats=1)
    [apart], [together] = (task.samples(setting(protocol=protocol)) for protocol in ("context-only", "full-prompt"))
    assert len(apart.asked.question) and not len(together.asked.question)
    assert torch.equal(torch.cat((apart.asked.context, apart.asked.question)), together.asked.context)
    assert apart.prompt_hash == together.prompt_hash and apart.tokens == together.tokens


@pytest.mark.parametrize("method", METHODS)
def test_no_method_sees_the_question_of_a_context(method, model, tokenizer, setting):
    [sample] = Needle(lengths=[200], depths=[0.5], repeats=1).samples(setting())
    _, question = encode_question(tokenizer, "", "What do seahorses eat?", "They eat")
    cell, scores, states = Cell(method, method, ratio=0.5), [], []
    for asked in (sample.asked, replace(sample.asked, question=question[0])):
        cache, held = Asked(model, tokenizer, asked).compress(cell, Clock())
        states.append(state(cache))
        [outcome] = measured(replace(sample, asked=asked), model, tokenizer, cell)
        assert (outcome.stored_tokens, outcome.memory_bytes) == (held["stored_tokens"], held["memory_bytes"])
        assert outcome.seen_tokens == len(sample.asked.context)
        scores.append(outcome.scores["nll"])
    assert_same(*states)
    assert scores[0] != scores[1]  # but the answer does


@pytest.mark.parametrize("method", [EXACT, "wildcat", "snapkv", "kvzip"])
def test_the_question_is_compressed_with_the_prompt_in_the_other_protocol(method, model, tokenizer, setting):
    cell = EXACT_CELL if method == EXACT else Cell(method, method, ratio=0.5)
    task = Needle(lengths=[200], depths=[0.5], repeats=1)
    [apart], [together] = (task.samples(setting(protocol=protocol)) for protocol in ("context-only", "full-prompt"))
    [before], [after] = (measured(sample, model, tokenizer, cell) for sample in (apart, together))
    more = len(apart.asked.question)
    assert before.seen_tokens == len(apart.asked.context) and after.seen_tokens == before.seen_tokens + more
    share = 1 if method == EXACT else 0.5
    assert before.stored_tokens == pytest.approx(share * before.seen_tokens, abs=1)
    assert after.stored_tokens == pytest.approx(share * after.seen_tokens, abs=1)


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_an_answer_is_scored_as_in_one_forward_pass(protocol, model, plain, tokenizer, setting):
    task = Needle(lengths=[200], depths=[0, 1], needles=2, repeats=1)
    for sample in task.samples(setting(protocol=protocol)):
        ids = torch.cat((sample.asked.context, sample.asked.question, sample.answer))[None]
        losses = negative_log_likelihoods(plain, ids)[-len(sample.answer) :]
        [outcome] = measured(sample, model, tokenizer, EXACT_CELL)
        assert outcome.scores["nll"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert outcome.scores["exact_match"] == 0.0 and outcome.reference == tokenizer.decode(sample.answer)


# Scores


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_the_likeliest_answer_is_an_exact_match(protocol, model, plain, tokenizer, setting):
    [sample] = Needle(lengths=[200], depths=[0.5], repeats=1).samples(setting(protocol=protocol))
    ids = torch.cat((sample.asked.context, sample.asked.question))[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    written = plain.generate(ids, max_new_tokens=4, **options)[0, ids.shape[1] :]
    [outcome] = measured(replace(sample, answer=written), model, tokenizer, EXACT_CELL)
    assert outcome.scores["exact_match"] == 1.0


def test_nothing_drifts_from_the_exact_cache(model, plain, tokenizer, setting):
    for sample in TASKS["drift"].samples(setting(limit=1)):
        [outcome] = measured(sample, model, tokenizer, EXACT_CELL)
        losses = negative_log_likelihoods(plain, sample.ids)[sample.length :]
        assert outcome.scores == {"kl": 0.0, "nll": pytest.approx(float(losses.mean()), rel=1e-5), "agreement": 1.0}
        assert outcome.stored_tokens == outcome.seen_tokens == sample.length


def test_drift_is_the_divergence_of_what_follows_each_word(model, plain, tokenizer, setting):
    [sample] = Drift(lengths=[200], tokens=15, repeats=1).samples(setting())
    cell = Cell("wildcat", "wildcat", ratio=0.4)
    [outcome] = measured(sample, model, tokenizer, cell)
    expected = plain(sample.ids).logits[0, 200:].double().log_softmax(-1)
    cache = CompressedCache(model.config, compressor="wildcat", ratio=0.4, sink=32)
    model(sample.ids[:, :200], **{CACHE: cache})
    found = model(sample.ids[:, 200:], **{CACHE: cache}).logits[0].double().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    nll = -found[:-1].gather(-1, sample.ids[0, 201:, None]).mean()
    assert outcome.scores["kl"] == pytest.approx(float(kl), rel=1e-3) and kl > 1e-3
    assert outcome.scores["nll"] == pytest.approx(float(nll), rel=1e-5)
    agreement = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    assert outcome.scores["agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("name", ["perplexity", "decoding"])
def test_an_uncompressed_document_is_as_likely_as_in_one_forward_pass(name, model, plain, tokenizer, setting):
    for sample in TASKS[name].samples(setting(limit=1)):
        losses = negative_log_likelihoods(plain, sample.ids)[sample.skip :]
        [outcome] = measured(sample, model, tokenizer, EXACT_CELL)
        end = losses[-(len(losses) // 4) :]
        assert outcome.scores["nll"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert outcome.scores["nll_end"] == pytest.approx(float(end.mean()), rel=1e-5)
        assert outcome.seen_tokens == outcome.stored_tokens == sample.tokens - 1


@pytest.mark.parametrize("name", ["perplexity", "decoding"])
def test_a_document_is_compressed_while_it_is_read(name, model, tokenizer, setting):
    [sample, *_] = TASKS[name].samples(setting(limit=1))
    budgets, ends = ({"ratio": 0.5}, {"max_tokens": 40}), {"sink": 4, "window": 8}
    cells = [EXACT_CELL, *(Cell("h2o", "h2o", settings=ends, **budget) for budget in budgets)]
    exact, half, few = measured(sample, model, tokenizer, *cells)
    assert len({exact.scores["nll"], half.scores["nll"], few.scores["nll"]}) == 3
    assert half.seen_tokens == few.seen_tokens == sample.tokens - 1
    assert half.stored_tokens < exact.stored_tokens and few.stored_tokens <= 40


@each_task
def test_methods_that_may_keep_everything_score_as_the_exact_cache(task, model, tokenizer, setting):
    sample = task.samples(setting(limit=1))[0]
    twice = ("kvzip", "kvzip_plus", "rereading_matching", "rereading_wildcat")
    names = [name for name in METHODS if name not in twice or not task.streams]
    cells = [EXACT_CELL, *(Cell(name, name, ratio=1.0) for name in names)]
    if not task.streams:
        cells += [Cell(name, name, max_tokens=1000) for name in names if name not in twice]
    exact, *others = measured(sample, model, tokenizer, *cells)
    for cell, outcome in zip(cells[1:], others, strict=True):
        assert outcome.scores == pytest.approx(exact.scores, rel=1e-4, abs=1e-5), cell
        assert outcome.stored_tokens == exact.stored_tokens and outcome.seen_tokens == exact.seen_tokens


def test_a_methods_own_estimates_stand_beside_the_errors(model, tokenizer, setting):
    sample = TASKS["attention_error"].samples(setting(limit=1))[0]
    cells = [Cell(name, name, ratio=0.5) for name in ("query_wildcat", "wildcat")]
    estimating, other = measured(sample, model, tokenizer, *cells)
    errors, estimates = (torch.tensor(estimating.layers[name]) for name in ("error", "estimate"))
    assert errors.shape == estimates.shape
    assert estimating.scores["estimate"] == pytest.approx(float(estimates.mean()), abs=1e-3)
    ranks = [numbers.flatten().argsort().argsort().double() for numbers in (errors, estimates)]
    assert estimating.scores["rank_correlation"] == pytest.approx(float(torch.stack(ranks).corrcoef()[0, 1]), abs=0.05)
    assert set(other.scores) == {"error"} == set(other.layers)


@pytest.mark.parametrize("name", ["needle", "drift", "attention_error"])
def test_the_order_of_the_cells_changes_no_score(name, model, tokenizer, setting):
    """One reading of the context serves all, and none disturbs it."""
    sample = TASKS[name].samples(setting(limit=1))[0]
    cells = [EXACT_CELL, Cell("wildcat", "wildcat", ratio=0.6), Cell("snapkv", "snapkv", ratio=0.6)]
    forth = measured(sample, model, tokenizer, *cells)
    back = measured(sample, model, tokenizer, *reversed(cells))[::-1]
    assert [outcome.scores for outcome in forth] == [outcome.scores for outcome in back]


# Attention errors


def recorded(folder, ids):
    """Queries, keys and values of every layer, as the model's own attention gets them."""
    found = []

    def attention(module, query, key, value, attention_mask, **options):
        found.append((query[0], key[0], value[0]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", sdpa_mask)
    AutoModelForCausalLM.from_pretrained(folder, attn_implementation="recording")(ids, use_cache=False)
    return found


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("method", ["wildcat", "snapkv", "adakv"])
def test_attention_errors_are_those_of_a_plain_softmax(method, tokens, model, tiny_folder, tokenizer, setting):
    [sample] = AttentionError(lengths=[200], tokens=tokens, repeats=1).samples(setting())
    cell = Cell(method, method, ratio=0.5)
    [outcome] = measured(sample, model, tokenizer, cell)
    cache = CompressedCache(model.config, compressor=method, ratio=0.5, sink=32)
    model(sample.ids[:, :200], **{CACHE: cache})
    errors = outcome.layers["error"]
    for (queries, keys, values), layer, head in zip(
        recorded(tiny_folder, sample.ids), (0, 1, 2), (3, 0, 2), strict=False
    ):
        entries, group = cache.layers[layer].state.storage.entries, head // 2
        kept = entries.valid[0, group]
        slots = [part[0, group][kept].double() for part in (entries.keys, entries.numerators(), entries.weights)]
        query, key, value = queries[head].double(), keys[group].double(), values[group].double()
        difference = size = 0.0
        for place in range(200, 200 + tokens):
            seen = (query[place] @ key[: place + 1].T / 4).exp()
            right = seen @ value[: place + 1] / seen.sum()
            coreset = (query[place] @ slots[0].T / 4).exp()
            new = (query[place] @ key[200 : place + 1].T / 4).exp()
            wrong = (coreset @ slots[1] + new @ value[200 : place + 1]) / (coreset @ slots[2] + new.sum())
            wrong = wrong.clamp(value.amin(0), value.amax(0))
            difference += float((wrong - right).square().sum())
            size += float(right.square().sum())
        assert errors[layer][head] == pytest.approx((difference / size) ** 0.5, abs=1e-3)
        assert errors[layer][head] > 0.01
    assert [len(layer) for layer in errors] == [4, 4, 4]
    assert outcome.scores["error"] == pytest.approx(sum(map(sum, errors)) / 12, abs=1e-4)


def test_the_exact_cache_makes_no_error(model, tokenizer, setting):
    [sample] = AttentionError(lengths=[120], tokens=9, repeats=1).samples(setting())
    [outcome] = measured(sample, model, tokenizer, EXACT_CELL)
    assert outcome.scores == {"error": 0.0} and outcome.layers == {"error": [[0.0] * 4] * 3}


# Cells


def keys(cells):
    return [cell.key for cell in cells]


def test_the_exact_cache_comes_first_and_once():
    cells = make_cells(["snapkv", "exact", "wildcat"], [0.5, 0.25], [100], {})
    assert keys(cells) == [
        ("exact", None, None),
        ("snapkv", 0.5, None),
        ("snapkv", 0.25, None),
        ("snapkv", None, 100),
        ("wildcat", 0.5, None),
        ("wildcat", 0.25, None),
        ("wildcat", None, 100),
    ]
    assert [cell.exact for cell in cells] == [True] + 6 * [False]
    assert keys(make_cells(["exact"], [0.5], [], {})) == keys(make_cells([], [0.5], [], {})) == [("exact", None, None)]


def test_all_methods_are_the_default():
    cells = RunConfig(tasks=["needle"], ratios=[0.5]).cells()
    assert [cell.method for cell in cells] == [EXACT, *METHODS]


def test_all_methods_are_there_once():
    assert RunConfig(tasks=["needle"], methods=["snapkv", "all"]).methods == METHODS
    variant = {"name": "mine", "compressor": "wildcat", "bin_rank": 8}
    assert RunConfig(tasks=["needle"], methods=["all", variant]).methods == [*METHODS, variant]


def test_a_variant_has_a_name_and_settings_of_its_own(model):
    methods = ["wildcat", {"name": "clipped", "compressor": "wildcat", "weights": "clipped", "sink": 4}]
    _, ours, variant = make_cells(methods, [0.5], [], {"sink": 8, "seed": 3})
    assert variant.key == ("clipped", 0.5, None) and variant.compressor == "wildcat"
    first, second = (cell.empty(model.config).settings for cell in (ours, variant))
    assert (first.weights, first.sink, first.seed) == ("nystrom", 8, 3)
    assert (second.weights, second.sink, second.seed) == ("clipped", 4, 3)


def test_a_variant_may_have_parameters_of_its_method(model):
    methods = ["snapkv", {"name": "wider", "compressor": "snapkv", "parameters": {"kernel": 9}, "sink": 4}]
    _, plain, wider = (cell.empty(model.config) for cell in make_cells(methods, [0.5], [], {}))
    assert wider.compressor == replace(plain.compressor, kernel=9) != plain.compressor and wider.settings.sink == 4


def test_a_method_that_reads_twice_may_have_parameters(model, tokenizer):
    variant = {"name": "more", "compressor": "rereading_wildcat", "parameters": {"recalled": 0.75}}
    _, cell = make_cells([variant], [0.5], [], {"window": 8, "sink": 4})
    cell.check_model(model.config)
    cache = cell.compress(Context(model, torch.arange(100)[None] % 60 + 3), tokenizer)
    assert cache.compressor == RereadingWildCat(recalled=0.75)


def test_a_method_among_the_parameters_goes_by_its_name(model):
    variant = {"name": "ada", "compressor": "adakv", "parameters": {"scorer": "compactor", "safeguard": 0.0}}
    (_, cell) = (cell.empty(model.config) for cell in make_cells([variant], [0.5], [], {"seed": 3}))
    assert cell.compressor == AdaKV(Compactor(seed=3), safeguard=0.0)


def test_a_method_among_the_parameters_may_have_parameters(model):
    scorer = {"name": "expected_attention", "value_norm": False}
    variant = {"name": "critical", "compressor": "criticalkv", "parameters": {"scorer": scorer, "first": 0.25}}
    (_, cell) = (cell.empty(model.config) for cell in make_cells([variant], [0.5], [], {}))
    assert cell.compressor == CriticalKV(ExpectedAttention(value_norm=False), first=0.25)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"compressor": "adakv", "parameters": {"scorer": "snapvk"}}], "no such method; did you mean 'snapkv'"),
        ([{"compressor": "adakv", "parameters": {"scorer": {"name": "snapkv", "kernl": 9}}}], "SnapKV has no such"),
        ([{"compressor": "adakv", "parameters": {"scorer": {"kernel": 9}}}], "compressor='': no such method"),
        ([{"compressor": "adakv", "parameters": {"scorer": "balancekv"}}], "gives no scores; pass a Scorer"),
        (["snapkv", "snapkv"], "methods: 'snapkv' is there twice"),
        (["wildcat", {"compressor": "wildcat", "sink": 4}], "methods: 'wildcat' is there twice"),
        ([{"name": "exact", "compressor": "wildcat"}], "methods: 'exact' is there twice"),
        (["snapvk"], "methods='snapvk': no such method; did you mean 'snapkv'. there are exact, wildcat"),
        ([{"name": "mine"}], "methods='mine': no such method; there are exact, wildcat"),
        ([{"name": "mine", "compressor": "wildcat", "sinks": 4}], "sinks=4: no such setting"),
        ([{"name": "mine", "compressor": "wildcat", "sink": -4}], "sink=-4"),
        ([{"compressor": "snapkv", "parameters": {"kernl": 9}}], "parameters='kernl'=9: SnapKV has no such.*, kernel"),
        ([{"compressor": "snapkv", "parameters": 9}], "parameters=9 must be a mapping"),
        ([{"compressor": "query_wildcat", "parameters": {"ridge": -1}}], "ridge=-1 must be at least 0"),
        ([{"name": "wildcat", "bits": 5}], "bits=5"),
        ([{"name": "wildcat", "bits": [4, 5]}], "bits=5"),
        ([{"name": "wildcat", "bits": []}], r"methods='wildcat': bits=\[\]: give at least one number"),
        ([{"name": "wildcat", "bits": [4, 4]}], "methods='wildcat': bits=4 is there twice"),
        (["wildcat", {"name": "wildcat", "bits": [4, None]}], "methods: 'wildcat' is there twice"),
        ([{"name": "wildcat", "ratios": 0.25}], "methods='wildcat': ratios=0.25 must be a list"),
        ([{"name": "wildcat", "ratios": []}], r"methods='wildcat': ratios=\[\] must be a list"),
        ([{"name": "wildcat", "ratios": [2]}], r"methods='wildcat': ratios=2 must be a share to keep, in \(0, 1\]"),
        ([{"name": "wildcat", "ratios": ["1/4"]}], "ratios='1/4' must be a share"),
        ([{"name": "wildcat", "ratios": [0.5, 0.5]}], "methods='wildcat': ratios=0.5 is there twice"),
    ],
)
def test_wrong_methods_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        make_cells(methods, [0.5], [], {})


def test_several_bits_are_variants_of_a_family():
    methods = [{"name": "snapkv", "bits": [4, None]}, {"name": "snapkv", "bits": [3], "ratios": [0.25]}, "wildcat"]
    cells = make_cells(methods, [0.5], [], {"sink": 4})
    assert [(cell.method, cell.family, cell.bits, cell.ratio) for cell in cells] == [
        ("exact", "exact", None, None),
        ("snapkv_4bit", "snapkv", 4, 0.5),
        ("snapkv", "snapkv", None, 0.5),
        ("snapkv_3bit", "snapkv", 3, 0.25),
        ("wildcat", "wildcat", None, 0.5),
    ]
    [one] = make_cells([{"name": "mine", "compressor": "wildcat", "bits": 4}], [0.5], [], {})[1:]
    assert (one.method, one.family, one.bits) == ("mine", "mine", 4)


def test_methods_may_have_ratios_of_their_own(model):
    methods = [{"name": "plain", "compressor": "wildcat", "bits": [8, 2], "ratios": [1]}, "wildcat"]
    assert keys(make_cells(methods, [0.5], [100], {}))[1:] == [
        *(("plain_8bit", 1, None), ("plain_2bit", 1, None)),
        *(("wildcat", 0.5, None), ("wildcat", None, 100)),
    ]
    own = make_cells(methods[:1], [], [], {})[1:]
    assert [cell.empty(model.config).settings.bits for cell in own] == [8, 2]
    with pytest.raises(ValueError, match="give at least one budget"):
        make_cells(methods, [], [], {})


@pytest.mark.parametrize("budget", [{"ratio": 0.1}, {"max_tokens": 100}])
def test_a_variant_with_a_budget_of_its_own_is_refused_or_has_it(budget):
    try:
        _, cell = make_cells([{"name": "mine", "compressor": "wildcat", **budget}], [0.5], [], {})
    except ValueError as error:
        assert next(iter(budget)) in str(error)
        return
    assert {"ratio": cell.ratio, "max_tokens": cell.max_tokens} == {"ratio": None, "max_tokens": None, **budget}


@pytest.mark.parametrize(
    ("ratios", "max_tokens", "message"),
    [([], [], "ratios"), ([1.5], [], "ratio=1.5"), ([0.5], [20], "max_tokens=20 is too small for sink=32")],
)
def test_wrong_budgets_are_refused(ratios, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        make_cells(["wildcat"], ratios, max_tokens, {})


@pytest.mark.parametrize("budgets", [{"ratios": [0.5, 0.5]}, {"max_tokens": [100, 100]}])
def test_a_budget_given_twice_is_refused_or_measured_once(budgets):
    try:
        cells = make_cells(["wildcat"], budgets.get("ratios", []), budgets.get("max_tokens", []), {})
    except ValueError as error:
        assert next(iter(budgets)) in str(error)
        return
    assert len(set(keys(cells))) == len(cells)


@pytest.mark.parametrize(("field", "value"), [("ratio", 0.5), ("max_tokens", 100), ("sinks", 4)])
def test_a_setting_that_no_cell_can_have_is_refused(field, value):
    with pytest.raises(ValueError, match=f"settings='{field}'"):
        RunConfig(tasks=["needle"], ratios=[0.5], settings={field: value}).cells()


def test_a_method_that_reads_twice_measures_no_stream(model):
    zipped = Cell("kvzip", "kvzip", ratio=0.5)
    zipped.check_tasks(streams=False)
    with pytest.raises(ValueError, match="methods='kvzip' reads a text twice"):
        zipped.check_tasks(streams=True)
    with pytest.raises(ValueError, match="methods='kvzip' reads a text twice"):
        Cell("kvzip", "kvzip", max_tokens=100).check_tasks(streams=False)
    again = Cell("rereading_wildcat", "rereading_wildcat", max_tokens=100)
    again.check_tasks(streams=False)
    with pytest.raises(ValueError, match="methods='rereading_wildcat' reads a text twice; leave"):
        again.check_tasks(streams=True)
    for cell in (EXACT_CELL, zipped, again, Cell("wildcat", "wildcat", max_tokens=100)):
        cell.check_model(model.config)
    Cell("wildcat", "wildcat", max_tokens=100).check_tasks(streams=True)


def test_a_prompt_is_split_where_the_protocol_compresses():
    context, question = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    apart, together = (Prompt.of(context, question, protocol) for protocol in ("context-only", "full-prompt"))
    assert apart.context.tolist() == [1, 2, 3] and apart.question.tolist() == [4, 5]
    assert together.context.tolist() == [1, 2, 3, 4, 5] and together.question.tolist() == []
    assert len(apart) == len(together) == 5
