"""The compressed cache as a recipe for `generate(custom_generate=...)`, and as a folder that Transformers loads."""

import copy
import sys

import pytest
import torch
import transformers as tf

from tests.families import REGISTRY
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, disable, enable, patch_config, wildcat_generate
from wildcat_kv.hook.keyword import CACHE, returned_cache
from wildcat_kv.integrations.hub_folder import write_folder

SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
IDS = random_ids(1, 25).repeat(1, 4)


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    """Transformers copies the code of folders to one of its own, in the home of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", [*sys.path])
        yield


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("custom") / "wildcat"
    write_folder(path)
    return path


@pytest.fixture(params=["recipe", "folder"])
def way(request, folder):
    """The arguments that choose the compressed cache."""
    if request.param == "recipe":
        return {"custom_generate": wildcat_generate}
    return {"custom_generate": str(folder), "trust_remote_code": True}


def explicit(model, ids=IDS, **options):
    model = copy.deepcopy(model)
    return model.generate(ids, **{CACHE: WildCatCache(model.config, **SETTINGS)}, **{**GREEDY, **options})


WAYS_TO_DECODE = [
    {},
    {"do_sample": True, "temperature": 1.5, "top_k": 20},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    {"prompt_lookup_num_tokens": 4},
    {"assistant_early_exit": 1},
    {"stopping_criteria": tf.StoppingCriteriaList([tf.MaxLengthCriteria(106)])},
]


@pytest.mark.parametrize("options", WAYS_TO_DECODE, ids=lambda options: "_".join(options) or "greedy")
def test_every_way_to_decode_is_as_with_a_cache_made_by_hand(llama, way, options):
    torch.manual_seed(5)
    expected = explicit(llama, **options)
    torch.manual_seed(5)
    assert torch.equal(llama.generate(IDS, **way, **SETTINGS, **{**GREEDY, **options}), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_oss", "lfm2"])
def test_other_families_are_as_with_a_cache_made_by_hand(family, way):
    if REGISTRY[family].missing:
        pytest.skip(f"no {family} in this version of Transformers")
    model = tiny_model(family)
    assert torch.equal(model.generate(IDS, **way, **SETTINGS, **GREEDY), explicit(model))


def test_a_padded_batch_is_as_with_a_cache_made_by_hand(llama, way):
    ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    ids[1, :40], mask[1, :40] = 0, 0
    expected = explicit(llama, ids, attention_mask=mask)
    assert torch.equal(llama.generate(ids, attention_mask=mask, **way, **SETTINGS, **GREEDY), expected)


def test_the_cache_is_returned_and_has_compressed(llama, way):
    outputs = [llama.generate(IDS, return_dict_in_generate=True, **way, **SETTINGS, **GREEDY) for _ in range(2)]
    caches = [returned_cache(output) for output in outputs]
    assert caches[0] is not caches[1] and torch.equal(outputs[0].sequences, outputs[1].sequences)
    for cache in caches:
        assert type(cache) is CompressedCache and cache.settings == WildCatConfig(**SETTINGS)
        assert cache.get_seq_length() == 109 and cache.stored_length() < 60


def test_a_generation_config_may_be_given(llama, way):
    config = tf.GenerationConfig(**GREEDY, num_beams=2)
    expected = explicit(llama, num_beams=2)
    assert torch.equal(llama.generate(IDS, config, **way, **SETTINGS), expected)
    assert torch.equal(llama.generate(input_ids=IDS, generation_config=config, **way, **SETTINGS), expected)


def test_every_way_to_choose_settings_is_obeyed(llama, way):
    def chosen(**choice):
        output = llama.generate(IDS, return_dict_in_generate=True, max_new_tokens=1, **way, **choice)
        cache = returned_cache(output)
        return cache.settings, type(cache.compressor).__name__

    theory = WildCatConfig(temperature="theory", **SETTINGS)
    assert chosen() == (WildCatConfig(ratio=0.5, bits=4), "QueryWildCat")
    assert chosen(preset="published") == (WildCatConfig(ratio=0.25, sink=32), "WildCat")
    assert chosen(compressor="snapkv", ratio=0.5) == (WildCatConfig(ratio=0.5), "SnapKV")
    assert chosen(settings=theory) == (theory, "QueryWildCat")
    others = {"weights": "clipped", "exact_layers": [0], "seed": 3}
    assert chosen(**SETTINGS, **others)[0] == WildCatConfig(**SETTINGS, **others)
    assert chosen(max_tokens=90)[0] == WildCatConfig(max_tokens=90)
    patch_config(llama.config, compressor="uniform", **SETTINGS)
    assert chosen() == (WildCatConfig(**SETTINGS), "Uniform")


def test_the_temperature_is_that_of_sampling(llama, way):
    greedy = llama.generate(IDS, **way, **SETTINGS, **GREEDY)
    cold = {**GREEDY, "do_sample": True, "temperature": 1e-4}
    assert torch.equal(llama.generate(IDS, **way, **SETTINGS, **cold), greedy)


class Streamer:
    def __init__(self):
        self.seen = []

    def put(self, ids):
        self.seen += ids.flatten().tolist()

    def end(self):
        pass


def test_a_folder_streams(llama, folder):
    """Transformers hands no streamer to functions."""
    streamer = Streamer()
    way = {"custom_generate": str(folder), "trust_remote_code": True}
    output = llama.generate(IDS, streamer=streamer, **way, **SETTINGS, **GREEDY)
    assert streamer.seen == output[0].tolist()


def test_a_folder_takes_an_assistant(llama, folder):
    assistant = tiny_model("llama", num_hidden_layers=2)
    way = {"custom_generate": str(folder), "trust_remote_code": True}
    calls = []
    hook = assistant.register_forward_pre_hook(lambda *_: calls.append(1))
    output = llama.generate(IDS, assistant_model=assistant, **way, **SETTINGS, **GREEDY)
    hook.remove()
    assert calls and torch.equal(output, explicit(llama, assistant_model=assistant))


@pytest.mark.parametrize("outer", [{"ratio": 0.5}, {"compressor": "uniform", "ratio": 0.5}])
def test_it_wins_over_an_enabled_model(llama, way, outer):
    expected = explicit(llama)
    with enable(llama, **outer):
        assert torch.equal(llama.generate(IDS, **way, **SETTINGS, **GREEDY), expected)


# What is refused.


@pytest.mark.parametrize(
    "choice",
    [
        {CACHE: "dynamic"},
        {CACHE: "wildcat"},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"generation_config": {"use_cache": False}},
        {"generation_config": {"cache_implementation": "static"}},
        {"model": {"use_cache": False}},
    ],
    ids=str,
)
def test_a_cache_chosen_otherwise_is_refused(llama, way, choice):
    caches = {"dynamic": tf.DynamicCache(config=llama.config), "wildcat": WildCatCache(llama.config, ratio=0.5)}
    options = {**GREEDY, **choice}
    if CACHE in choice:
        options[CACHE] = caches[choice[CACHE]]
    if "generation_config" in choice:
        options = {"generation_config": tf.GenerationConfig(**GREEDY, **choice["generation_config"])}
    if "model" in choice:
        llama.generation_config.update(**options.pop("model"))
    with pytest.raises(ValueError, match=r"makes a compressed cache.*leave out (cache|past_key_values)") as error:
        llama.generate(IDS, **way, **SETTINGS, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"ratio": 0.5, "max_tokens": 100}, "both of them given"),
        ({"preset": "publishd"}, "did you mean 'published'"),
        ({"compressor": "wildct"}, "did you mean 'wildcat'"),
        ({"settings": WildCatConfig(ratio=0.5), "sink": 1}, "sink given beside settings"),
        ({"rato": 0.5}, "rato"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_and_the_model_goes_on(llama, way, choice, message):
    output = llama.generate(IDS, **GREEDY)
    with pytest.raises(ValueError, match=message):
        llama.generate(IDS, **way, **choice, **GREEDY)
    assert torch.equal(llama.generate(IDS, **GREEDY), output)


def test_ways_to_decode_that_left_transformers_are_refused(llama):
    with pytest.raises(ValueError, match="contrastive_search has left Transformers") as error:
        llama.generate(IDS, custom_generate=wildcat_generate, penalty_alpha=0.6, top_k=4, **SETTINGS, **GREEDY)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_compressed_are_refused(way):
    with pytest.raises(ValueError, match="no full-attention layer"):
        tiny_model("mistral", sliding_window=24).generate(IDS, ratio=0.5, **way, **GREEDY)


def test_a_folder_needs_trust(llama, folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        llama.generate(IDS, custom_generate=str(folder), trust_remote_code=False, ratio=0.5, **GREEDY)


# Folders.


def test_a_folder_holds_what_the_hub_wants(tmp_path):
    paths = write_folder(str(tmp_path / "new" / "folder"))
    assert [path.relative_to(tmp_path / "new" / "folder").as_posix() for path in paths] == [
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "README.md",
    ]
    readme = paths[2].read_text()
    assert readme.startswith("---\n") and "custom_generate" in readme.split("---")[1]
    assert {path for path in (tmp_path / "new").rglob("*") if path.is_file()} == set(paths)


def installing(folder):
    """The lines of a folder's files that say how the package is installed."""
    readme, requirements = (folder / name for name in ("README.md", "custom_generate/requirements.txt"))
    (line,) = (line.strip() for line in readme.read_text().splitlines() if line.startswith("    "))
    comment, package = requirements.read_text().splitlines()
    assert comment.startswith("# ") and comment.endswith(f": {line}") and "$" not in readme.read_text()
    assert package == "wildcat-kv"  # Transformers understands no more than a name and a version
    return line


def test_a_folder_says_how_the_package_is_installed(tmp_path):
    write_folder(tmp_path / "plain")
    assert installing(tmp_path / "plain") == "pip install ."
    write_folder(tmp_path / "url", "git+https://example.org/wildcat_kv")
    assert installing(tmp_path / "url") == "pip install 'wildcat-kv @ git+https://example.org/wildcat_kv'"
    wheel = tmp_path / "wildcat_kv-9.9-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    write_folder(tmp_path / "wheel", wheel)
    assert installing(tmp_path / "wheel") == f"pip install {wheel.name}"
    assert (tmp_path / "wheel" / wheel.name).read_bytes() == b"a wheel"


@pytest.mark.parametrize("source", ["nowhere.whl", "dist", "wildcat_kv"])
def test_what_is_no_wheel_is_refused_before_anything_is_written(tmp_path, source):
    with pytest.raises(ValueError, match=f"install_from='{source}' is no wheel of wildcat-kv; give the one"):
        write_folder(tmp_path / "folder", source)
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_has_custom_generation_is_left_alone(tmp_path):
    path = tmp_path / "custom_generate" / "generate.py"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"has custom_generate/generate\.py already; name another folder") as error:
        write_folder(tmp_path)
    assert "\n" not in str(error.value)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path] and path.read_text() == "mine"
    again = tmp_path / "again"
    write_folder(again)
    with pytest.raises(ValueError, match="already"):
        write_folder(again)


def test_a_folder_cannot_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        write_folder(tmp_path / "file")


@pytest.fixture
def loaded(llama, tmp_path):
    """A model from a folder that generates with a compressed cache by itself."""
    llama.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("of the model")
    assert {path.name for path in write_folder(tmp_path)} == {"generate.py", "requirements.txt"}
    assert (tmp_path / "README.md").read_text() == "of the model"
    return tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_model_folder_brings_its_generate(llama, loaded):
    expected = explicit(llama)
    assert torch.equal(loaded.generate(IDS, **SETTINGS, **GREEDY), expected)
    assert torch.equal(loaded.generate(input_ids=IDS, **SETTINGS, **GREEDY), expected)
    assert torch.equal(loaded.generate(IDS, tf.GenerationConfig(**GREEDY), **SETTINGS), expected)


def test_a_model_folder_obeys_its_config(llama, loaded):
    patch_config(loaded.config, **SETTINGS)
    assert torch.equal(loaded.generate(IDS, **GREEDY), explicit(llama))


def test_a_model_folder_that_is_not_trusted_is_plain(llama, loaded, tmp_path):
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.generate(IDS, **GREEDY), llama.generate(IDS, **GREEDY))


def test_such_a_model_can_be_enabled(llama, loaded):
    own, expected = loaded.generate, explicit(llama)
    enable(loaded, **SETTINGS)
    assert torch.equal(loaded.generate(IDS, **GREEDY), expected)
    disable(loaded)
    assert vars(loaded)["generate"] is own
    assert torch.equal(loaded.generate(IDS, **SETTINGS, **GREEDY), expected)
