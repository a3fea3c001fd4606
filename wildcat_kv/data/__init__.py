"""Fetched once and kept: wheels from PyPI (`downloads.py`), essays with needles in them (`haystack.py`)."""
