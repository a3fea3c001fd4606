"""`wildcat-kv fit-scorer`: a file that serves the model that it was fitted to, and wrong arguments."""

import pytest

from tests.cli.test_cli import folder, run  # noqa: F401  # a fixture
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import load_scorer
from wildcat_kv.hook.keyword import CACHE


def test_a_scorer_is_fitted_and_serves_its_model(monkeypatch, capsys, folder, tmp_path):  # noqa: F811
    path = tmp_path / "tiny.safetensors"
    status, out, _ = run(monkeypatch, capsys, "fit-scorer", folder, "--output", path, "--texts", 2, "--tokens", 256)
    assert status == 0 and f"{path}: 3 layers, 6 heads, 5" in out and f"scorer='{path}'" in out
    scorer = load_scorer(path)
    assert scorer.model == "model" and scorer.heads == (2,) * 3 and "half develop" in scorer.texts
    model = tiny_model("llama")
    cache = CompressedCache(model.config, compressor=QueryWildCat(scorer=path), ratio=0.25)
    assert cache.compressor.scorer == scorer
    model(random_ids(1, 200), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    _, out, _ = run(monkeypatch, capsys, "inspect", tmp_path / "context.safetensors")
    assert "scorer=FittedScorer('model'))" in out.replace("\n", " ") and len(out) < 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "nowhere/a.safetensors"], "output='nowhere/a.safetensors': there is no folder 'nowhere'"),
        (["--tokens", "9"], "--tokens"),
    ],
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("wildcat_kv.cli.options.load", lambda *_: pytest.fail("a model was loaded"))
    status, out, err = run(monkeypatch, capsys, "fit-scorer", *arguments)
    assert status == 1 and not out and message in err and err.count("\n") == 1
