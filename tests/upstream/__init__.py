"""Transformers' own tests, run with a WildCatCache in the place of every DynamicCache. See `__main__`."""
