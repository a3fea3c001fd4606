"""The command `wildcat-kv`.

app.py         the command itself, errors in one line
commands.py    the subcommands: options and help, no torch
options.py     options of several subcommands, and how they are read
demo.py, generate.py, chat.py, checking.py, listing.py   what the subcommands do
prompting.py   the questions that are typed in a chat
streaming.py   answers and progress while they come
figures.py, timing.py   remarks on a cache, times of an answer
"""

from wildcat_kv.cli.app import main, run_app

__all__ = ["main", "run_app"]
