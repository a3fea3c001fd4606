"""The command `wildcat-kv` and its subcommands."""

from __future__ import annotations

import logging
import sys

import typer

from wildcat_kv.cli.chat import chat
from wildcat_kv.cli.checking import check
from wildcat_kv.cli.demo import demo
from wildcat_kv.cli.evaluating import lm_eval
from wildcat_kv.cli.folders import custom_generate, patch
from wildcat_kv.cli.generate import generate
from wildcat_kv.cli.listing import inspect, methods, presets

app = typer.Typer(
    help="Compress the KV cache of a language model into a small weighted coreset.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, chat, check, methods, presets, inspect, patch):
    app.command()(command)
app.command(name="custom-generate")(custom_generate)
app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)


def main() -> None:
    """The command's entry point."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    run_app(app, "wildcat-kv")


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command; what a person can put right is one line on stderr and exit status 1."""
    try:
        sys.exit(app(standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's, or click's with an older typer
        if usage is None and not isinstance(error, (ValueError, RuntimeError, OSError)):
            raise
        message = usage() if usage is not None else str(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
