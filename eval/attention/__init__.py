"""Evaluation of attention methods, `python -m eval attention FILE`: one layer, or real encoders end to end."""
