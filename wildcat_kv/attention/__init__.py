"""Attention of all tokens to all, approximated: for encoders and generators, which have no cache. Stands on coreset.

base.py        Attention: what a method implements, and what all of them do alike
kernels.py     softmax attention, and attention to weighted keys, in one call of torch's kernel
wildcat.py     the paper's WILDCAT
encoders.py    any method inside a Transformers model: use, enable, disable

A method is one file, and takes (query, key, value) as torch's scaled_dot_product_attention does.
"""

from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.encoders import attention_layers, disable, enable, use
from wildcat_kv.attention.exact import Exact, exact_attention
from wildcat_kv.attention.uniform import Uniform, uniform_attention
from wildcat_kv.attention.wildcat import WildCatAttention, wildcat_attention

__all__ = [
    "Attention",
    "Exact",
    "Uniform",
    "WildCatAttention",
    "attention_layers",
    "disable",
    "enable",
    "exact_attention",
    "uniform_attention",
    "use",
    "wildcat_attention",
]
