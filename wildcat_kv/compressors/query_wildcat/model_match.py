"""Find what was measured on a model: the file by its name, and whether a model is the same by its shape."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wildcat_kv.validation import did_you_mean

# Fields of the decoder's config that tell models apart.
_FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def fingerprint(decoder: Any) -> dict[str, str | int | None]:
    """Describe a decoder by fields of its config."""
    return {field: getattr(decoder, field, None) for field in _FINGERPRINT}


def check_match(match: Mapping[str, str | int | None], decoder: Any, named: str, way_out: str) -> None:
    """Refuse another model than the one that was measured.

    Args:
        match: fields of the decoder's config, and the values that they had.
        decoder: Transformers config of the decoder.
        named: name and value of the argument.
        way_out: way out, for the error.

    Raises:
        ValueError: names the first field that differs.
    """
    for field, measured in match.items():
        if (found := getattr(decoder, field, None)) != measured:
            raise ValueError(f"{named} is of a model with {field}={measured!r}, and this one has {found!r}; {way_out}")


def shipped_names(folder: Path, suffix: str) -> list[str]:
    """List the names of the files in a folder of the package, without their suffix."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def find_file(argument: str, given: object, folder: Path, suffix: str, command: str) -> Path:
    """Find the file that an argument names.

    Args:
        argument: name of the argument.
        given: name of a file in `folder`, or the path of one that ends in `suffix`.
        folder: folder of the package with such files.
        suffix: end of their names.
        command: command that writes such a file.

    Raises:
        TypeError: `given` is neither a name nor a path.
        ValueError: there is no file of that name in `folder`.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{argument}={given!r} is no {argument}; give a name, the path of a {suffix} file, or the fields of one"
        )
    path, names = Path(given), shipped_names(folder, suffix)
    if path.suffix == suffix:
        return path
    if str(given) not in names:
        raise ValueError(
            f"{argument}={str(given)!r}: no such {argument}; {did_you_mean(str(given), names)}there are "
            f"{', '.join(names)}, or give the path of a {suffix} file that `{command}` wrote"
        )
    return folder / f"{given}{suffix}"
