"""The door that lm-eval's entry point and older imports use; the code is in `lm_eval/model.py`."""

from wildcat_kv.lm_eval.model import WildCatLM

__all__ = ["WildCatLM"]
