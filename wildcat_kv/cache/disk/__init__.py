"""Caches on disk: one safetensors file each.

saved.py             what a cache hands over and is restored from
format.py            the header, the version, the names of the tensors
write.py, read.py    from plain data to a file, and back
wildcat_layers.py, foreign_layers.py   the layers of a file, checked
inspection.py        what a file holds, without the model
"""
