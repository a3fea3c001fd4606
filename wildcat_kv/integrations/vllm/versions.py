"""Versions of vLLM that the plugin was tested with."""

from __future__ import annotations

# First and last minor release.
_TESTED = ((0, 32), (0, 32))


def check_version(version: str) -> None:
    """Refuse a vLLM that was not tested: connectors and backends are no stable interface of it.

    Args:
        version: version of the installed vLLM.

    Raises:
        ValueError: it is outside of the tested range.
    """
    first, last = _TESTED
    parts = version.split("+")[0].split(".")
    found = tuple(int(part) if part.isdecimal() else -1 for part in parts[:2])
    if not first <= found <= last:
        tested = ".".join(map(str, first)) if first == last else f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
        raise ValueError(
            f"vllm={version} was not tested with this release of wildcat_kv, which knows {tested}; "
            f"pip install 'vllm=={tested}.*'"
        )
