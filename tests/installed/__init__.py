"""Checks of a release: `make dist` runs them.

contents.py   what the sdist and the wheel hold
smoke.py      the wheel at work, in an environment that has nothing else
"""
