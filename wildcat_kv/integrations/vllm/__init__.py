"""Compressed contexts served by vLLM. Only connector, backend, plugin and serve import vLLM.

export.py          a compressed context to a folder that vLLM can load; entries, positions, folding are its steps
folder.py          the folder's format; contexts.py finds folders by name and by digest; identity.py compares models
placeholders.py    token ids that stand for a context in a prompt
prompts.py         messages about a context to token ids; middleware.py does so for requests over HTTP (asgi.py)
heads.py           heads of one process of several
plugin.py          entry point of vLLM: registers connector.py, and backend.py where weights ride in value channels
serve.py           the command `wildcat-kv serve`
"""
