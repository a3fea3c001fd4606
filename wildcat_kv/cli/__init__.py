"""The command `wildcat-kv`: one file a subcommand."""

from wildcat_kv.cli.app import main, run_app

__all__ = ["main", "run_app"]
