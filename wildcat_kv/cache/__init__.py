"""Compressed caches: what they hold, check, fold and report.

A token's way: `layer.update` -> hook -> `layer.attend` -> `layer.after_attention` -> fold -> storage.

caches.py, contract.py        what the user holds, and what Transformers asks of it; blueprint.py, checks.py refuse
forward.py                    one pass over all layers: announced, masked, folded
layer.py, layer_contract.py   one layer on a token's way, and what Transformers asks of it
state.py                      what a layer holds; progress.py its numbers, query_log.py the queries of a method
folding.py                    planning.py -> blocks.py -> coreset -> refilling.py; rows.py rows of unequal length
storage.py, entries.py        a rectangle of tensors; bands.py, banding.py, packed.py unequal heads, quantised slots;
                              banding_at_once.py the same on devices
one_token.py, opened.py       all bands of a layer together, for one token
budget.py, byte_budget.py     how many entries; value_range.py their box
positions.py, rereading.py, read_check.py   inputs that would be read wrongly
static.py                     fixed shapes, compiled; kernel_way.py decoding on GPUs; joining.py parts in one
window_layer.py               a sliding window that holds no more; sizes.py, error_report.py report; disk/ saves, loads
"""
