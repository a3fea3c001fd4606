"""Compress a Transformers model's KV cache into a small weighted coreset.

This is WildCat, arXiv 2602.10056.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wildcat_kv.cache.caches import CompressedCache, WildCatCache
    from wildcat_kv.cache.error_report import ErrorReport
    from wildcat_kv.cache.forecast import cache_size
    from wildcat_kv.cache.joining import join_caches
    from wildcat_kv.cache.static import compile_decoding
    from wildcat_kv.config import WildCatConfig
    from wildcat_kv.contexts.compressed_context import CompressedContext, compress_context
    from wildcat_kv.contexts.context import Context
    from wildcat_kv.coreset.compresskv import Coreset, compress_kv
    from wildcat_kv.coreset.wtdattn import weighted_attention
    from wildcat_kv.integrations.enable import disable, enable, patch_config
    from wildcat_kv.integrations.hub_folder import wildcat_generate
    from wildcat_kv.recipes.presets import Preset, load_preset, preset_names

__all__ = [
    "CompressedCache",
    "CompressedContext",
    "Context",
    "Coreset",
    "ErrorReport",
    "Preset",
    "WildCatCache",
    "WildCatConfig",
    "cache_size",
    "compile_decoding",
    "compress_context",
    "compress_kv",
    "disable",
    "enable",
    "join_caches",
    "load_preset",
    "patch_config",
    "preset_names",
    "weighted_attention",
    "wildcat_generate",
]

__version__ = "0.2.0"

# Each public name and its module, imported at first use: torch and Transformers take seconds (PEP 562).
_MODULES = {
    "CompressedCache": "cache.caches",
    "CompressedContext": "contexts.compressed_context",
    "Context": "contexts.context",
    "Coreset": "coreset.compresskv",
    "ErrorReport": "cache.error_report",
    "Preset": "recipes.presets",
    "WildCatCache": "cache.caches",
    "WildCatConfig": "config",
    "cache_size": "cache.forecast",
    "compile_decoding": "cache.static",
    "compress_context": "contexts.compressed_context",
    "compress_kv": "coreset.compresskv",
    "disable": "integrations.enable",
    "enable": "integrations.enable",
    "join_caches": "cache.joining",
    "load_preset": "recipes.presets",
    "patch_config": "integrations.enable",
    "preset_names": "recipes.presets",
    "weighted_attention": "coreset.wtdattn",
    "wildcat_generate": "integrations.hub_folder",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when first used."""
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
