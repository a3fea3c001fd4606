"""Checks of a given model: what works with a compressed cache.

A check compares with `DynamicCache`, so what fails with that too is "not applicable". The model is left as it was: its
weights, its mode and the attention of its config.

run.py       `run_checks(model)`: one result a check
checks.py    the checks, and their names
subject.py   the model under test, and what it is asked
compare.py   comparisons, and how a check ends
"""

from wildcat_kv.integrations.model_checks.run import Result, Status, names, run_checks

__all__ = ["Result", "Status", "names", "run_checks"]
