"""Run Transformers' own generation and cache tests against WildCatCache.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers /tmp/transformers
    pip install parameterized
    python -m tests.upstream /tmp/transformers

The tests are not on PyPI (the source archive holds only `tests/test_*.py`), so the folder is given. Two runs:
within the budget, where every check must hold as it stands, and compressed, where checks that compare with
everything ever read give way to checks of shape. `wildcat_upstream.py` says what is left out, and why.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import transformers

# One family for each kind of attention: plain, biased, normed, softcap, hybrids, sinks, linear.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "qwen3_next")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkout of Transformers, of the installed version")
    parser.add_argument("--budget", choices=("within", "compressed", "none"), help="one run; both by default")
    arguments, rest = parser.parse_known_args()
    source = arguments.source.resolve()
    if reason := unusable(source):
        parser.error(reason)
    files = [f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES]
    files.append("tests/utils/test_cache_utils.py")
    budgets = [arguments.budget] if arguments.budget else ["within", "compressed"]
    return max([run(source, budget, [*files, *rest]) for budget in budgets])


def unusable(source: Path) -> str | None:
    """What speaks against this folder, if anything."""
    version = source / "src" / "transformers" / "__init__.py"
    if not version.is_file() or not (source / "tests" / "generation" / "test_utils.py").is_file():
        return f"{source} is no checkout of Transformers (src/transformers or tests/generation is missing)"
    found = re.search(r'__version__ = "([^"]+)"', version.read_text(encoding="utf-8"))
    if found is None or found[1] != transformers.__version__:
        return f"{source} is version {found and found[1]}, and {transformers.__version__} is installed"
    return None


def run(source: Path, budget: str, arguments: list[str]) -> int:
    """One pytest in the checkout; in a process of its own, because its tests are a package `tests` as well."""
    path = os.pathsep.join([str(source), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path, "WILDCAT_UPSTREAM_BUDGET": budget}
    print(f"== {budget} ==", flush=True)
    options = ["-q", "-p", "wildcat_upstream", "-p", "no:cacheprovider", "-p", "no:warnings"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=source, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
