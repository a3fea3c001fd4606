"""Compress the KV cache of a Transformers model into a small weighted coreset (WildCat, arXiv 2602.10056)."""

from wildcat_kv.cache import CompressedCache, WildCatCache
from wildcat_kv.compress import Coreset, compress_kv
from wildcat_kv.config import WildCatConfig
from wildcat_kv.context import Context, compress_context
from wildcat_kv.static import compile_decoding
from wildcat_kv.weighted import weighted_attention

__all__ = [
    "CompressedCache",
    "Context",
    "Coreset",
    "WildCatCache",
    "WildCatConfig",
    "compile_decoding",
    "compress_context",
    "compress_kv",
    "weighted_attention",
]

__version__ = "0.1.0"
