"""Compress the KV cache of a Transformers model into a small weighted coreset (WildCat, arXiv 2602.10056)."""

from wildcat_kv.cache.caches import CompressedCache, WildCatCache
from wildcat_kv.cache.error_report import ErrorReport
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

__version__ = "0.1.0"
