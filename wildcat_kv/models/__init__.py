"""Questions about a Transformers model, and small models to start from.

support.py, modeling_source.py   which models can be compressed
rope.py, probe.py                how a layer rotates its keys
identity.py                      which model a saved cache belongs to
default.py, loading.py           models to try it with, by folder, file or hub id
shipped.py, from_wheels.py       the ones that need no hub
"""

from wildcat_kv.models.default import default_model, default_model_path, load_config, load_model
from wildcat_kv.models.loading import ModelError

__all__ = ["ModelError", "default_model", "default_model_path", "load_config", "load_model"]
