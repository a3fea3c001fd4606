"""Choose method and settings: from arguments, a preset, or a model's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wildcat_kv.compressors import Compressor, QueryWildCat, resolve
from wildcat_kv.compressors.query_wildcat import (
    FittedScorer,
    Profile,
    load_profile,
    load_scorer,
    profile_names,
    scorer_names,
)
from wildcat_kv.compressors.registry import AUTO, check_name
from wildcat_kv.config import BUDGETS, WildCatConfig
from wildcat_kv.hook.keyword import given_argument, given_cache
from wildcat_kv.models.support import decoder_config
from wildcat_kv.recipes.presets import Preset, load_preset
from wildcat_kv.validation import one_line

# The attribute of a Transformers config, and the key in config.json.
SECTION = "wildcat_kv"
VERSION: Literal[1] = 1
DEFAULT_PRESET = "default"


class Section(BaseModel):
    """Section of a model's config about its cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(description="version is 1")
    preset: str | None = Field(None, description="preset is the name of the preset that the settings came from")
    compressor: str = Field(AUTO, description="compressor is the method, a name of `wildcat-kv methods`, or 'auto'")
    profile: str | dict[str, Any] | None = Field(
        None, description="profile is that of query_wildcat: the name of one that the package has, or all of it"
    )
    scorer: str | dict[str, Any] | None = Field(
        None, description="scorer is that of query_wildcat: the name of one that the package has, or all of it"
    )
    settings: WildCatConfig = Field(description="settings are a mapping of fields of WildCatConfig")

    @field_validator("compressor")
    @classmethod
    def _check_method(cls, compressor: str) -> str:
        check_name(compressor)
        return compressor

    @model_validator(mode="after")
    def _check_measured(self) -> Section:
        self.method(self.settings)
        return self

    def method(self, settings: WildCatConfig) -> str | Compressor:
        """Give the method by its name, or with what was measured for its model: a profile, a scorer.

        Args:
            settings: settings that the method goes with.

        Raises:
            ValueError: a profile or a scorer that cannot be read, or one beside another method.
        """
        given = {name: value for name in ("profile", "scorer") if (value := getattr(self, name)) is not None}
        if not given:
            return self.compressor
        named = " and ".join(given)
        if self.compressor == AUTO:
            raise ValueError(f"{named} with compressor='auto', which finds one by itself; name query_wildcat")
        method = resolve(self.compressor, settings)
        if not isinstance(method, QueryWildCat):
            raise ValueError(
                f"{named} with compressor={self.compressor!r}: only query_wildcat has one; leave {named} out"
            )
        return replace(method, **given)


@dataclass(frozen=True)
class Recipe:
    """A method and its settings, for as many caches as are wanted.

    Attributes:
        settings: budget, exact ends and so on.
        compressor: method, or its name.
        preset: name of the preset that it began with, if any.
    """

    settings: WildCatConfig
    compressor: str | Compressor
    preset: str | None = None

    @staticmethod
    def choose(
        config: Any,
        settings: WildCatConfig | None = None,
        *,
        preset: str | Path | Preset | None = None,
        compressor: str | Compressor | None = None,
        **fields: Any,
    ) -> Recipe:
        """Complete the arguments of a user to method and settings.

        Args:
            config: config of the model.
            settings: complete settings; without a preset or fields.
            preset: preset to begin with, by name, file or object. By default the section of `config` that
                `patch_config` wrote; without one, the defaults of `WildCatConfig`, or the preset "default" where no
                budget is given.
            compressor: method, or its name, to take instead of the preset's.
            **fields: fields of `WildCatConfig` to take instead of the preset's. A budget replaces the preset's;
                `max_tokens` removes its `exact_layers` and `min_tokens` too.

        Raises:
            TypeError: config is no Transformers config.
            ValueError: a model that cannot be compressed, settings beside a preset or fields, no such preset, a
                wrong field, or a section that does not fit; the message names the field.
        """
        decoder, method = decoder_config(config), None
        if settings is not None:
            if not isinstance(settings, WildCatConfig):
                raise ValueError(
                    f"settings={settings!r} is no WildCatConfig; give its fields by name, such as ratio=0.25"
                )
            if beside := [*(["preset"] if preset is not None else []), *fields]:
                raise ValueError(
                    f"{', '.join(beside)} given beside settings; leave one or the other out, or change the settings' "
                    "fields by settings.changed(...)"
                )
            return Recipe(settings, AUTO if compressor is None else compressor)
        if preset is None and (section := read_section(config)) is not None:
            base, method = Recipe(section.settings, section.compressor, section.preset), section.method
        elif preset is None and any(fields.get(name) is not None for name in BUDGETS):
            base, fields = Recipe(WildCatConfig(**fields), AUTO), {}
        else:
            warn = not {"exact_layers", "max_tokens"} & fields.keys()
            base = Recipe._of_preset(decoder, DEFAULT_PRESET if preset is None else preset, warn=warn)
        changed = base.settings.changed(**fields) if fields else base.settings
        if compressor is None:
            compressor = base.compressor if method is None else method(changed)
        return Recipe(changed, compressor, base.preset)

    @staticmethod
    def _of_preset(decoder: Any, preset: str | Path | Preset, *, warn: bool) -> Recipe:
        """Take a preset as it is for a model; `warn` if its exact layers were measured for others."""
        loaded, name = (preset, None) if isinstance(preset, Preset) else (load_preset(preset), Path(preset).stem)
        if warn:
            loaded.warn_if_unmeasured(decoder, "object" if isinstance(preset, Preset) else str(preset))
        return Recipe(loaded.settings_for(decoder), loaded.compressor, name)

    def section(self) -> dict[str, Any]:
        """Turn the recipe into plain data, for a model's config.

        Raises:
            ValueError: the method is none, or an object, which a config cannot hold; a profile and a scorer it can.
        """
        name, method, measured = self.compressor, self.compressor, dict[str, Any]()
        if isinstance(method, QueryWildCat):
            if replace(method, profile=None, scorer=None) == QueryWildCat.of(self.settings):
                name = "query_wildcat"
            measured = {"profile": _plain_profile(method.profile), "scorer": _plain_scorer(method.scorer)}
        if not isinstance(name, str):
            raise ValueError(
                f"compressor={self.compressor!r}: a config holds names; give one of `wildcat-kv methods`, and offer a "
                "method of your own under the entry point wildcat_kv.compressors"
            )
        chosen: dict[str, Any] = {"preset": self.preset, "compressor": name, **measured}
        try:
            section = Section(version=VERSION, settings=self.settings, **chosen)
        except ValidationError as error:
            raise ValueError(one_line(error, Section)) from None
        return section.model_dump(mode="json", exclude_none=True)


def _plain_profile(profile: Any) -> str | dict[str, Any] | None:
    """Turn a profile into its name, if the package has it, or into plain data; None stays."""
    if not isinstance(profile, Profile):
        return None
    shipped = (name for name in profile_names() if load_profile(name) == profile)
    return next(shipped, None) or profile.model_dump(mode="json")


def _plain_scorer(scorer: Any) -> str | dict[str, Any] | None:
    """Turn a scorer into its name, if the package has it, or into plain data; None stays."""
    if not isinstance(scorer, FittedScorer):
        return None
    shipped = (name for name in scorer_names() if load_scorer(name) == scorer)
    return next(shipped, None) or scorer.model_dump(mode="json")


def chooses_a_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell if a call of `generate()` chooses its cache itself.

    It does if it names a cache or wants none, and in the calls of an assistant model.

    Args:
        model: model that generates.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    config = given_argument("generation_config", args, kwargs)
    use_cache, implementation = (
        getattr(config, name, None) if kwargs.get(name) is None else kwargs[name]
        for name in ("use_cache", "cache_implementation")
    )
    if use_cache is None:
        use_cache = model.generation_config.use_cache
    named = given_cache(kwargs) is not None or implementation is not None
    return named or use_cache is False or getattr(config, "is_assistant", False)


def read_section(config: Any) -> Section | None:
    """Read the section that `patch_config` wrote into a config.

    Args:
        config: Transformers config of the model.

    Returns:
        The section, or None if the config has none.

    Raises:
        ValueError: an unknown key, a version of a later release, or a wrong type; the message names the field.
    """
    found = getattr(config, SECTION, None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"config.{SECTION}={found!r} must be a mapping; write it with wildcat_kv.patch_config")
    version = found.get("version")
    if isinstance(version, bool):
        raise ValueError(f"config.{SECTION}.version={version}: must be a number, {VERSION}")
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"config.{SECTION} has a name that is no text; write it with wildcat_kv.patch_config")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"config.{SECTION}.version={version}: this release reads {VERSION}; install a newer wildcat_kv, or write "
            "the section anew with wildcat_kv.patch_config(config, preset=...)"
        )
    try:
        return Section.model_validate(found)
    except (ValidationError, TypeError) as error:
        reason = one_line(error, Section) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"config.{SECTION}.{reason}") from None
