"""Query-aware WildCat: keep what future queries will attend to, compress the rest with WildCat.

survey.py    what one layer's own queries attend to
sharing.py   layers share the slots by what they found
profile.py   or by what was found once for the model
fitted_scorer.py  weights fitted once for the model; fitted_scores.py  what they make of a layer
model_match.py    which model a profile or a scorer is of
slots.py     items kept as they are, and WildCat's slots beside them
fit.py       weights and values fitted to queries; the error that is left
method.py    QueryWildCat; rereading.py the same after a second reading
"""

from wildcat_kv.compressors.query_wildcat.fitted_scorer import FittedScorer, load_scorer, scorer_names
from wildcat_kv.compressors.query_wildcat.method import QueryWildCat
from wildcat_kv.compressors.query_wildcat.profile import Profile, load_profile, profile_names
from wildcat_kv.compressors.query_wildcat.rereading import RereadingWildCat

__all__ = [
    "FittedScorer",
    "Profile",
    "QueryWildCat",
    "RereadingWildCat",
    "load_profile",
    "load_scorer",
    "profile_names",
    "scorer_names",
]
