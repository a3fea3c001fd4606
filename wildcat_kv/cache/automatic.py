"""Choose the method where none is named: `compressor="auto"`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from wildcat_kv.compressors import Compressor, QueryWildCat, WildCat
from wildcat_kv.compressors.query_wildcat import (
    FittedScorer,
    Profile,
    load_profile,
    load_scorer,
    profile_names,
    scorer_names,
)
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.rope import check_images, rotation_limit, rotations_of


def best_method(
    config: Any, decoder: Any, full: Sequence[int], settings: WildCatConfig, *, static: bool, offloading: bool
) -> tuple[Compressor, dict[int, Rotation]]:
    """Choose the best method that a model and its settings support.

    It is Query WildCat, with the package's profile and scorer of the model, where it has them. The published WildCat
    takes its place where Query WildCat cannot go: fixed shapes; offloading without a profile; positions that are no
    rotation, or one that changes with the text's length; images. It does so too where everything is kept.

    Args:
        config: config that the user gave.
        decoder: Transformers config of the decoder.
        full: indices of the layers that can be compressed.
        settings: budget and exact ends.
        static: True for fixed shapes.
        offloading: True to keep keys and values on the CPU.

    Returns:
        The method, and the rotary positions of each layer, by index; none for a method that needs none.
    """
    published = WildCat.of(settings), dict[int, Rotation]()
    if static or settings.share == 1:
        return published
    method = QueryWildCat.of(settings)
    if method.tolerance is None:
        profile, scorer = shipped_measures(decoder, len(full))
        method = replace(method, profile=profile, scorer=scorer)
    if offloading and method.waits:
        return published
    with suppress(ValueError):
        rotations = rotations_of(decoder, full)
        check_images(config, decoder, rotations)
        if rotation_limit(decoder, rotations) is None:
            return method, rotations
    return published


def shipped_measures(decoder: Any, layers: int) -> tuple[Profile | None, FittedScorer | None]:
    """Find what the package has measured of a model: its profile, and the scorer that belongs to it.

    A profile that was measured with a scorer goes before one that was not.

    Args:
        decoder: Transformers config of the decoder.
        layers: number of its layers that can be compressed.

    Returns:
        The profile, None for a model that was not measured; and the scorer, None where there is none.
    """
    for profile in sorted(map(load_profile, profile_names()), key=lambda profile: profile.scorer is None):
        with suppress(ValueError):
            profile.check_model(decoder, layers)
            scorers = (load_scorer(name) for name in scorer_names()) if profile.scorer else iter(())
            return profile, next((scorer for scorer in scorers if scorer.digest == profile.scorer), None)
    return None, None
