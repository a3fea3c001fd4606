"""The cache. A token's way: `caches` -> `layer.update` -> attention -> `layer.after_attention` -> fold -> `storage`.

caches.py        what the user holds
layer.py         Transformers' contract for one layer
state.py         what one layer holds; folding.py puts a coreset in the place of tokens
storage.py       the tensors; budget.py, progress.py, value_range.py, query_log.py
positions.py, rereading.py, read_check.py   inputs that would be read wrongly
static.py        fixed shapes, compiled
joining.py       caches of parts joined into one
sizes.py, error_report.py   what a cache reports
disk/            save, load, inspect
"""
