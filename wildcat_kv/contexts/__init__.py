"""One text, asked often.

compressed_context.py   `compress_context`: read once, compressed, saved, asked
context.py              a text read without compression, to compress by several methods
texts.py, prompts.py    the text as tokens, in the model's chat template
reading.py, answering.py, streaming.py   reading and generating with a cache
"""
