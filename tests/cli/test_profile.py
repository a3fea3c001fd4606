"""`wildcat-kv profile`: a file that serves the model that it was measured on, and wrong arguments."""

import pytest
import transformers as tf

from tests.cli.test_cli import folder, run  # noqa: F401  # a fixture
from tests.compressors.test_query_wildcat_scorer import scorer_of
from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import CompressedCache
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import load_profile
from wildcat_kv.hook.keyword import CACHE


@pytest.mark.parametrize(("share", "heads"), [("heads", 2), ("layers", 1)])
def test_a_profile_is_measured_and_serves_its_model(monkeypatch, capsys, folder, tmp_path, share, heads):  # noqa: F811
    path = tmp_path / "tiny.json"
    arguments = ["--output", path, "--texts", 2, "--tokens", 256, "--ratio", 0.25, "--ratio", 0.5, "--share", share]
    status, out, _ = run(monkeypatch, capsys, "profile", folder, *arguments)
    assert status == 0 and f"{path}: 3 layers, 2 ratios, 5" in out and f"profile='{path}'" in out
    profile = load_profile(path)
    assert profile.model == "model" and profile.heads == (heads,) * 3
    assert [point.ratio for point in profile.points] == [0.25, 0.5] and "half develop" in profile.texts
    cache = CompressedCache(tiny_config("llama"), compressor=QueryWildCat(profile=path), ratio=0.25)
    assert cache.compressor.profile == profile


def test_a_profile_is_measured_with_a_scorer(monkeypatch, capsys, folder, tmp_path):  # noqa: F811
    scorer, path = scorer_of(tf.AutoConfig.from_pretrained(folder)), tmp_path / "profile.json"
    scorer.save(tmp_path / "scorer.safetensors")
    arguments = ("--output", path, "--texts", 1, "--tokens", 256, "--ratio", 0.25)
    status, out, _ = run(
        monkeypatch, capsys, "profile", folder, "--scorer", tmp_path / "scorer.safetensors", *arguments
    )
    assert status == 0 and f"profile='{path}', scorer=..." in out
    assert load_profile(path).scorer == scorer.digest
    assert QueryWildCat(profile=path, scorer=scorer).scorer == scorer


def test_a_saved_cache_names_its_profile_without_all_its_numbers(monkeypatch, capsys, folder, tmp_path):  # noqa: F811
    path = tmp_path / "tiny.json"
    run(monkeypatch, capsys, "profile", folder, "--output", path, "--texts", 1, "--tokens", 256, "--ratio", 0.25)
    model = tiny_model("llama")
    cache = CompressedCache(model.config, compressor=QueryWildCat(profile=path), ratio=0.25)
    model(random_ids(1, 200), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    _, out, _ = run(monkeypatch, capsys, "inspect", tmp_path / "context.safetensors")
    assert "profile=Profile('model')" in out.replace("\n", " ") and "attended=[" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio=1.5 must be a share of the tokens, in (0, 1]"),
        (["--output", "nowhere/profile.json"], "output='nowhere/profile.json': there is no folder 'nowhere'"),
        (["--scorer", "nothing"], "scorer='nothing': no such scorer; there are qwen2.5-coder-0.5b, smollm2-135m"),
        (["--share", "rows"], "share='rows' must be 'layers' or 'heads'"),
        (["--tokens", "9"], "--tokens"),
    ],
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("wildcat_kv.cli.options.load", lambda *_: pytest.fail("a model was loaded"))
    status, out, err = run(monkeypatch, capsys, "profile", *arguments)
    assert status == 1 and not out and message in err and err.count("\n") == 1
