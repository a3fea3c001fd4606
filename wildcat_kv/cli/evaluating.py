"""`wildcat-kv lm-eval`."""

from __future__ import annotations

import sys

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, with the model `wildcat` in it; all arguments are lm-eval's."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import wildcat_kv.lm_eval.model  # noqa: F401  # registers itself
    except ImportError as error:
        raise ValueError(f"{error}; install what evaluations need: pip install 'wildcat-kv[eval]'") from None
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
