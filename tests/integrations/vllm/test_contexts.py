"""A folder of contexts: found while it changes, and refused where something is wrong."""

import json
import shutil

import pytest
import torch

from tests.tiny import tiny_model
from tests.words import tokenizer, words
from wildcat_kv import compress_context
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.export import export_context
from wildcat_kv.integrations.vllm.heads import heads_of_rank
from wildcat_kv.integrations.vllm.identity import ServedModel

SETTINGS = {"ratio": 0.5, "sink": 4, "window": 4, "bin_rank": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    for name, seed in (("first", 0), ("second", 1)):
        export_context(compress_context(model, tokenizer(), words(150, seed), **SETTINGS), root / name)
    return root


@pytest.fixture
def root(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "contexts")


@pytest.fixture
def contexts(root, checkpoint):
    return ContextFolder(root, ServedModel.of(str(checkpoint)))


def change_header(folder, **fields):
    path = folder / "context.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_contexts_are_found_by_name_and_digest(contexts):
    assert contexts.names() == ["first", "second"]
    for name in contexts.names():
        found = contexts.get(name)
        assert contexts.find(found.digest).folder.name == name
    assert contexts.get("first").digest != contexts.get("second").digest


def test_a_folder_that_changes_needs_no_restart(contexts, root):
    first = contexts.get("first")
    shutil.copytree(root / "second", root / "third")
    assert contexts.names() == ["first", "second", "third"]
    assert contexts.get("third").header == contexts.get("second").header
    shutil.rmtree(root / "first")
    with pytest.raises(FileNotFoundError, match="context='first': there is no such context"):
        contexts.get("first")
    with pytest.raises(FileNotFoundError, match="has changed or is gone"):
        contexts.find(first.digest)


def test_a_context_that_is_replaced_is_read_anew(contexts, root):
    older = contexts.get("first")
    shutil.rmtree(root / "first")
    shutil.copytree(root / "second", root / "first")
    assert contexts.get("first").digest != older.digest


@pytest.mark.parametrize("name", ["../contexts/first", "first/../second", ".", "..", "", "a/b", "first.bak", "/etc"])
def test_names_that_lead_elsewhere_are_refused(contexts, name):
    with pytest.raises(ValueError, match="is no name of a context"):
        contexts.get(name)


@pytest.mark.parametrize("part", ["folder", "header", "tensors"])
def test_links_out_of_the_folder_are_refused(contexts, root, tmp_path, part):
    outside = shutil.copytree(root / "first", tmp_path / "outside")
    inside = root / "linked"
    if part == "folder":
        inside.symlink_to(outside)
    else:
        shutil.copytree(outside, inside)
        path = next(inside.glob("context.json" if part == "header" else "*.safetensors"))
        path.unlink()
        path.symlink_to(outside / path.name)
    with pytest.raises(ValueError, match="is a link out of the folder"):
        contexts.get("linked")


def test_a_link_within_the_folder_is_a_second_name(contexts, root):
    (root / "latest").symlink_to(root / "first")
    assert contexts.get("latest").digest == contexts.get("first").digest


def test_damage_is_found(contexts, root):
    path = contexts.get("first").path
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="another SHA-256"):
        contexts.get("first")
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="another SHA-256"):
        contexts.get("first")
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        contexts.get("first")
    assert contexts.get("second")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2, and this release reads"),
        ({"format": "another"}, "has format 'another'"),
        ({"slots": 0}, "is damaged: slots"),
        ({"sha256": "../../x"}, "is damaged: sha256"),
        ({"unknown": 1}, "is damaged: unknown"),
        ({"method": None}, "is damaged: method"),
    ],
)
def test_headers_that_do_not_fit_are_refused(contexts, root, fields, message):
    change_header(root / "first", **fields)
    with pytest.raises(ValueError, match=message):
        contexts.get("first")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"x" * (5 << 20)])
def test_headers_that_are_none_are_refused(contexts, root, content):
    (root / "first" / "context.json").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        contexts.get("first")


def test_another_model_is_refused(root, tmp_path):
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is of another model than .*num_hidden_layers"):
        ContextFolder(root, ServedModel.of(str(tmp_path / "other"))).get("first")


def test_another_revision_is_refused(model, root, tmp_path):
    """The shapes are the same, the weights are others."""
    changed = tiny_model("llama")
    for parameter in changed.parameters():
        parameter.mul_(1.1)
    changed.save_pretrained(tmp_path / "changed", max_shard_size="50KB")
    with pytest.raises(ValueError, match=r"a model with other weights than .* differs"):
        ContextFolder(root, ServedModel.of(str(tmp_path / "changed"))).get("first")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded", max_shard_size="50KB")
    model.to(torch.float32)
    assert ContextFolder(root, ServedModel.of(str(tmp_path / "rounded"))).get("first")


def test_weights_need_attention_that_knows_them(root, checkpoint):
    with pytest.raises(ValueError, match="has weights, and the engine's attention knows none"):
        ContextFolder(root, ServedModel.of(str(checkpoint)), weighted=False).get("first")


def test_a_folder_must_be_there(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="is no folder"):
        ContextFolder(tmp_path / "nowhere", ServedModel.of(str(checkpoint)))
    with pytest.raises(ValueError, match="has no config that can be read"):
        ServedModel.of(str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_their_heads(contexts, ranks):
    """Side by side, the tensors of all ranks are those of one."""
    context = contexts.get("first")
    whole = list(context.layers(range(context.header.layers)))
    parts = [
        list(context.layers(range(context.header.layers), heads_of_rank(context.header.heads, rank, ranks)))
        for rank in range(ranks)
    ]
    for index, layer in enumerate(whole):
        own = [part[index] for part in parts][:: max(1, ranks // context.header.heads)]
        assert torch.equal(torch.cat([part.keys for part in own]), layer.keys)
        assert torch.equal(torch.cat([part.weights for part in own]), layer.weights)
        assert own[0].values.shape[0] == max(1, context.header.heads // ranks)
