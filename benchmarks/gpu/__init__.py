"""Measure time, memory and correctness of a GPU within a few minutes: `python -m benchmarks gpu`.

command.py      the command and its options
shapes.py       the models, by shape; how long texts and batches are
lab.py          the device, the clock, models and caches that several cases share
plan.py         all cases, in the order in which they are worth having
run.py          one case after the other until time runs out, written as it goes
correctness.py  caches and attention beside references
prefill.py, decoding.py, compiled.py, batches.py     with a model
graphed.py      a compiled step as one CUDA graph
layers.py, kernels.py    one layer alone: attention of a token, folds; and attention of all to all
figures.py      goals, ratios and the figure of a whole model
report.py, plots.py     Markdown and plots of the JSON
"""
