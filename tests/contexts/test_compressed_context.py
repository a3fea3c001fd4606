"""One context, many questions."""

import re
import threading
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.generation.streamers import BaseStreamer

from tests.driver import METHODS, assert_same, state
from tests.tiny import tiny_model
from tests.words import CHAT, PARTS, Processor, tokenizer, words
from wildcat_kv import CompressedContext, WildCatCache, compress_context, join_caches
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.hook.keyword import CACHE

SETTINGS = {"ratio": 0.5, "sink": 4, "window": 4, "bin_rank": 4}
TEXT = words(150)
QUESTIONS = ["w5", "w9 w33 w7", "w80 w81 w82 w83 w84 w85", "w100 w4"]
SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module", params=[CHAT, None], ids=["chat", "plain"])
def words_tokenizer(request):
    return tokenizer(request.param)


@pytest.fixture
def context(llama, words_tokenizer):
    return compress_context(llama, words_tokenizer, TEXT, **SETTINGS)


# Asking


def test_a_processor_serves_as_its_tokenizer(llama, tmp_path):
    """Its template takes messages as lists of parts, as those of models for images and text do."""
    plain = compress_context(llama, tokenizer(CHAT), TEXT, **SETTINGS)
    processor = Processor(tokenizer(None), chat_template=PARTS)
    context = compress_context(llama, processor, TEXT, **SETTINGS)
    assert context.tokens == plain.tokens
    context.save(tmp_path / "context.safetensors")
    loaded = CompressedContext.load(tmp_path / "context.safetensors", llama, processor)
    for each in (context, loaded):
        assert each.ask_many(QUESTIONS, **SHORT) == plain.ask_many(QUESTIONS, **SHORT)
    assert list(context.stream(QUESTIONS[0], **SHORT)) == list(plain.stream(QUESTIONS[0], **SHORT))
    talks = [each.conversation() for each in (context, plain)]
    for question in QUESTIONS[:2]:
        first, second = (talk.ask(question, **SHORT) for talk in talks)
        assert first == second
    twice = [compress_context(llama, each, TEXT, compressor="kvzip", **SETTINGS) for each in (processor, tokenizer())]
    assert twice[0].ask("w5", **SHORT) == twice[1].ask("w5", **SHORT)


def test_an_answer_is_what_the_model_generates_over_the_compressed_text(llama, words_tokenizer, context):
    before, after = encode_question(words_tokenizer, TEXT, QUESTIONS[1])
    cache = WildCatCache(llama.config, **SETTINGS)
    llama(before, **{CACHE: cache})
    ids = torch.cat((before, after), dim=1)
    out = llama.generate(ids, **{CACHE: cache}, do_sample=False, eos_token_id=3, **SHORT)
    expected = words_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert context.ask(QUESTIONS[1], **SHORT) == expected and expected
    assert context.tokens == before.shape[1] and context.cache.get_seq_length() == before.shape[1]


def test_asking_leaves_the_context_as_it_was(context):
    before = state(context.cache)
    first = context.ask(QUESTIONS[0], **SHORT)
    context.ask_many(QUESTIONS, **SHORT)
    context.conversation().ask(QUESTIONS[2], **SHORT)
    assert_same(state(context.cache), before)
    assert context.ask(QUESTIONS[0], **SHORT) == first


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_many_questions_are_answered_as_one_by_one(context, batch_size):
    alone = [context.ask(question, **SHORT) for question in QUESTIONS]
    assert context.ask_many(QUESTIONS, batch_size=batch_size, **SHORT) == alone
    assert len(set(alone)) > 1 and context.ask_many([], **SHORT) == []


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "qwen3_next", "lfm2"])
def test_other_families_answer_alike_too(family, tmp_path):
    model, words_tokenizer = tiny_model(family), tokenizer()
    context = compress_context(model, words_tokenizer, TEXT, **SETTINGS)
    alone = [context.ask(question, **SHORT) for question in QUESTIONS]
    assert context.ask_many(QUESTIONS, **SHORT) == alone
    context.save(tmp_path / "context.safetensors")
    again = CompressedContext.load(tmp_path / "context.safetensors", model, words_tokenizer)
    assert [again.ask(question, **SHORT) for question in QUESTIONS] == alone


@pytest.mark.parametrize("method", ["snapkv", "h2o", "attention_matching", "query_wildcat"])
def test_any_method_compresses(llama, words_tokenizer, method):
    context = compress_context(llama, words_tokenizer, TEXT, compressor=METHODS[method], **SETTINGS)
    assert stored_tokens(context.cache) <= context.tokens // 2 + 1
    assert context.ask_many(QUESTIONS, **SHORT) == [context.ask(question, **SHORT) for question in QUESTIONS]


def test_kvzip_reads_twice(llama):
    context = compress_context(llama, tokenizer(), TEXT, compressor="kvzip", **SETTINGS)
    assert type(context.cache.compressor).__name__ == "KVzip" and context.ask(QUESTIONS[0], **SHORT)


@pytest.mark.parametrize(
    ("given", "name"),
    [({}, "RereadingWildCat"), ({"compressor": "auto"}, "RereadingWildCat"), ({"compressor": "kvzip"}, "KVzip")],
    ids=str,
)
def test_two_readings_are_asked_for_by_their_number(llama, given, name):
    found = compress_context(llama, tokenizer(), TEXT, reads=2, **given, **SETTINGS).cache
    named = compress_context(llama, tokenizer(), TEXT, compressor=given.get("compressor", "auto"), **SETTINGS).cache
    assert type(found.compressor).__name__ == name
    assert (type(named.compressor).__name__ == name) == (name == "KVzip")


def test_a_file_without_the_state_of_kvzip_is_read(llama, tmp_path):
    """As earlier releases wrote it: the scores were kept with the method, not with the entries."""
    path = tmp_path / "context.safetensors"
    context = compress_context(llama, tokenizer(), TEXT, compressor="kvzip", **SETTINGS)
    context.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = {name: tensor for name, tensor in tensors.items() if not name.endswith(".memory")}
    assert len(old) < len(tensors)
    save_file(old, path, metadata)
    again = CompressedContext.load(path, llama, tokenizer())
    assert again.ask(QUESTIONS[0], **SHORT) == context.ask(QUESTIONS[0], **SHORT)


def test_beams_and_samples(context):
    assert context.ask_many(QUESTIONS[:2], num_beams=3, **SHORT) == [
        context.ask(question, num_beams=3, **SHORT) for question in QUESTIONS[:2]
    ]
    beams = tf.GenerationConfig(num_beams=3, eos_token_id=3, pad_token_id=0)
    assert context.ask(QUESTIONS[0], generation_config=beams, **SHORT) == context.ask(
        QUESTIONS[0], num_beams=3, **SHORT
    )
    torch.manual_seed(5)
    sampled = [context.ask(QUESTIONS[0], do_sample=True, **SHORT) for _ in range(4)]
    assert len(set(sampled)) > 1


# Streaming


def test_the_pieces_of_a_stream_are_the_answer(context):
    pieces = list(context.stream(QUESTIONS[1], **SHORT))
    assert len(pieces) > 1 and "".join(pieces).strip() == context.ask(QUESTIONS[1], **SHORT)


def test_a_stream_that_is_left_ends_its_generation(context):
    threads = threading.active_count()
    stream = context.stream(QUESTIONS[1], max_new_tokens=2000, eos_token_id=None)
    next(stream)
    stream.close()
    assert threading.active_count() == threads


def test_what_fails_in_a_stream_is_raised_where_it_is_read(context):
    with pytest.raises(ValueError, match="nonsense"):
        list(context.stream(QUESTIONS[1], nonsense=3))


# Conversations


def test_a_conversation_remembers(llama, words_tokenizer):
    """With nothing compressed: the same as the exact cache over all that was said."""
    context = compress_context(llama, words_tokenizer, TEXT, ratio=1.0)
    conversation, said = context.conversation(), encode_question(words_tokenizer, TEXT, QUESTIONS[0])
    ids = torch.cat(said, dim=1)
    for number, question in enumerate(QUESTIONS[:3]):
        if number:
            frame = " <end>" if words_tokenizer.chat_template else ""
            after = " <user>" if words_tokenizer.chat_template else ""
            tail = " <end> <assistant>" if words_tokenizer.chat_template else ""
            turn = words_tokenizer(f"{frame}{after} {question}{tail}", return_tensors="pt").input_ids
            ids = torch.cat((ids, turn), dim=1)
        out = llama.generate(ids, do_sample=False, eos_token_id=3, pad_token_id=0, **SHORT)
        answer = conversation.ask(question, **SHORT)
        assert answer == words_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        ids = out[:, :-1] if out[0, -1] == 3 else out
    assert conversation.cache.get_seq_length() >= ids.shape[1] - 1


class Interrupted(BaseStreamer):
    """Presses Ctrl-C at the fourth token."""

    count = 0

    def put(self, value):
        self.count += 1
        if self.count == 5:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("turns", [0, 2])
def test_an_interrupted_answer_leaves_nothing_behind(context, turns):
    conversation, other = context.conversation(), context.conversation()
    for each in (conversation, other):
        for question in QUESTIONS[:turns]:
            each.ask(question, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("w66 w67", streamer=Interrupted(), **SHORT)
    assert conversation.cache is context.cache
    # What was said is read again as one prompt, and so folded elsewhere: the same only where nothing is compressed.
    assert conversation.ask(QUESTIONS[3], **SHORT)
    assert torch.equal(conversation._ids[:, : other._ids.shape[1]], other._ids)


def test_conversations_are_apart_and_stream(context):
    first, second = context.conversation(), context.conversation()
    answer = first.ask(QUESTIONS[0], **SHORT)
    first.ask(QUESTIONS[1], **SHORT)
    assert "".join(second.stream(QUESTIONS[0], **SHORT)).strip() == answer


# Long texts


def test_a_text_beyond_the_positions_is_read_in_parts(words_tokenizer):
    model = tiny_model("llama", max_position_embeddings=128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        context = compress_context(model, words_tokenizer, words(300), reserve=40, **SETTINGS)
        answer = context.ask(QUESTIONS[0], **SHORT)
    [warning] = caught
    beginning = 1 if words_tokenizer.chat_template else 0  # each part has the template's
    said = (
        f"text_or_file has 300 tokens, and the model's positions have room for {88 - beginning}: it is read in 4 parts"
    )
    assert str(warning.message).startswith(said)
    assert warning.filename == __file__
    parts = 4
    assert context.cache.get_seq_length() <= 128 - 40 and answer
    assert context.tokens == 300 + parts * beginning
    assert context.cache.stored_length() == pytest.approx(context.tokens / 2, abs=parts)
    assert context.ask_many(QUESTIONS, **SHORT)[0] == answer


def test_parts_are_read_apart_and_joined():
    model, words_tokenizer = tiny_model("llama", max_position_embeddings=128), tokenizer()
    context = compress_context(model, words_tokenizer, words(160), reserve=40, **SETTINGS)
    head = torch.tensor([[1]])  # the template's beginning
    ids = words_tokenizer(words(160), return_tensors="pt").input_ids
    caches = []
    for part in ids.tensor_split(2, dim=1):
        caches.append(WildCatCache(model.config, **SETTINGS))
        model(torch.cat((head, part), dim=1), **{CACHE: caches[-1]})
    assert_same(state(context.cache), state(join_caches(caches)))


def test_a_text_is_read_in_chunks_where_that_is_asked_for(llama, words_tokenizer):
    chunked = compress_context(llama, words_tokenizer, TEXT, chunk_tokens=40, **SETTINGS)
    cache = WildCatCache(llama.config, **SETTINGS)
    for piece in chunked.ids.split(40, dim=1):
        llama(piece, **{CACHE: cache})
    assert_same(state(chunked.cache), state(cache))


def test_where_memory_runs_out_less_is_read_at_once(llama, monkeypatch):
    text, forward, sizes = words(1500), llama.forward, []

    def short_of_memory(input_ids, **options):
        sizes.append(input_ids.shape[1])
        if input_ids.shape[1] > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(input_ids, **options)

    monkeypatch.setattr(llama, "forward", short_of_memory)
    with pytest.warns(UserWarning, match="memory ran out; reading 375 tokens at once"):
        context = compress_context(llama, tokenizer(None), text, **SETTINGS)
    assert sizes == [1500, 750, 375, 375, 375, 375] and context.tokens == 1500
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setattr(llama, "forward", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)) as raised, pytest.warns(UserWarning, match="reading 256 tokens at once"):
            compress_context(llama, tokenizer(None), text, **SETTINGS)
        assert raised.value is error


def test_max_tokens_holds_for_all_parts_together():
    model = tiny_model("llama", max_position_embeddings=128)
    limits = {"max_tokens": 120, "sink": 4, "window": 4, "bin_rank": 4}
    context = compress_context(model, tokenizer(), words(300), reserve=40, **limits)
    assert context.cache.stored_length() <= 120 and context.cache.settings.max_tokens == 120
    with pytest.raises(ValueError, match=r"max_tokens=40 is too small for a text of 4 parts.* raise it to 48"):
        compress_context(model, tokenizer(), words(300), reserve=40, **{**limits, "max_tokens": 40})


@pytest.mark.parametrize(("ratio", "floor", "kept"), [(0.1, 150, 150), (0.1, 20, 30), (0.1, 900, 300)])
def test_a_floor_holds_for_all_parts_together(ratio, floor, kept):
    model = tiny_model("llama", max_position_embeddings=128)
    settings = {"ratio": ratio, "min_tokens": floor, "sink": 4, "window": 4, "bin_rank": 4}
    context = compress_context(model, tokenizer(None), words(300), reserve=40, compressor="wildcat", **settings)
    assert context.cache.stored_length() == pytest.approx(kept, abs=2)  # half an entry a part
    assert context.cache.settings.min_tokens == 0 and context.cache.settings.ratio == max(ratio, min(1, floor / 300))


# Files


def test_a_saved_context_is_asked_again(llama, words_tokenizer, tmp_path):
    path = tmp_path / "context.safetensors"
    context = compress_context(llama, words_tokenizer, TEXT, **SETTINGS)
    context.save(path)
    again = CompressedContext.load(path, llama, words_tokenizer)
    assert (again.tokens, again.cache.settings) == (context.tokens, context.cache.settings)
    assert again.ask_many(QUESTIONS, **SHORT) == context.ask_many(QUESTIONS, **SHORT)
    assert again.conversation().ask(QUESTIONS[2], **SHORT) == context.conversation().ask(QUESTIONS[2], **SHORT)
    cache = WildCatCache.load(path, llama.config)  # the text beside it does no harm
    assert_same(state(cache), state(context.cache), ignore=("fold_from",))


def test_another_dtype_is_refused(llama, tmp_path):
    path = tmp_path / "context.safetensors"
    compress_context(llama, tokenizer(), TEXT, **SETTINGS).save(path)
    half = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds keys in torch.float32, and the model works in torch.bfloat16; load"):
        CompressedContext.load(path, half, tokenizer())
    compress_context(half, tokenizer(), TEXT, **SETTINGS).save(path)
    assert CompressedContext.load(path, half, tokenizer()).ask("w5", **SHORT)


def with_adapter(seed=None):
    """A model with LoRA on it, as PEFT wraps it."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = tiny_model("llama")
    torch.manual_seed(3 if seed is None else seed)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("reader", "asked", "fits"),
    [
        (with_adapter, with_adapter, True),
        (with_adapter, lambda: tiny_model("llama"), False),
        (lambda: tiny_model("llama"), with_adapter, False),
        (with_adapter, lambda: with_adapter(9), False),
        (with_adapter, lambda: another_model(), False),
    ],
)
def test_a_model_with_an_adapter_is_told_from_others(tmp_path, reader, asked, fits):
    torch.manual_seed(0)
    path = tmp_path / "context.safetensors"
    context = compress_context(reader(), tokenizer(), TEXT, **SETTINGS)
    context.save(path)
    if fits:
        assert CompressedContext.load(path, asked(), tokenizer()).ask("w5", **SHORT) == context.ask("w5", **SHORT)
    else:
        with pytest.raises(ValueError, match="is of a model with other weights"):
            CompressedContext.load(path, asked(), tokenizer())


def with_two_adapters():
    """A model with the adapters a and b, of which a acts."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    return model.eval()


SWAPS = {
    "another": lambda model: model.set_adapter("b"),
    "both": lambda model: model.base_model.set_adapter(["a", "b"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "another merged": lambda model: model.merge_adapter(["b"]),
    "none left": lambda model: model.unload(),
    "the base model": lambda model: [
        weight.mul_(1.5) for name, weight in model.named_parameters() if "lora" not in name
    ],
    "trained on": lambda model: [weight.mul_(1.5) for name, weight in model.named_parameters() if ".a." in name],
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_a_model_that_has_become_another_is_refused(tmp_path, swap):
    """An adapter was swapped, for example: the text was read by one model, and another would answer."""
    model = with_two_adapters()
    context = compress_context(model, tokenizer(), TEXT, **SETTINGS)
    talk = context.conversation()
    talk.ask("w5", **SHORT)
    context.save(tmp_path / "before.safetensors")
    content = (tmp_path / "before.safetensors").read_bytes()
    before = state(context.cache)
    swap(model)
    for go_on in (
        lambda: context.ask("w5"),
        lambda: context.ask_many(["w5", "w6"]),
        lambda: context.stream("w5"),
        lambda: talk.ask("w5"),
        lambda: talk.stream("w5"),
        lambda: context.save(tmp_path / "before.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"has other weights than when it read the text, .* differs; set") as error:
            go_on()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is of a model with other weights"):
        CompressedContext.load(tmp_path / "before.safetensors", model, tokenizer())
    assert_same(before, state(context.cache))
    assert (tmp_path / "before.safetensors").read_bytes() == content


def test_the_adapter_that_read_a_text_may_go_and_come_back(tmp_path):
    model = with_two_adapters()
    context = compress_context(model, tokenizer(), TEXT, **SETTINGS)
    expected = context.ask_many(QUESTIONS, **SHORT)
    model.set_adapter("b")
    other = compress_context(model, tokenizer(), TEXT, **SETTINGS)
    assert other.ask_many(QUESTIONS, **SHORT) != expected
    with model.disable_adapter(), pytest.raises(ValueError, match="has other weights"):
        other.ask("w5")
    model.set_adapter("a")
    assert context.ask_many(QUESTIONS, **SHORT) == expected
    model.merge_adapter()  # the same, in other weights
    assert context.ask(QUESTIONS[0], **SHORT) == expected[0]
    context.save(tmp_path / "context.safetensors")
    assert CompressedContext.load(tmp_path / "context.safetensors", model, tokenizer()).ask("w5", **SHORT)


def test_an_adapter_that_comes_later_is_refused():
    """Put into the model itself, which stays of its class."""
    model = tiny_model("llama")
    context = compress_context(model, tokenizer(), TEXT, **SETTINGS)
    expected = context.ask("w5", **SHORT)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="new")
    model.eval()
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM has other weights .* adapter:new:.*lora_A"):
        context.ask("w5")
    for layer in model.model.layers:
        layer.self_attn.q_proj.enable_adapters(False)
    assert context.ask("w5", **SHORT) == expected


class Packed(torch.Tensor):
    """A weight as quantisation libraries make them: it passes for a float tensor, and cannot be indexed."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.flatten):
            raise NotImplementedError(f"{function} of a packed weight")
        result = super().__torch_function__(function, types, args, kwargs)
        kept = function in (torch.Tensor.detach, torch.Tensor.requires_grad_) or not isinstance(result, torch.Tensor)
        return result if kept else result.as_subclass(torch.Tensor)


def test_weights_of_a_class_of_their_own_are_passed_over(tmp_path):
    def packed():
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.as_subclass(Packed))
            layer.self_attn.q_proj.weight = torch.nn.Parameter(layer.self_attn.q_proj.weight.as_subclass(Packed))
        return model

    path, model = tmp_path / "context.safetensors", packed()
    context = compress_context(model, tokenizer(), TEXT, **SETTINGS)
    context.save(path)
    for asked in (model, packed(), tiny_model("llama")):
        assert CompressedContext.load(path, asked, tokenizer()).ask("w5", **SHORT) == context.ask("w5", **SHORT)
    with pytest.raises(ValueError, match="is of a model with other weights"):
        CompressedContext.load(path, another_model(), tokenizer())


def another_model():
    torch.manual_seed(2)
    config = tiny_model("llama").config
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (another_model, "is of a model with other weights, .*weight differs; load it with the one that read"),
        (lambda: tiny_model("llama", num_hidden_layers=2), "is of another model .*num_hidden_layers is 3"),
        (lambda: tiny_model("qwen3"), "is of another model .*model_type is 'llama'"),
    ],
)
def test_another_model_is_refused(llama, tmp_path, make, message):
    path = tmp_path / "context.safetensors"
    compress_context(llama, tokenizer(), TEXT, **SETTINGS).save(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        CompressedContext.load(path, make(), tokenizer())
    assert "\n" not in str(error.value) and path.read_bytes() == content


def test_a_cache_alone_is_no_context(llama, context, tmp_path):
    context.cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=r"without its text; load it with WildCatCache.load"):
        CompressedContext.load(tmp_path / "cache.safetensors", llama, tokenizer())
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
        CompressedContext.load(tmp_path / "nowhere.safetensors", llama, tokenizer())


@pytest.mark.parametrize("damage", ["missing", "short", "dtype"])
def test_a_damaged_text_is_refused(llama, context, tmp_path, damage):
    path = tmp_path / "context.safetensors"
    context.save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    ids = tensors.pop("input_ids")
    if damage != "missing":
        tensors["input_ids"] = ids[:, 1:].clone() if damage == "short" else ids.int()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged: the tokens of its text do not fit"):
        CompressedContext.load(path, llama, tokenizer())


def test_a_text_is_read_from_a_file(llama, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert compress_context(llama, tokenizer(), path, **SETTINGS).ask(QUESTIONS[0], **SHORT) == compress_context(
        llama, tokenizer(), TEXT, **SETTINGS
    ).ask(QUESTIONS[0], **SHORT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is the name of a file; pass Path\('text.txt'\)"):
        compress_context(llama, tokenizer(), "text.txt", **SETTINGS)


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ""}, "text_or_file='' is empty"),
        ({"text": " \n "}, "is empty; there is nothing to compress"),
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"preset": "nosuch"}, "preset='nosuch': no such preset"),
        ({"compressor": "snapk"}, "did you mean 'snapkv'"),
        ({"reads": 3}, "reads=3 must be 1 or 2"),
        ({"reads": True}, "reads=True must be 1 or 2"),
        ({"reads": 2, "compressor": "snapkv"}, "reads=2 with compressor='snapkv', which reads a text once"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be a positive integer"),
        ({"reserve": -1}, "reserve=-1 must be a positive integer"),
        ({"reserve": 5000}, "reserve=5000 leaves no room for a text: the model has 4096 positions"),
        ({"compressor": "kvzip", "chunk_tokens": 30}, "'kvzip' reads a text twice and as a whole"),
        ({"compressor": "kvzip", "max_tokens": 100, "ratio": None}, "KVzip compresses the prompt"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(llama, monkeypatch, given, message):
    monkeypatch.setattr(llama, "forward", lambda *_, **__: pytest.fail("the model was run"))
    before = (llama.config.to_dict(), llama.config._attn_implementation)
    options = {name: value for name, value in {**SETTINGS, **given}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        compress_context(llama, tokenizer(), options.pop("text", TEXT), **options)
    assert "\n" not in str(error.value)
    assert (llama.config.to_dict(), llama.config._attn_implementation) == before


def test_a_file_that_cannot_be_read_is_named(llama, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xff")
    (tmp_path / "empty.txt").touch()
    for name, message in (
        ("latin.txt", "latin.txt' is no UTF-8 text: .*; save it as UTF-8"),
        ("nowhere.txt", "nowhere.txt': there is no such file; check the path"),
        ("", "' cannot be read: Is a directory"),
        ("empty.txt", "empty.txt' is empty; write a text into it"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_context(llama, tokenizer(), tmp_path / name, **SETTINGS)
    with pytest.raises(TypeError, match="text_or_file=3 must be a text"):
        compress_context(llama, tokenizer(), 3, **SETTINGS)


def test_a_long_text_of_a_model_with_states_is_refused(monkeypatch):
    model = tiny_model("qwen3_next", max_position_embeddings=128)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(
        ValueError, match="more than the model has positions for, and its cache has layers whose states"
    ):
        compress_context(model, tokenizer(), words(300), **SETTINGS)


@pytest.mark.parametrize("question", ["", "  \n", None])
def test_a_question_must_ask_something(context, question):
    for ask in (context.ask, context.stream, context.conversation().ask, lambda text: context.ask_many(["w5", text])):
        with pytest.raises(ValueError, match="is empty; ask something"):
            ask(question)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2: a question has one answer here"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 reads the text again"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1 reads the text again"),
        ({"assistant_model": tiny_model("llama")}, "assistant_model=LlamaForCausalLM reads the text again"),
        ({"use_cache": False}, "use_cache=False, and the text is in a cache"),
        ({"generation_config": tf.GenerationConfig(use_cache=False)}, "use_cache=False, and the text is in a cache"),
        ({"cache_implementation": "static"}, "cache_implementation='static', and the text is in a cache of ours"),
        ({CACHE: tf.DynamicCache()}, f"{CACHE} cannot be given here"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask cannot be given here"),
        ({"until": ["w5"]}, "until cannot be given here"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a positive integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a positive integer"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_at_once(context, monkeypatch, options, message):
    monkeypatch.setattr(context.model, "forward", lambda *_, **__: pytest.fail("the model was run"))
    for ask in (context.ask, context.stream, context.conversation().ask, context.conversation().stream):
        with pytest.raises(ValueError, match=message):
            ask("w5", **options)


def test_options_that_mean_nothing_are_no_hindrance(context):
    answer = context.ask("w5", **SHORT)
    nothing = {"stopping_criteria": None, "pad_token_id": 0, "return_dict_in_generate": True, "use_cache": True}
    assert context.ask("w5", **nothing, **SHORT) == answer
    assert "".join(context.stream("w5", **nothing, **SHORT)).strip() == answer
    with pytest.raises(ValueError, match=r"streamer cannot be given to stream\(\)"):
        context.stream("w5", streamer=tf.TextStreamer(context.tokenizer))


def test_a_generation_config_is_obeyed(context):
    length, hot = tf.GenerationConfig(max_new_tokens=2), tf.GenerationConfig(do_sample=True, temperature=5.0)
    assert len(context.ask("w5", generation_config=length).split()) <= 2
    assert len({context.ask("w5", generation_config=hot, **SHORT) for _ in range(4)}) > 1
    answer = context.ask("w5", eos_token_id=None, **SHORT).split()
    stop = context.tokenizer.convert_tokens_to_ids(answer[3])
    ended = context.ask("w5", generation_config=tf.GenerationConfig(eos_token_id=stop), **SHORT)
    assert ended.split() == answer[: answer.index(answer[3])]


def test_an_answer_goes_on_where_nothing_is_to_end_it(context, monkeypatch):
    """Though the model's own config names a token that does."""
    answer = context.ask("w5", eos_token_id=None, **SHORT)
    stop = context.tokenizer.convert_tokens_to_ids(answer.split()[2])
    monkeypatch.setattr(context.model.generation_config, "eos_token_id", stop)
    assert len(context.ask("w5", **SHORT)) < len(answer)
    assert context.ask("w5", eos_token_id=None, **SHORT) == answer


def test_a_model_that_does_without_its_cache_is_noticed(words_tokenizer):
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    model.train()
    try:  # from 5.24 on the cache is left out only where gradients are recorded
        read = compress_context(model, words_tokenizer, TEXT, **SETTINGS)
    except RuntimeError as error:
        assert re.search(r"has seen 0\. .* call model.eval\(\)", str(error))
    else:
        assert read.cache.get_seq_length() == read.tokens
    model.eval()
    assert compress_context(model, words_tokenizer, TEXT, **SETTINGS).cache.stored_length()


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_learned_prompts_are_refused(kind):
    model = peft.get_peft_model(tiny_model("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match=r"prompt learning of PEFT .*use another adapter"):
        compress_context(model, tokenizer(), TEXT, **SETTINGS)


def test_what_is_no_model_or_tokenizer_is_said(llama, tmp_path):
    for model, other, message in (
        (tokenizer(), llama, "model=TokenizersBackend is no Transformers model|model=PreTrained.* is no Transformers"),
        (llama, None, "tokenizer=NoneType is no Transformers tokenizer"),
    ):
        with pytest.raises(TypeError, match=message):
            compress_context(model, other, TEXT, **SETTINGS)


def test_a_stream_that_is_left_leaves_nothing_in_a_conversation(context):
    conversation, other = context.conversation(), context.conversation()
    stream = conversation.stream("w66 w67", max_new_tokens=500, eos_token_id=None)
    next(stream)
    stream.close()
    assert conversation.ask(QUESTIONS[0], **SHORT) == other.ask(QUESTIONS[0], **SHORT)


def test_one_text_is_no_list_of_questions(context):
    with pytest.raises(ValueError, match="is one text; give a list"):
        context.ask_many("w5 w6")
    with pytest.raises(ValueError, match="batch_size=0 must be a positive integer"):
        context.ask_many(["w5"], batch_size=0)
