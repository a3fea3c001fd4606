"""Attention of all to all without a cache, approximated: for encoders and generators. Read reference.py first.

base.py, inputs.py, kernels.py   what a method implements, checks of a call, one call of torch's kernel
wildcat.py                       the paper's WILDCAT; fixed_pivots.py its gradients
near_wildcat.py                  ours: metric.py, order.py (tiles), bin_slots.py (samples), near.py (exact bins)
uniform.py, stratified.py, thinformer.py, balancekv.py     methods that keep some keys
performer.py, scatterbrain.py    random features: features.py
reformer.py, kdeformer.py, hyperattention.py               sorted blocks: hashing.py
registry.py                      the methods by name, also those of installed packages
encoders.py, diffusers.py        a method inside a model: use, enable, disable; layers.py, masks.py
calibration.py, comparison.py    a plan for a model's layers, and its check: plan.py, per_head.py

A method is one file. All take (query, key, value) as torch's scaled_dot_product_attention does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wildcat_kv.attention.balancekv import BalanceKV, balance_attention
from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.exact import Exact, exact_attention
from wildcat_kv.attention.hyperattention import HyperAttention, hyper_attention
from wildcat_kv.attention.kdeformer import KDEformer, kdeformer_attention
from wildcat_kv.attention.near_wildcat import NearWildCat, near_wildcat_attention
from wildcat_kv.attention.per_head import PerHead
from wildcat_kv.attention.performer import Performer, performer_attention
from wildcat_kv.attention.plan import LayerPlan, Plan
from wildcat_kv.attention.reformer import Reformer, reformer_attention
from wildcat_kv.attention.registry import AttentionMethod, attention_method, available
from wildcat_kv.attention.scatterbrain import ScatterBrain, scatterbrain_attention
from wildcat_kv.attention.stratified import Stratified, stratified_attention
from wildcat_kv.attention.thinformer import Thinformer, thinformer_attention
from wildcat_kv.attention.uniform import Uniform, uniform_attention
from wildcat_kv.attention.wildcat import WildCatAttention, wildcat_attention

if TYPE_CHECKING:
    from wildcat_kv.attention.calibration import calibrate
    from wildcat_kv.attention.comparison import OutputErrors, compare_outputs
    from wildcat_kv.attention.encoders import attention_layers, disable, enable, use

__all__ = [
    "Attention",
    "AttentionMethod",
    "BalanceKV",
    "Exact",
    "HyperAttention",
    "KDEformer",
    "LayerPlan",
    "NearWildCat",
    "OutputErrors",
    "PerHead",
    "Performer",
    "Plan",
    "Reformer",
    "ScatterBrain",
    "Stratified",
    "Thinformer",
    "Uniform",
    "WildCatAttention",
    "attention_layers",
    "attention_method",
    "available",
    "balance_attention",
    "calibrate",
    "compare_outputs",
    "disable",
    "enable",
    "exact_attention",
    "hyper_attention",
    "kdeformer_attention",
    "near_wildcat_attention",
    "performer_attention",
    "reformer_attention",
    "scatterbrain_attention",
    "stratified_attention",
    "thinformer_attention",
    "uniform_attention",
    "use",
    "wildcat_attention",
]


# These names need Transformers, where the methods need torch alone.
_MODULES = {
    **dict.fromkeys(("attention_layers", "disable", "enable", "use"), "encoders"),
    **dict.fromkeys(("OutputErrors", "compare_outputs"), "comparison"),
    "calibrate": "calibration",
}


def __getattr__(name: str) -> Any:
    """Import what needs Transformers when it is first used."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
