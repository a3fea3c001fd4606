"""The methods of this library: an import and a row for each."""

from __future__ import annotations

from wildcat_kv.compressors.adakv import AdaKV as AdaKV
from wildcat_kv.compressors.attention_matching import AttentionMatching as AttentionMatching
from wildcat_kv.compressors.balancekv import BalanceKV as BalanceKV
from wildcat_kv.compressors.base import Compressor
from wildcat_kv.compressors.compactor import Compactor as Compactor
from wildcat_kv.compressors.criticalkv import CriticalKV as CriticalKV
from wildcat_kv.compressors.cur import CUR as CUR
from wildcat_kv.compressors.expected_attention import ExpectedAttention as ExpectedAttention
from wildcat_kv.compressors.h2o import H2O as H2O
from wildcat_kv.compressors.keydiff import KeyDiff as KeyDiff
from wildcat_kv.compressors.knorm import KNorm as KNorm
from wildcat_kv.compressors.kvzip import KVzip as KVzip
from wildcat_kv.compressors.kvzip_plus import KVzipPlus as KVzipPlus
from wildcat_kv.compressors.lagkv import LagKV as LagKV
from wildcat_kv.compressors.leverage import Leverage as Leverage
from wildcat_kv.compressors.pyramidkv import PyramidKV as PyramidKV
from wildcat_kv.compressors.query_wildcat import QueryWildCat as QueryWildCat
from wildcat_kv.compressors.query_wildcat import RereadingWildCat as RereadingWildCat
from wildcat_kv.compressors.rereading_matching import RereadingMatching as RereadingMatching
from wildcat_kv.compressors.rkv import RKV as RKV
from wildcat_kv.compressors.snapkv import SnapKV as SnapKV
from wildcat_kv.compressors.streaming_llm import StreamingLLM as StreamingLLM
from wildcat_kv.compressors.tova import TOVA as TOVA
from wildcat_kv.compressors.triattention import TriAttention as TriAttention
from wildcat_kv.compressors.uniform import Uniform as Uniform
from wildcat_kv.compressors.wildcat import WildCat as WildCat

OURS: dict[str, type[Compressor]] = {
    "wildcat": WildCat,
    "streaming_llm": StreamingLLM,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "balancekv": BalanceKV,
    "uniform": Uniform,
    "tova": TOVA,
    "h2o": H2O,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "lagkv": LagKV,
    "cur": CUR,
    "leverage": Leverage,
    "compactor": Compactor,
    "rkv": RKV,
    "triattention": TriAttention,
    "adakv": AdaKV,
    "criticalkv": CriticalKV,
    "kvzip": KVzip,
    "kvzip_plus": KVzipPlus,
    "attention_matching": AttentionMatching,
    "rereading_matching": RereadingMatching,
    "query_wildcat": QueryWildCat,
    "rereading_wildcat": RereadingWildCat,
}
