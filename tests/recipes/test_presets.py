"""Presets: the files that are shipped, and what is said of those that do not fit."""

import json
import warnings
from pathlib import Path

import pytest
import transformers as tf
import yaml

from tests.tiny import tiny_config
from wildcat_kv import Preset, WildCatCache, WildCatConfig, load_preset, preset_names
from wildcat_kv.compressors.registry import check_name
from wildcat_kv.recipes.presets import preset_schema
from wildcat_kv.recipes.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_loads_by_its_name_and_by_its_path(path):
    preset = load_preset(path.stem)
    assert preset == load_preset(path) == load_preset(str(path))
    assert preset.description and "\n" not in preset.description
    check_name(preset.compressor)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_fits_models_in_and_out_of_its_families(path):
    preset = load_preset(path)
    for config in (tiny_config("llama"), tf.Gemma3TextConfig(), tf.Qwen2Config()):
        WildCatCache(config, preset=path)
    for family in preset.families:
        config = tf.AutoConfig.for_model(**family.match)
        assert preset.settings_for(config).exact_layers == family.exact_layers
        WildCatCache(config, preset=path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_leads_editors_to_the_schema(path):
    first, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=preset.schema.json"
    fields = yaml.safe_load(path.read_text())
    schema = json.loads((CONFIGS / "preset.schema.json").read_text())
    assert fields.keys() <= schema["properties"].keys() and fields.keys() >= set(schema["required"])
    assert fields["settings"].keys() <= schema["$defs"]["WildCatConfig"]["properties"].keys()
    families = schema["$defs"]["Family"]["required"]
    assert all(set(family) == set(families) for family in fields.get("families", []))


def test_the_schema_on_disk_is_that_of_the_code():
    schema = json.loads((CONFIGS / "preset.schema.json").read_text())
    assert schema == preset_schema()
    assert schema["$schema"].startswith("https://json-schema.org/") and schema["title"] == "wildcat_kv preset"
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())


def test_the_names_are_those_of_the_files():
    assert preset_names() == [path.stem for path in SHIPPED]
    assert "published" in preset_names()


def test_the_published_one_is_the_published_protocol():
    preset = load_preset("published")
    assert preset.compressor == "wildcat" and not preset.families
    assert preset.settings == WildCatConfig(ratio=0.25, sink=32, window=32, bin_rank=12)


FAMILY = {"name": "small ones", "match": {"model_type": "qwen3", "num_hidden_layers": 28}, "measured": "in a test"}


def written(tmp_path, **fields):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"settings": {"ratio": 0.5, "sink": 3}, **fields}))
    return path


def test_families_have_settings_of_their_own(tmp_path):
    later = {**FAMILY, "match": {"model_type": "qwen3"}, "exact_layers": [1]}
    preset = load_preset(written(tmp_path, families=[{**FAMILY, "exact_layers": [0, -1]}, later]))
    large, small = tf.Qwen3Config(num_hidden_layers=32), tf.Qwen3Config(num_hidden_layers=28)
    assert preset.settings_for(small) == WildCatConfig(ratio=0.5, sink=3, exact_layers=[0, -1])
    assert preset.settings_for(large).exact_layers == (1,)
    assert preset.settings_for(tf.LlamaConfig(num_hidden_layers=28)) == WildCatConfig(ratio=0.5, sink=3)


def test_a_model_that_no_family_knows_is_warned_of(tmp_path):
    path = written(tmp_path, families=[{**FAMILY, "exact_layers": [0]}])
    known, unknown = tf.Qwen3Config(num_hidden_layers=28), tf.LlamaConfig(num_hidden_layers=28)
    with pytest.warns(UserWarning, match=r"mine.yaml' leaves layers exact .* small ones; for this model \(llama\)"):
        Recipe.choose(unknown, preset=path, ratio=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recipe.choose(known, preset=path)
        Recipe.choose(unknown, preset="published")
        for fields in ({"exact_layers": ()}, {"max_tokens": 512}):
            Recipe.choose(unknown, preset=path, **fields)


def test_fields_given_beside_a_preset_win_over_its_families(tmp_path):
    path, config = written(tmp_path, families=[{**FAMILY, "exact_layers": [0]}]), tf.Qwen3Config(num_hidden_layers=28)
    chosen = [
        Recipe.choose(config, preset=path, **fields).settings
        for fields in ({}, {"ratio": 0.25}, {"exact_layers": ()}, {"max_tokens": 512})
    ]
    assert [settings.exact_layers for settings in chosen] == [(0,), (0,), (), ()]
    assert chosen[3] == WildCatConfig(max_tokens=512, sink=3)
    with pytest.raises(ValueError, match=r"exact_layers=.*with max_tokens=512"):
        Recipe.choose(config, preset=path, max_tokens=512, exact_layers=[0])


def test_both_endings_of_yaml_files_are_known(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("compressor: uniform\nsettings: {max_tokens: 512}\n", encoding="utf-8")
    assert load_preset(path) == Preset(compressor="uniform", settings=WildCatConfig(max_tokens=512))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("publishd", "preset='publishd': no such preset; did you mean 'published'"),
        ("xyz", "preset='xyz': no such preset; there are .*published.*, or give the path of a .yaml file"),
        ("", "preset=''"),
        ("../configs/published", "no such preset"),
        ("eval/smoke", "no such preset"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_preset(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {ratio: 2}", r"settings\.ratio=2"),
        ("settings: {rato: 0.5}", r"settings\.rato=0.5: no such setting; did you mean 'ratio'"),
        ("settings: {ratio: a quarter}", r"settings\.ratio='a quarter'"),
        ("settings: {ratio: 0.5, max_tokens: 512}", "both of them given"),
        ("settings: {}", "neither of them given"),
        ("settings: 3", "settings=3"),
        ("settings: {1: 2}", "settings"),
        ("compressor: wildcat", "settings: missing"),
        ("setings: {ratio: 0.5}\nsettings: {ratio: 0.5}", "setings=.*no such setting; did you mean 'settings'"),
        ("compressor: wildct\nsettings: {ratio: 0.5}", "compressor='wildct'.*did you mean 'wildcat'"),
        ("compressor: 3\nsettings: {ratio: 0.5}", "compressor=3"),
        ("description: [a]\nsettings: {ratio: 0.5}", r"description=\['a'\]"),
        ("- a list", r"must hold a mapping of names.*a list"),
        ("1: 2", "must hold a mapping of names"),
        ("", "must hold a mapping of names"),
        ("ratio: [", "no readable YAML file"),
    ],
)
def test_wrong_files_are_named_with_the_field_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_preset(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ([{**FAMILY, "exact_layers": ["a"]}], r"families\.0\.exact_layers\.0='a'"),
        ([FAMILY], r"families\.0\.exact_layers: missing"),
        ([{**FAMILY, "match": {}, "exact_layers": [0]}], r"families\.0\.match=\{\}"),
        ([{**FAMILY, "exact_layers": [0]}, {**FAMILY, "exact_layers": [0], "ratio": 1}], r"families\.1\.ratio=1"),
        (["qwen2"], r"families\.0='qwen2'"),
        ({"qwen2": 3}, r"families=\{'qwen2': 3\}"),
    ],
)
def test_wrong_families_are_named_too(tmp_path, families, message):
    with pytest.raises(ValueError, match=message) as error:
        load_preset(written(tmp_path, families=families))
    assert "\n" not in str(error.value)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("mine.yaml", "folder.yaml", "nothing.yaml"):
        with pytest.raises(ValueError, match=rf"{name}' is no readable YAML file") as error:
            load_preset(tmp_path / name)
        assert "\n" not in str(error.value)


def test_what_a_file_says_is_never_run(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"settings: !!python/object/apply:os.mkdir [{tmp_path / 'touched'}]")
    with pytest.raises(ValueError, match="no readable YAML"):
        load_preset(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("preset", [3, ["balanced"], None])
def test_what_is_no_preset_is_named(preset):
    with pytest.raises(TypeError, match=r"preset=.* is no preset; give a name"):
        load_preset(preset)
