"""Presets: a method and its settings in one YAML file.

The presets of `configs/` are known by their name.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wildcat_kv.config import WildCatConfig
from wildcat_kv.validation import did_you_mean, one_line

# An installed package has the presets inside it; a checkout has them at its top.
_SHIPPED = Path(__file__).parents[1] / "configs"
_FOLDER = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[2] / "configs"


class Family(BaseModel):
    """A preset's changes for one family of models: one architecture and size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="name of the family, for the reader")
    match: dict[str, str | int] = Field(
        min_length=1, description="fields of the decoder's config and the values that they have in this family"
    )
    exact_layers: tuple[Annotated[int, Field(strict=True)], ...] = Field(
        description="layers to leave uncompressed, by their index in the model; -1 is the last"
    )
    measured: str = Field(min_length=1, description="place of the figures that speak for these layers")

    def has(self, decoder: Any) -> bool:
        """Tell if a model belongs to the family.

        Args:
            decoder: Transformers config of the model's decoder.
        """
        return all(getattr(decoder, field, None) == value for field, value in self.match.items())


class Preset(BaseModel):
    """A method with its settings, for everyday use.

    Raises:
        pydantic.ValidationError: a field that is unknown or does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field("", description="description is the use of the preset, in one or two sentences")
    compressor: str = Field("auto", description="compressor is the method, a name of `wildcat-kv methods`, or 'auto'")
    settings: WildCatConfig = Field(description="settings are a mapping of fields of WildCatConfig")
    families: tuple[Family, ...] = Field(
        (), description="families are families of models with changes of their own; the first that matches counts"
    )

    @field_validator("compressor")
    @classmethod
    def _check_method(cls, compressor: str) -> str:
        from wildcat_kv.compressors.registry import check_name  # imports torch; presets can be listed without

        check_name(compressor)
        return compressor

    @model_validator(mode="after")
    def _families_fit(self) -> Preset:
        for family in self.families:
            try:
                self.settings.changed(exact_layers=family.exact_layers)
            except ValueError as error:
                raise ValueError(f"families: {family.name}: {error}") from None
        return self

    def settings_for(self, decoder: Any) -> WildCatConfig:
        """Choose the settings for a model, by its family.

        Args:
            decoder: Transformers config of the model's decoder.
        """
        family = next((family for family in self.families if family.has(decoder)), None)
        return self.settings if family is None else self.settings.changed(exact_layers=family.exact_layers)

    def warn_if_unmeasured(self, decoder: Any, name: str) -> None:
        """Warn if the preset knows exact layers for other models only.

        Args:
            decoder: Transformers config of the model's decoder.
            name: name or file of the preset.
        """
        if self.families and not any(family.has(decoder) for family in self.families):
            known = ", ".join(family.name for family in self.families)
            warnings.warn(
                f"preset={name!r} leaves layers exact that were found by measuring {known}; for this model "
                f"({getattr(decoder, 'model_type', None)}) none are known and all are compressed. Give exact_layers, "
                "or take preset='adaptive', which needs none",
                stacklevel=4,
            )


def preset_names() -> list[str]:
    """List the names of the presets that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped_presets() -> dict[str, dict[str, Any]]:
    """Read the presets of the package as plain fields, by name.

    It imports no torch.
    """
    return {name: yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in preset_names()}


def load_preset(name: str | Path) -> Preset:
    """Load a preset, by its name or from a YAML file.

    Args:
        name: one of `preset_names()`, or the path of a .yaml or .yml file.

    Raises:
        ValueError: there is no such preset, or the file cannot be read, is no mapping, or has a wrong field; one
            line that names the file and the field.

    Example:
        >>> load_preset("published").settings.ratio
        0.25
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"preset={name!r} is no preset; give a name, the path of a .yaml file, or a Preset")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = preset_names()
        if str(name) not in names:
            hint = did_you_mean(str(name), names)
            raise ValueError(
                f"preset={str(name)!r}: no such preset; {hint}there are {', '.join(names)}, or give the path of a "
                ".yaml file"
            )
        path = _FOLDER / f"{name}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"preset={str(path)!r} is no readable YAML file: {reason}") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ValueError(
            f"preset={str(path)!r} must hold a mapping of names, such as 'settings: {{ratio: 0.25}}', and holds "
            f"{str(fields)[:40]!r}"
        )
    try:
        return Preset(**fields)
    except ValidationError as error:
        raise ValueError(f"{path}: {one_line(error, Preset)}") from None
    except TypeError:  # a key of the settings that is no string
        raise ValueError(f"{path}: settings has a name that is no text; put it in quotes or mend it") from None


def preset_schema() -> dict[str, Any]:
    """Make the JSON schema of a preset's file, for editors.

    configs/preset.schema.json is its copy on disk.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Preset.model_json_schema(),
        "title": "wildcat_kv preset",
    }
