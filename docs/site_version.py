"""Show the package's version in the footer of every page; a hook of mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1] / "wildcat_kv" / "__init__.py"


def on_config(config: Any) -> Any:
    """Write the version into the footer, read without an import of torch."""
    version = re.search(r'^__version__ = "(.+)"$', _PACKAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version is not None, f"{_PACKAGE} has no __version__"
    config.copyright = f"wildcat_kv {version[1]} · Apache-2.0"
    return config
