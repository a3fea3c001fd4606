"""What a cache is made of: method and settings, from arguments, a preset or the model's config.

presets.py   the presets of `configs/`, by name
recipe.py    what was chosen, and what it leaves open
"""
