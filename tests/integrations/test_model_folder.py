"""Model folders patched and taken back."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import WildCatCache, WildCatConfig, enable
from wildcat_kv.compressors import SnapKV
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.integrations.model_folder import patch_folder, unpatch_folder
from wildcat_kv.recipes.recipe import SECTION, Recipe

BACKUP = "config.json.before-wildcat-kv"
SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}


@pytest.fixture
def folder(tmp_path):
    """Of a model without its weights; the file is laid out as nobody's json module does it."""
    path = tmp_path / "model"
    tiny_config("llama").save_pretrained(path)
    config = path / "config.json"
    fields = {**json.loads(config.read_text()), "of_others": "größer"}
    config.write_text(json.dumps(fields, indent=3, ensure_ascii=False).replace("{", "{  ", 1), encoding="utf-8")
    config.chmod(0o640)
    return path


def contents(folder):
    """Every file with what is in it, links by where they lead."""
    return {
        path.name: ("link", path.readlink()) if path.is_symlink() else (path.read_bytes(), path.stat().st_mode)
        for path in folder.iterdir()
    }


def fields_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_the_section_is_written_and_the_rest_stays(folder):
    before, original = fields_of(folder), (folder / "config.json").read_bytes()
    recipe = patch_folder(folder, compressor="uniform", **SETTINGS)
    assert recipe == Recipe(WildCatConfig(**SETTINGS), "uniform")
    after = fields_of(folder)
    assert after.pop(SECTION) == recipe.section() and after == before
    assert (folder / BACKUP).read_bytes() == original
    assert set(contents(folder)) == {"config.json", BACKUP}
    assert "größer" in (folder / "config.json").read_text(encoding="utf-8")
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o640
    assert Recipe.choose(tf.AutoConfig.from_pretrained(folder)) == recipe


def test_enable_obeys_a_patched_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    patch_folder(str(tmp_path), **SETTINGS)
    model, ids = tf.AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(1, 100)
    with enable(model):
        output = model.generate(ids, max_new_tokens=8)
    by_hand = WildCatCache(model.config, **SETTINGS)
    assert torch.equal(output, model.generate(ids, max_new_tokens=8, **{CACHE: by_hand}))
    assert by_hand.stored_length() < 50


def test_undo_gives_it_back_byte_for_byte(folder):
    before = contents(folder)
    patch_folder(folder, **SETTINGS)
    assert contents(folder)["config.json"] != before["config.json"]
    unpatch_folder(folder)
    assert contents(folder) == before


def test_a_second_patch_keeps_the_first_backup(folder):
    before = contents(folder)
    patch_folder(folder, compressor="uniform", **SETTINGS)
    recipe = patch_folder(folder, max_tokens=300)
    assert recipe == Recipe(WildCatConfig(max_tokens=300, sink=4, window=4, bin_rank=4), "uniform")
    assert (folder / BACKUP).read_bytes() == before["config.json"][0]
    unpatch_folder(folder)
    assert contents(folder) == before


def test_what_others_changed_since_stays(folder):
    patch_folder(folder, **SETTINGS)
    changed = {**fields_of(folder), "of_others": 3, "new": [1]}
    (folder / "config.json").write_text(json.dumps(changed))
    unpatch_folder(folder)
    del changed[SECTION]
    assert fields_of(folder) == changed and set(contents(folder)) == {"config.json"}


def test_a_file_that_others_replaced_has_a_backup_of_its_own(folder):
    """A model saved into a patched folder: the backup is of another one."""
    patch_folder(folder, **SETTINGS)
    tiny_config("qwen3").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields_of(folder), indent=7))
    saved = (folder / "config.json").read_bytes()
    patch_folder(folder, **SETTINGS)
    unpatch_folder(folder)
    assert (folder / "config.json").read_bytes() == saved and not (folder / BACKUP).exists()


def test_undo_without_the_section_takes_the_backup_away(folder):
    patch_folder(folder, **SETTINGS)
    tiny_config("qwen3").save_pretrained(folder)
    saved = (folder / "config.json").read_bytes()
    unpatch_folder(folder)
    assert json.loads(saved) == fields_of(folder) and not (folder / BACKUP).exists()


def test_undo_without_a_backup_takes_the_section_out(folder):
    before = fields_of(folder)
    patch_folder(folder, **SETTINGS)
    (folder / BACKUP).unlink()
    unpatch_folder(folder)
    assert fields_of(folder) == before and set(contents(folder)) == {"config.json"}


@pytest.fixture
def snapshot(folder, tmp_path):
    """As in the Hub's cache: files are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (folder / "config.json").rename(tmp_path / "blobs" / "abc")
    (folder / "config.json").symlink_to(Path("..") / "blobs" / "abc")
    return folder


def test_the_blob_behind_a_link_is_not_touched(snapshot, tmp_path):
    blob, before = contents(tmp_path / "blobs"), contents(snapshot)
    patch_folder(snapshot, **SETTINGS)
    assert not (snapshot / "config.json").is_symlink() and SECTION in fields_of(snapshot)
    assert (snapshot / BACKUP).read_bytes() == blob["abc"][0]
    assert contents(tmp_path / "blobs") == blob
    patch_folder(snapshot, ratio=0.5)
    unpatch_folder(snapshot)
    assert contents(snapshot) == before and contents(tmp_path / "blobs") == blob


def test_undo_of_a_link_keeps_what_others_changed(snapshot, tmp_path):
    blob = contents(tmp_path / "blobs")
    patch_folder(snapshot, **SETTINGS)
    (snapshot / "config.json").write_text(json.dumps({**fields_of(snapshot), "new": 1}))
    unpatch_folder(snapshot)
    assert fields_of(snapshot)["new"] == 1 and SECTION not in fields_of(snapshot)
    assert contents(tmp_path / "blobs") == blob and set(contents(snapshot)) == {"config.json"}


# What fails changes nothing.


def fail(name):
    def failing(self, target=None, *args, **kwargs):
        raise OSError(28, f"no space left: {name}")

    return failing


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", ["write_text", "replace", "chmod"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_write_that_fails_leaves_the_folder_as_it_was(request, monkeypatch, name, patched, linked):
    folder = request.getfixturevalue("snapshot" if linked else "folder")
    if patched:
        patch_folder(folder, **SETTINGS)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail(name))
        with pytest.raises(OSError, match="no space left"):
            patch_folder(folder, ratio=0.5)
    assert contents(folder) == before
    patch_folder(folder, ratio=0.5)
    unpatch_folder(folder)
    assert SECTION not in fields_of(folder)


@pytest.mark.parametrize("changed", [False, True])
def test_an_undo_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch, changed):
    patch_folder(folder, **SETTINGS)
    if changed:
        (folder / "config.json").write_text(json.dumps({**fields_of(folder), "new": 1}))
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail("replace"))
        with pytest.raises(OSError, match="no space left"):
            unpatch_folder(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"rato": 0.5}, "rato=0.5: no such setting; did you mean 'ratio'"),
        ({"preset": "publishd"}, "did you mean 'published'"),
        ({"compressor": "wildct"}, "did you mean 'wildcat'"),
        ({"compressor": SnapKV()}, "a config holds names"),
        ({"exact_layers": [9]}, r"exact_layers=\[9\]: layer 9 is none of"),
    ],
    ids=str,
)
def test_wrong_settings_change_nothing(folder, choice, message):
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        patch_folder(folder, **choice)
    assert "\n" not in str(error.value) and contents(folder) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf.T5Config(), "encoder-decoder"),
        (tf.MistralConfig(sliding_window=24), "no full-attention layer"),
        (tf.DeepseekV3Config(), "latent"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_cannot_be_compressed_are_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        patch_folder(tmp_path, ratio=0.5)
    assert "\n" not in str(error.value) and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its config.json cannot be read"),
        ("", "its config.json cannot be read"),
        (b"\xff\xfe", "its config.json cannot be read"),
        ("[1]", "its config.json holds no mapping"),
        ('{"a": 1}', "Transformers cannot read its config.json"),
        ('{"model_type": "no such model"}', "Transformers cannot read its config.json"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Transformers cannot read its config.json"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "Transformers cannot read its config.json"),
        ('{"model_type": "llama", "wildcat_kv": {"version": 9}}', r"config\.wildcat_kv\.version=9"),
    ],
)
def test_a_config_that_cannot_be_read_is_left_alone(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        patch_folder(tmp_path, seed=3)
    assert "\n" not in str(error.value) and contents(tmp_path) == before


def test_the_code_of_a_folder_is_never_run(tmp_path, monkeypatch):
    fields = {"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\nclass Config: pass\n")
    before, asked = contents(tmp_path), []
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(ValueError, match=r"Transformers cannot read its config\.json"):
        patch_folder(tmp_path, ratio=0.5)
    assert not asked and contents(tmp_path) == before


@pytest.mark.parametrize("use", [lambda path: patch_folder(path, ratio=0.5), unpatch_folder])
def test_what_is_no_model_folder_is_refused(tmp_path, use):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "config.json").symlink_to("nowhere")
    for name in ("nothing", "file", ".", "dangling"):
        with pytest.raises(ValueError, match=r"folder='.*' has no config.json; give a model's folder") as error:
            use(tmp_path / name)
        assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def test_an_undo_of_what_is_not_patched_is_refused(folder):
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is not patched: its config\.json has no 'wildcat_kv'; nothing to undo"):
            unpatch_folder(folder)
        assert contents(folder) == before
    patch_folder(folder, **SETTINGS)
    unpatch_folder(folder)
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_folder(folder)


@pytest.mark.parametrize("broken", ["config.json", BACKUP])
def test_an_undo_of_what_cannot_be_read_is_refused(folder, broken):
    patch_folder(folder, **SETTINGS)
    (folder / broken).write_text("{")
    before = contents(folder)
    with pytest.raises(ValueError, match=f"its {broken} cannot be read") as error:
        unpatch_folder(folder)
    assert "\n" not in str(error.value) and contents(folder) == before
