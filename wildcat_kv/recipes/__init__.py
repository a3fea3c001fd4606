"""Choice of a cache's method and settings.

presets.py   the presets of `configs/`, by name
recipe.py    method and settings from arguments, a preset, or a model's config
"""
