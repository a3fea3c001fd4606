"""Settings of the cache written into a model folder's config.json, and taken out again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from wildcat_kv.cache.blueprint import Blueprint
from wildcat_kv.files import replacing
from wildcat_kv.recipes.recipe import SECTION, Recipe

_CONFIG = "config.json"
_BACKUP = "config.json.before-wildcat-kv"


def patch_folder(folder: str | Path, **choice: Any) -> Recipe:
    """Write settings of the cache into a model folder's config.json, for `enable`.

    The file as it was is kept beside it, as config.json.before-wildcat-kv. A second patch keeps the first backup.
    Transformers reads the section and does nothing with it; see `patch_config`.

    Args:
        folder: a folder that `save_pretrained` wrote, or a snapshot of the Hub.
        **choice: `preset`, `compressor`, `settings` or fields of `WildCatConfig`.

    Returns:
        The method and settings that were written.

    Raises:
        ValueError: no folder of a model, a model that cannot be compressed, or settings that do not fit. The folder
            is left as it was.
        OSError: a folder that cannot be written.
    """
    path = Path(folder) / _CONFIG
    fields = _read(path, folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises of fields that do not fit
        reason = " ".join(str(error).split())
        raise ValueError(f"folder={str(folder)!r}: Transformers cannot read its {_CONFIG}: {reason}") from None
    recipe = Recipe.choose(config, **choice)
    section = recipe.section()
    Blueprint.of(config, recipe.settings, recipe.compressor)
    backup = path.with_name(_BACKUP)
    patched = SECTION in fields and os.path.lexists(backup)
    try:
        if not patched:
            _keep(path, backup)
        _write(path, {**fields, SECTION: section})
    except BaseException:
        if not patched:
            backup.unlink(missing_ok=True)
        raise
    return recipe


def unpatch_folder(folder: str | Path) -> bool:
    """Take back what `patch_folder` did; what others changed in the file since stays.

    Args:
        folder: the model's folder.

    Returns:
        True if the backup was put back, byte for byte and with the section that it had, if it had one. False if
        there is no backup or the file has changed since: then the section alone is taken out.

    Raises:
        ValueError: no folder of a model, or one that is not patched. The folder is left as it was.
        OSError: a folder that cannot be written.
    """
    path = Path(folder) / _CONFIG
    fields, backup = _read(path, folder), path.with_name(_BACKUP)
    if SECTION not in fields and not os.path.lexists(backup):
        raise ValueError(f"folder={str(folder)!r} is not patched: its {_CONFIG} has no {SECTION!r}; nothing to undo")
    if os.path.lexists(backup) and _unpatched(_read(backup, folder)) == _unpatched(fields):
        backup.replace(path)  # byte for byte, and a link where it was one
        return True
    _write(path, _unpatched(fields))
    backup.unlink(missing_ok=True)
    return False


def _keep(path: Path, backup: Path) -> None:
    """Copy the file, or the Hub snapshot's link; replace an older backup."""
    if path.is_symlink():
        backup.unlink(missing_ok=True)
        backup.symlink_to(path.readlink())
    else:
        with replacing(backup) as partial:
            shutil.copy2(path, partial)
        shutil.copymode(path, backup)


def _unpatched(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != SECTION}


def _read(path: Path, folder: str | Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"folder={str(folder)!r} has no {path.name}; give a model's folder, as save_pretrained writes it"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder={str(folder)!r}: its {path.name} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"folder={str(folder)!r}: its {path.name} holds no mapping")
    return fields


def _write(path: Path, fields: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
