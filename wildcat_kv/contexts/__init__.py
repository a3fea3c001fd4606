"""One text, asked often.

compressed_context.py   `compress_context`: read once, compressed, saved, asked
conversation.py         questions with those before them in mind
held_text.py            what both know of a text that a cache holds
context.py              a text read without compression, to compress by several methods
profiling.py            the profile of a model, for Query WildCat; scorer_fitting.py  its fitted scorer
texts.py, prompts.py    the text as tokens, in the model's chat template
reading.py, answering.py, streaming.py   reading and generating with a cache
"""
