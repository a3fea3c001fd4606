"""The package's public names are imported when they are asked for."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import wildcat_kv


def test_every_public_name_is_there():
    assert sorted(wildcat_kv.__all__) == sorted(wildcat_kv._MODULES)
    for name in wildcat_kv.__all__:
        home = import_module(f"wildcat_kv.{wildcat_kv._MODULES[name]}")
        found = getattr(wildcat_kv, name)
        assert found is getattr(home, name) and found.__module__ == home.__name__
    assert set(wildcat_kv.__all__) <= set(dir(wildcat_kv))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(wildcat_kv.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    seen = {alias.name: node.module for node in imports for alias in node.names if "wildcat_kv." in node.module}
    assert seen == {name: f"wildcat_kv.{module}" for name, module in wildcat_kv._MODULES.items()}


def test_what_is_not_there_is_an_attribute_error():
    for name in ("WildcatCache", "_private"):
        with pytest.raises(AttributeError, match=f"'wildcat_kv' has no attribute '{name}'"):
            getattr(wildcat_kv, name)


def test_the_package_is_imported_without_torch():
    code = (
        "import sys, wildcat_kv; assert 'torch' not in sys.modules; "
        "wildcat_kv.compressors.SnapKV; wildcat_kv.WildCatCache; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_in_the_reference():
    pages = [Path("docs") / f"{page}.md" for page in ("api", "api-methods")]
    text = "\n".join((Path(wildcat_kv.__file__).parents[1] / page).read_text(encoding="utf-8") for page in pages)
    shown = set(re.findall(r"^::: wildcat_kv\.(\w+)$", text, flags=re.MULTILINE))
    other_names = {"CompressedCache"}  # of a class that is shown
    assert shown | other_names == set(wildcat_kv.__all__)
    assert all(f"`{name}`" in text for name in other_names)
