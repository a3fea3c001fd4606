"""Presets: a method and its settings as one YAML file. Those of `configs/` go by their name."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wildcat_kv.config import WildCatConfig
from wildcat_kv.validation import one_line

# Shipped beside this file; in a checkout they are at its top.
_SHIPPED = Path(__file__).parents[1] / "configs"
_FOLDER = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[2] / "configs"


class Family(BaseModel):
    """What a preset does otherwise with the models of one family: those of one architecture and size.

    Args:
        name: of the family, for the reader.
        match: fields of the decoder's config and the values that they have in this family.
        exact_layers: layers to leave uncompressed, by their index in the model; -1 is the last.
        measured: where the figures are that speak for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="of the family, for the reader")
    match: dict[str, str | int] = Field(
        min_length=1, description="fields of the decoder's config and the values that they have in this family"
    )
    exact_layers: tuple[Annotated[int, Field(strict=True)], ...] = Field(
        description="layers to leave uncompressed, by their index in the model; -1 is the last"
    )
    measured: str = Field(min_length=1, description="where the figures are that speak for it")

    def has(self, decoder: Any) -> bool:
        """Whether a model is one of the family, by the Transformers config of its decoder."""
        return all(getattr(decoder, field, None) == value for field, value in self.match.items())


class Preset(BaseModel):
    """A method with its settings, for everyday use.

    Args:
        description: what it is good for, one or two sentences.
        compressor: the method, a name of `wildcat-kv methods`.
        settings: budget, exact ends and so on.
        families: what is otherwise with some models; the first that matches counts.

    Raises:
        pydantic.ValidationError: a field that is unknown or does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field("", description="what it is good for, one or two sentences")
    compressor: str = Field("wildcat", description="compressor is the method, a name of `wildcat-kv methods`")
    settings: WildCatConfig = Field(description="budget, exact ends and so on")
    families: tuple[Family, ...] = Field(
        (), description="what is otherwise with some models; the first that matches counts"
    )

    @field_validator("compressor")
    @classmethod
    def _is_a_method(cls, compressor: str) -> str:
        from wildcat_kv.compressors import resolve  # imports torch; presets can be listed without

        resolve(compressor, WildCatConfig(ratio=1.0))
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
        """The settings for a model, by the Transformers config of its decoder."""
        family = next((family for family in self.families if family.has(decoder)), None)
        return self.settings if family is None else self.settings.changed(exact_layers=family.exact_layers)

    def warn_if_unmeasured(self, decoder: Any, name: str) -> None:
        """Warn that no layers stay exact, where the preset has them for other models only.

        Args:
            decoder: the Transformers config of the model's decoder.
            name: the preset's name or file.
        """
        if self.families and not any(family.has(decoder) for family in self.families):
            known = ", ".join(family.name for family in self.families)
            warnings.warn(
                f"preset={name!r} leaves layers exact that were found by measuring {known}; for this model "
                f"({getattr(decoder, 'model_type', None)}) none are known and all are compressed. Give exact_layers, "
                "or take preset='adaptive', which needs none",
                stacklevel=3,
            )


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped_presets() -> dict[str, dict[str, Any]]:
    """Read the presets of the package as plain fields, by name. Imports no torch."""
    return {name: yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in preset_names()}


def load_preset(name: str | Path) -> Preset:
    """A preset by its name, or from a YAML file.

    Args:
        name: one of `preset_names()`, or the path of a file, which ends in .yaml or .yml.

    Raises:
        ValueError: there is no such preset, or the file cannot be read, is no mapping, or has a wrong field; one
            line that names the file and the field.

    Example:
        >>> load_preset("published").settings.ratio
        0.25
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = preset_names()
        if str(name) not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
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
    except TypeError:  # of the settings' own fields
        raise ValueError(f"{path}: settings has a name that is no text; put it in quotes or mend it") from None


def preset_schema() -> dict[str, Any]:
    """The JSON schema of a preset's file, for editors; configs/preset.schema.json is its copy on disk."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Preset.model_json_schema(),
        "title": "wildcat_kv preset",
    }
