"""Ways in that leave the call of `generate()` alone.

enable.py          `enable(model)`: every call gets a cache
hub_folder.py      `generate(custom_generate=...)`, as a function and as a folder (hub-folder-files/)
model_folder.py    settings written into a model folder's config.json
model_checks/      what `wildcat-kv check` tries on a model
"""
