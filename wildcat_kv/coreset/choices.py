"""Names of the rules to choose from.

This module imports no torch, so that settings can be read without it.
"""

from typing import Literal

# The rule of the temperature tau: the constant of the authors' code, or the paper's formula.
Temperature = Literal["released", "theory"]

# The signs of the weights: signed as in the paper, or negative ones set to 0.
Weights = Literal["nystrom", "clipped"]
