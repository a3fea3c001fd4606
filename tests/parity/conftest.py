"""Nothing here is for pytest: `reference.py` needs an environment of its own."""

collect_ignore = ["reference.py"]
