"""The door that folders made by `wildcat-kv custom-generate` import; the code is in `integrations/hub_folder.py`."""

from wildcat_kv.integrations.hub_folder import generate, wildcat_generate, write_folder

__all__ = ["generate", "wildcat_generate", "write_folder"]
