"""Hold a wheel and an sdist against the files of the repository: python tests/installed/contents.py dist."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Records of runs; in an sdist the tests that read them are skipped.
LEFT_OUT = "results/"
# Written by the build.
_ADDED = ("PKG-INFO", "setup.cfg")
_METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
_MIB = 1 << 20


def tracked() -> set[str]:
    """List the files of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def shipped(files: set[str]) -> dict[str, str]:
    """Give each file of the repository that belongs in the wheel its name there."""
    package = {name: name for name in files if name.startswith("wildcat_kv/")}
    presets = {name: f"wildcat_kv/{name}" for name in files if Path(name).parent == Path("configs")}
    return package | presets


def check_wheel(path: Path, files: set[str]) -> list[str]:
    """List what is wrong with a wheel: files that are missing, too many, or other than those of the repository."""
    with zipfile.ZipFile(path) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    expected = {inside: (ROOT / name).read_bytes() for name, inside in shipped(files).items()}
    found = {name.split("/", 1)[1] for name in metadata}
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - held.keys())),
        *(f"too many: {name}" for name in sorted(held.keys() - expected.keys() - metadata)),
        *(f"other: {name}" for name in sorted(expected.keys() & held.keys()) if expected[name] != held[name]),
        *(f"metadata: {name}" for name in sorted(found ^ _METADATA)),
    ]


def check_sdist(path: Path, files: set[str]) -> list[str]:
    """List what is wrong with an sdist: files that are missing or too many."""
    with tarfile.open(path) as sdist:
        names = [member.name for member in sdist.getmembers() if member.isfile()]
    held = {name.split("/", 1)[1] for name in names}
    held = {name for name in held if name not in _ADDED and ".egg-info/" not in name}
    expected = {name for name in files if not name.startswith(LEFT_OUT)}
    return [
        *(f"missing: {name}" for name in sorted(expected - held)),
        *(f"too many: {name}" for name in sorted(held - expected)),
    ]


def main() -> None:
    """Check the one wheel and the one sdist of a folder, and print their sizes."""
    folder, files = Path(sys.argv[1]), tracked()
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    faults = [f"{wheel.name}: {one}" for one in check_wheel(wheel, files)]
    faults += [f"{sdist.name}: {one}" for one in check_sdist(sdist, files)]
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / _MIB:.2f} MiB")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
