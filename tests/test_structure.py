"""The shape of the package: imports run downwards, nothing goes in circles, and nothing is too long."""

import ast

import pytest

from benchmarks.structure import LIMITS, PACKAGE, ROOT, ROWS, Structure, circles, foreign, levels, wing_of

WINGS = tuple(wing for row in ROWS for wing in row)


@pytest.fixture(scope="module")
def structure():
    return Structure()


def test_every_module_is_in_a_wing_or_known(structure):
    outside = {name for name in structure.sources if wing_of(name) is None}
    assert outside == {"", "config", "custom_generate", "extras", "files", "lm_eval_model", "plugins", "validation"}
    modules = [path for path in (ROOT / PACKAGE).rglob("*.py") if (path.parent / "__init__.py").exists()]
    assert len(structure.sources) == len(modules)


def test_imports_run_downwards(structure):
    assert structure.upward() == ["cli.app -> wildcat_kv"]  # the version


def test_no_import_goes_in_a_circle(structure):
    assert circles(structure.edges) == []
    assert circles(structure.wings) == []


def test_the_mathematics_stands_on_torch_alone(structure):
    assert foreign(structure, "coreset") == {"torch", "triton"}  # Triton in the kernels alone
    own = {other for name, others in structure.edges.items() if wing_of(name) == "coreset" for other in others}
    assert {wing_of(other) for other in own} == {"coreset"}


def test_attention_without_a_cache_stands_on_the_mathematics_alone(structure):
    """It knows of no cache, and no cache knows of it."""
    assert structure.wings["attention"] == {"coreset"}
    assert [wing for wing, others in structure.wings.items() if "attention" in others] == []


@pytest.mark.parametrize("wing", WINGS)
def test_nothing_is_too_long(structure, wing):
    assert [one for one in structure.too_long() if wing_of(one.name) == wing] == []


# The measure itself


@pytest.fixture
def made_up(tmp_path):
    """Makes a package of files, given as text."""

    def make(**files):
        folder = tmp_path / "wildcat_kv"
        for name, text in {"__init__": "", **files}.items():
            path = folder / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        return Structure(folder)

    return make


@pytest.mark.parametrize(
    ("importer", "statement", "edge"),
    [
        ("coreset__in__a", "from wildcat_kv.config import X", None),
        ("coreset__in__a", "import wildcat_kv.cache.b", "coreset.a -> cache.b"),
        ("coreset__in__a", "def f():\n    from wildcat_kv.cache import b", "coreset.a -> cache.b"),
        ("models__in__a", "from ..cache.b import X", "models.a -> cache.b"),
        ("cache__in__a", "from . import b", None),
        ("cache__in__a", "from wildcat_kv import custom_generate", "cache.a -> custom_generate"),
        ("cache__in__a", "from wildcat_kv import X", "cache.a -> wildcat_kv"),
        ("config", "from wildcat_kv.cache.b import X", "config -> cache.b"),
        ("custom_generate", "from wildcat_kv.cache.b import X", None),
    ],
)
def test_imports_upwards_are_found(made_up, importer, statement, edge):
    files = {"cache__in____init__": "", "cache__in__b": "", "config": "", "custom_generate": "", importer: statement}
    assert made_up(**files).upward() == ([] if edge is None else [edge])


def test_circles_and_levels_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [["a", "b", "c"]]
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert circles(chain) == [] and levels(chain) == 3


def test_lengths_are_those_of_the_source(made_up):
    body = "    def f(self):\n" + "        pass\n" * LIMITS["function"]
    found = made_up(config=f"class A:\n{body}").too_long()
    assert [(one.kind, one.name, one.lines) for one in found] == [("function", "config.A.f", LIMITS["function"] + 1)]


def test_what_other_packages_a_wing_imports_is_found(made_up):
    structure = made_up(coreset__in__a="import math\nimport numpy.linalg\nfrom torch import nn")
    assert foreign(structure, "coreset") == {"numpy", "torch"}
    assert isinstance(structure.sources["coreset.a"], ast.Module)
