"""Compression methods, one file each, behind one protocol.

base.py          what a method implements (Compressor), is given (KVBlock) and returns (Compressed)
scorer.py        Scorer: give every token a score; knorm.py is a whole method in 30 lines
ours.py          the methods by name; registry.py finds those of installed packages too
observation.py, repetition.py, rotation.py, keyed_noise.py, fitting.py, output_norms.py   what methods share
over_scorer.py   what methods over the scores of another share
describe.py      a method as plain data

A method is a file here, a row in ours.py, and a row in tests/compressors/definitions.py.
"""

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock, SharingCompressor
from wildcat_kv.compressors.everything import Everything
from wildcat_kv.compressors.keyed_noise import keyed_noise
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.ours import *  # noqa: F403
from wildcat_kv.compressors.ours import OURS
from wildcat_kv.compressors.registry import Method, available, resolve
from wildcat_kv.compressors.repetition import Repetition
from wildcat_kv.compressors.scorer import Scorer, attention_probabilities
from wildcat_kv.coreset.tensors import take_columns

__all__ = [
    "Compressed",
    "Compressor",
    "Everything",
    "KVBlock",
    "Method",
    "Observation",
    "Repetition",
    "Scorer",
    "SharingCompressor",
    "attention_probabilities",
    "available",
    "keyed_noise",
    "resolve",
    "take_columns",
    *(kind.__name__ for kind in OURS.values()),
]
