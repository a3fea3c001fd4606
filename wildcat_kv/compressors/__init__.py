"""Compression methods, one file each, behind one protocol."""

from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.compressors.uniform import Uniform
from wildcat_kv.compressors.wildcat import WildCat

__all__ = ["Compressor", "KVBlock", "Uniform", "WildCat"]
