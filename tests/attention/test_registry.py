"""Methods by name, presets, and methods of installed packages."""

import importlib.metadata
from dataclasses import fields

import pytest

from tests.attention.heads import METHODS
from wildcat_kv.attention import Attention, WildCatAttention, attention_method, available
from wildcat_kv.attention import registry as module


def test_methods_are_built_by_name():
    assert [method.name for method in available()] == list(METHODS)
    for method in available():
        kind = module.OURS[method.name]
        assert type(attention_method(method.name)) is kind
        assert method.summary.endswith(".") and (method.paper or method.name in ("exact", "uniform", "stratified"))
    assert attention_method("wildcat", rank=7, bins=2).rank == 7


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wildcatt", {}, "attention='wildcatt': no such method; did you mean 'wildcat'\\? there are exact, wildcat"),
        (
            "performer",
            {"feature": 3},
            "feature=3: no such setting; did you mean 'features'\\? performer takes features, seed",
        ),
        ("exact", {"paper": 3}, "paper=3: no such setting"),
        ("uniform", {"rank": 0}, "rank=0 must be at least 1"),
    ],
)
def test_wrong_names_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        attention_method(name, **settings)


def test_presets_have_the_settings_of_the_experiments():
    for name, settings in {"biggan": (96, 8), "t2t_1": (224, 224), "t2t_2": (196, 196)}.items():
        method = WildCatAttention.preset(name, seed=3)
        assert (method.rank, method.bins, method.seed) == (*settings, 3)
    for name, kind in module.OURS.items():
        for preset, settings in kind.presets.items():
            assert set(settings) <= {field.name for field in fields(kind)}, name
            assert {key: getattr(kind.preset(preset), key) for key in settings} == settings
    with pytest.raises(ValueError, match="preset='bigan': did you mean 'biggan'\\? wildcat has biggan, t2t_1, t2t_2"):
        WildCatAttention.preset("bigan")
    with pytest.raises(ValueError, match="preset='biggan': exact has none"):
        attention_method("exact").preset("biggan")


def test_methods_of_installed_packages_are_listed(monkeypatch):
    point = importlib.metadata.EntryPoint("theirs", "tests.attention.test_registry:Theirs", module.GROUP)
    monkeypatch.setattr(module.plugins, "entry_points", lambda group: [point] if group == module.GROUP else [])
    assert available()[-1].summary == "Attend to nothing."
    assert isinstance(attention_method("theirs"), Theirs)


@pytest.mark.parametrize("value", ["json:loads", "json:nothing", "no.such.package:Method"])
def test_a_broken_package_is_named_and_breaks_no_other(monkeypatch, value):
    point = importlib.metadata.EntryPoint("odd", value, module.GROUP)
    monkeypatch.setattr(module.plugins, "entry_points", lambda group: [point])
    with pytest.warns(UserWarning, match=f"attention='odd': the entry point {value}"):
        assert [method.name for method in available()] == list(METHODS)
    with pytest.raises(ValueError, match=f"attention='odd': the entry point {value}"):
        attention_method("odd")
    assert attention_method("exact").name == "exact"


class Theirs(Attention):
    """Attend to nothing."""

    name = "theirs"
    complexity = "O(1)"


def test_what_a_method_must_implement_is_named():
    with pytest.raises(NotImplementedError, match="Theirs must implement operations"):
        Theirs().cost(3, 4)
