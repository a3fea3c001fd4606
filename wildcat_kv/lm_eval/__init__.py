"""lm-eval's model `wildcat`, and the prompts of its tasks as `eval/` reads them too.

model.py    the model: requests in, answers out
reader.py   reads contexts into compressed caches, generates and scores over them
prompts.py  prompts as token ids, before and after the compression; cut where they are too long
splits.py   where the context of a task's prompt ends and its question begins
options.py  what the model takes, checked before any work
"""
