"""Entry point of lm-eval, and door for older imports.

The code is in `lm_eval/model.py`.
"""

from wildcat_kv.lm_eval.model import WildCatLM

__all__ = ["WildCatLM"]
