"""Generation with a compressed KV cache: see the README beside this folder. The code is in the package wildcat-kv."""

from wildcat_kv.custom_generate import generate

__all__ = ["generate"]
