"""Options of the model, checked before any work."""

from __future__ import annotations

from typing import Any

from wildcat_kv.compressors import available
from wildcat_kv.compressors.registry import AUTO, Method
from wildcat_kv.config import WildCatConfig

EXACT = "exact"
# Options of lm-eval's `hf` that change how it computes or what it answers, and that are not followed here.
_REFUSED = ("think_end_token", "mixed_precision_dtype", "softmax_dtype", "truncation")


def reads_twice(compressor: str) -> bool:
    """Tell whether the method of this name reads a text twice; "exact" and "auto" do not."""
    return compressor not in (EXACT, AUTO) and _method(compressor).reads_twice


def check_rolling(method: str) -> None:
    """Refuse a method that cannot compress a text while it reads on.

    Args:
        method: known name.

    Raises:
        ValueError: it reads a text twice, or compresses nothing after the prompt.
    """
    if reads_twice(method):
        raise ValueError(f"method={method!r} reads a text twice: it has no likelihood of a text read once")
    if method not in (EXACT, AUTO) and not _method(method).decodes:
        raise ValueError(f"method={method!r} compresses nothing after a prompt: it has no likelihood of a whole text")


def settings_of(method: str, given: dict[str, Any]) -> WildCatConfig | None:
    """Make the settings of a method; None for the exact cache.

    Args:
        method: name, or "exact".
        given: fields of `WildCatConfig`.

    Raises:
        ValueError: an unknown method, or a wrong field.
    """
    names = [known.name for known in available()]
    if method not in (EXACT, AUTO, *names):
        raise ValueError(f"method={method!r}: there are {EXACT}, {AUTO}, {', '.join(names)}")
    if method != EXACT:
        return WildCatConfig(**given)
    if given:
        raise ValueError(f"{next(iter(given))}={next(iter(given.values()))!r}: method='{EXACT}' compresses nothing")
    return None


def check(method: str, protocol: str, chunk: int, batch_size: int | str | None, options: dict[str, Any]) -> None:
    """Refuse options that cannot be followed.

    Args:
        method: known name.
        protocol: name of the protocol.
        chunk: tokens of a rolling likelihood read at once.
        batch_size: prompts at once.
        options: options of lm-eval's `hf`.

    Raises:
        ValueError: names the option, its value and what it takes.
    """
    if protocol not in ("context-only", "full-prompt"):
        raise ValueError(f"protocol={protocol!r} must be context-only or full-prompt")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a number of tokens, at least 1")
    rows = str(1 if batch_size is None else batch_size)
    if not rows.isdigit() or not int(rows):
        raise ValueError(
            f"batch_size={batch_size!r} must be a number, at least 1; how much fits depends on what is compressed"
        )
    if reads_twice(method) and int(rows) > 1:
        raise ValueError(f"batch_size={batch_size}: method={method!r} repeats each text by itself; use batch_size=1")
    refused = next((name for name in _REFUSED if options.get(name) not in (None, False)), None)
    if refused:
        raise ValueError(f"{refused}={options[refused]!r} is an option of lm-eval's hf that is not followed here")


def _method(name: str) -> Method:
    return next(known for known in available() if known.name == name)
