"""Contents of a release: every file of the package, and one version everywhere."""

import io
import re
import tarfile
import zipfile
from pathlib import PurePosixPath

import pytest

import wildcat_kv
from tests.installed.contents import ROOT, check_sdist, check_wheel, shipped

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def package_files():
    """Files of the package and of its presets, as they lie in the folder, whether there is a repository or not."""
    files = (path.relative_to(ROOT) for folder in ("wildcat_kv", "configs") for path in (ROOT / folder).rglob("*"))
    return {path.as_posix() for path in files if (ROOT / path).is_file() and "__pycache__" not in path.parts}


def test_every_file_of_the_package_is_shipped():
    """`packages` in pyproject.toml is written by hand."""
    data = SETUPTOOLS["package-data"]
    for inside in shipped(package_files()).values():
        path = PurePosixPath(inside)
        package = next(name for name in map(dotted, path.parents) if name in SETUPTOOLS["packages"])
        own = path.relative_to(package.replace(".", "/"))
        if path.suffix == ".py":
            assert len(own.parts) == 1 or any(map(own.match, data.get(package, ()))), f"{inside}: no such package"
        else:
            assert any(map(own.match, data.get(package, ()))), f"{inside}: not in package-data"


def dotted(folder):
    return ".".join(folder.parts)


def test_packages_that_are_shipped_are_there():
    inside = {dotted(PurePosixPath(name).parent) for name in shipped(package_files()).values()}
    assert set(SETUPTOOLS["packages"]) <= inside


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cited[1] == wildcat_kv.__version__
    changes = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert next(name for name in changes if name != "Unreleased") == wildcat_kv.__version__


# The check of what was built.


@pytest.fixture
def files():
    return {
        "wildcat_kv/__init__.py",
        "wildcat_kv/py.typed",
        "configs/default.yaml",
        "configs/eval/smoke.yaml",
        "LICENSE",
    }


@pytest.fixture
def wheel(tmp_path):
    def make(**changed):
        held = {name: (ROOT / name).read_text() for name in ("wildcat_kv/__init__.py", "wildcat_kv/py.typed")}
        held["wildcat_kv/configs/default.yaml"] = (ROOT / "configs/default.yaml").read_text()
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"):
            held[f"wildcat_kv-0.dist-info/{name}"] = ""
        with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
            for name, text in (held | changed).items():
                if text is not None:
                    archive.writestr(name, text)
        return tmp_path / "some.whl"

    return make


@pytest.mark.parametrize(
    ("changed", "faults"),
    [
        ({}, []),
        ({"wildcat_kv/py.typed": None}, ["missing: wildcat_kv/py.typed"]),
        ({"wildcat_kv/__init__.py": "old"}, ["other: wildcat_kv/__init__.py"]),
        ({"tests/test_config.py": ""}, ["too many: tests/test_config.py"]),
        ({"wildcat_kv/configs/eval/smoke.yaml": ""}, ["too many: wildcat_kv/configs/eval/smoke.yaml"]),
        ({"wildcat_kv-0.dist-info/licenses/LICENSE": None}, ["metadata: licenses/LICENSE"]),
    ],
    ids=str,
)
def test_faults_of_a_wheel_are_found(files, wheel, changed, faults):
    assert check_wheel(wheel(**changed), files) == faults


def test_faults_of_an_sdist_are_found(files, tmp_path):
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in [*sorted(files - {"LICENSE"}), "PKG-INFO", "results/run.json"]:
            archive.addfile(tarfile.TarInfo(f"wildcat_kv-0/{name}"), io.BytesIO())
    assert check_sdist(path, files | {"results/run.json"}) == ["missing: LICENSE", "too many: results/run.json"]
