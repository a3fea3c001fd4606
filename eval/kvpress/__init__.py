"""The package beside kvpress: the same texts, questions and bytes, each side in its own environment.

    python -m eval.kvpress --reference .venv-parity/bin/python --output runs/kvpress

texts.py     texts and questions, as JSON lines that both sides read
scoring.py   scores and bytes, the same on both sides; needs torch alone
ours.py      caches of this package
theirs.py    kvpress's own pipeline, in its environment, which has another Transformers
budgets.py   which cells of theirs stand beside which of ours
table.py     the tables
"""
