"""The command `wildcat-kv`: its subcommands, and errors as one line."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from wildcat_kv import __version__
from wildcat_kv.cli import commands
from wildcat_kv.extras import MissingExtraError

_NAME = "wildcat-kv"

app = typer.Typer(
    help="Compress the KV cache of a language model into a small weighted coreset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{_NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    commands.demo,
    commands.generate,
    commands.chat,
    commands.check,
    commands.size,
    commands.methods,
    commands.presets,
    commands.inspect,
    commands.patch,
    commands.profile,
    commands.fit_scorer,
    commands.export,
    commands.custom_generate,
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(commands.serve)
app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(commands.lm_eval)


def main() -> None:
    """Run the command `wildcat-kv`."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        run_app(app, _NAME)


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command, and print its errors as one line.

    It covers what a person can put right; the exit status is then 1.

    Args:
        app: the command.
        name: the command's name, which begins the line.
    """
    try:
        sys.exit(app(standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MissingExtraError) as error:
        message = str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage, or click's with an older typer
            raise
        message = error.format_message()
        if not message:  # the help has been printed, since no arguments were given
            sys.exit(getattr(error, "exit_code", 2))
        if message.startswith("Got unexpected extra argument"):
            message += "; every value goes behind its option, such as --context report.txt (see --help)"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, without the code it came from."""
    print(f"{_NAME}: {' '.join(str(message).split())}", file=sys.stderr)
