"""lm-eval's model `wildcat`: `model.py`; `splits.py` tells context from question in a prompt."""
