"""Let the search work without a network in pages opened from the disk; a hook of mkdocs.yml."""

from typing import Any

from mkdocs.utils import get_relative_url

# Material's offline plugin fetches this script when a page is shown.
_FETCHED = "https://unpkg.com/iframe-worker/shim"
_SHIPPED = "js/iframe-worker.js"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Point a page to the script beside it."""
    assert _FETCHED in output, f"the theme no longer names {_FETCHED}: is this hook still needed?"
    return output.replace(_FETCHED, get_relative_url(_SHIPPED, page.url))
