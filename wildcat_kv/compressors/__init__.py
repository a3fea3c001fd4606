"""Compression methods, one file each, behind one protocol."""

from wildcat_kv.compressors.adakv import AdaKV
from wildcat_kv.compressors.attention_matching import AttentionMatching
from wildcat_kv.compressors.balancekv import BalanceKV
from wildcat_kv.compressors.base import Compressor, KVBlock, SharingCompressor
from wildcat_kv.compressors.cur import CUR
from wildcat_kv.compressors.everything import Everything
from wildcat_kv.compressors.expected_attention import ExpectedAttention
from wildcat_kv.compressors.h2o import H2O
from wildcat_kv.compressors.keydiff import KeyDiff
from wildcat_kv.compressors.knorm import KNorm
from wildcat_kv.compressors.kvzip import KVzip
from wildcat_kv.compressors.lagkv import LagKV
from wildcat_kv.compressors.pyramidkv import PyramidKV
from wildcat_kv.compressors.query_wildcat import QueryWildCat
from wildcat_kv.compressors.registry import Method, available, resolve
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.compressors.snapkv import SnapKV
from wildcat_kv.compressors.streaming_llm import StreamingLLM
from wildcat_kv.compressors.tova import TOVA
from wildcat_kv.compressors.uniform import Uniform
from wildcat_kv.compressors.wildcat import WildCat

__all__ = [
    "CUR",
    "H2O",
    "TOVA",
    "AdaKV",
    "AttentionMatching",
    "BalanceKV",
    "Compressor",
    "Everything",
    "ExpectedAttention",
    "KNorm",
    "KVBlock",
    "KVzip",
    "KeyDiff",
    "LagKV",
    "Method",
    "PyramidKV",
    "QueryWildCat",
    "Scorer",
    "SharingCompressor",
    "SnapKV",
    "StreamingLLM",
    "Uniform",
    "WildCat",
    "available",
    "resolve",
]
