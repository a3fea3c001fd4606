"""Requests about contexts, made into requests that vLLM's own server understands.

An ASGI middleware between the clients and the server. A request that names a context gets the token ids of its prompt;
all else goes through as it is, and answers are never touched.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from wildcat_kv.integrations.vllm.asgi import (
    App,
    HeldAnswer,
    Message,
    Receive,
    Scope,
    Send,
    again,
    header,
    read,
    respond,
    sized,
)
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.folder import StoredContext
from wildcat_kv.integrations.vllm.prompts import Turns, prompt_ids, question_ids

HEADER = b"x-wildcat-context"
# The key of a request's kv_transfer_params.
FIELD = "context"
LISTING = "/v1/contexts"
_CHAT = "/v1/chat/completions"
_TEXT = "/v1/completions"
_MODELS = "/v1/models"
# Fields of requests that would change or cut the prompt.
_FOREIGN = ("tools", "functions", "chat_template", "documents", "truncate_prompt_tokens", "echo", "suffix")
_FOREIGN_FLAGS = ("continue_final_message",)


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        status: status of HTTP, 4xx.
        message: one sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ContextMiddleware:
    """Serve requests that name a context.

    A name comes as `{"kv_transfer_params": {"context": NAME}}`, as the header `X-WildCat-Context`, or as a system
    message `wildcat_kv context: NAME`. `GET /v1/contexts` lists the contexts.

    Args:
        app: application behind it.
        folder: contexts; by default those that vLLM's own arguments name.
        tokenizer: tokenizer of the model; by default the served model's.
    """

    def __init__(self, app: App, folder: ContextFolder | None = None, tokenizer: Any = None) -> None:
        self.app = app
        self._folder = folder
        self._tokenizer = tokenizer
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"].removeprefix(scope.get("root_path") or ""), scope["method"]
        told, kind = (header(scope, name) for name in (HEADER, b"content-type"))
        if path == LISTING and method == "GET":
            await self._list(scope, receive, send)
        elif method != "POST" or (path not in (_CHAT, _TEXT) and told is None and b"json" not in (kind or b"")):
            await self.app(scope, receive, send)
        elif (body := await read(receive)) is not None:  # otherwise the client has gone
            try:
                await self._handle(scope, receive, send, body, path)
            except RequestError as error:
                await _refuse(send, error.status, str(error))

    async def _handle(self, scope: Scope, receive: Receive, send: Send, body: bytes, path: str) -> None:
        """Handle a request whose body was read.

        Raises:
            RequestError: it names a context, and cannot be served.
        """
        given = _parsed(body)
        name = None if given is None else _named(given, header(scope, HEADER), chat=path == _CHAT)
        if given is None or name is None:
            await self.app(sized(scope, body), again(body, receive), send)
        elif await self._may(scope, send):
            await self._ready(scope)
            await self._ask(scope, receive, send, given, name, path)

    async def _ask(
        self, scope: Scope, receive: Receive, send: Send, given: dict[str, Any], name: str, path: str
    ) -> None:
        """Ask the server behind about a context; once more if the context changes meanwhile.

        Raises:
            RequestError: the context or the request cannot be served.
        """
        for _ in range(2):
            body, asked = await asyncio.to_thread(self._rewritten, given, name, path)
            answer = HeldAnswer(send)
            await self.app(sized(scope, body), again(body, receive), answer)
            if not answer.failed:
                return
            found = await asyncio.to_thread(self._context, name)
            if found.digest == asked:  # for another reason, which the server tells
                await answer.release()
                return
        raise RequestError(409, f"context={name!r} changes while it is asked; ask again")

    def _context(self, name: str) -> StoredContext:
        """Give a context.

        Raises:
            RequestError: it cannot be served.
        """
        assert self._folder is not None
        try:
            return self._folder.get(name)
        except FileNotFoundError as error:
            raise RequestError(404, str(error)) from None
        except (ValueError, OSError) as error:
            raise RequestError(400, " ".join(str(error).split())) from None

    def _rewritten(self, given: dict[str, Any], name: str, path: str) -> tuple[bytes, bytes]:
        """Put the prompt's ids into a request; give its body, and the digest of the context.

        Raises:
            RequestError: the context or the request cannot be served.
        """
        if path not in (_CHAT, _TEXT):
            raise RequestError(400, f"path={path!r} takes no context; ask through {_CHAT}")
        foreign = next((field for field in _FOREIGN if given.get(field) is not None), None)
        foreign = foreign or next((field for field in _FOREIGN_FLAGS if given.get(field)), None)
        if foreign is not None:
            raise RequestError(400, f"{foreign} cannot be given beside a context; leave it out")
        context = self._context(name)
        try:
            following = self._following(given, chat=path == _CHAT)
        except ValueError as error:
            raise RequestError(400, " ".join(str(error).split())) from None
        ids = prompt_ids(context, following)
        changed = dict(given)
        if path == _CHAT:
            # vLLM takes ids from here instead of rendering messages.
            changed["kv_transfer_params"] = {"prompt_token_ids": ids}
        else:
            changed.pop("kv_transfer_params", None)
            changed["prompt"] = ids
        return json.dumps(changed).encode(), context.digest

    def _following(self, given: dict[str, Any], *, chat: bool) -> list[int]:
        """Encode what follows the context.

        Raises:
            ValueError: messages or a prompt that cannot follow one.
        """
        if chat:
            turns = Turns.of(given.get("messages"))
            if turns.others:
                raise ValueError(
                    "a system message cannot be added, since the context was read before it; put it into the question"
                )
            return question_ids(self._tokenizer, turns)
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("prompt about a context must be one text that is not empty")
        return list(self._tokenizer(prompt, add_special_tokens=False).input_ids)

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the list of contexts, to those who may see the list of models."""
        if not await self._may(scope, send):
            return
        await self._ready(scope)
        await respond(send, 200, {"object": "list", "data": await asyncio.to_thread(self._described)})

    def _described(self) -> list[dict[str, Any]]:
        assert self._folder is not None
        found = []
        for name in self._folder.names():
            entry: dict[str, Any] = {"id": name, "object": "context"}
            try:
                header = self._folder.get(name).header
                entry |= {
                    "tokens": header.tokens,
                    "slots": header.slots,
                    "method": header.method,
                    "weighted": header.weighted,
                }
            except (ValueError, OSError) as error:
                entry["error"] = " ".join(str(error).split())
            found.append(entry)
        return found

    async def _may(self, scope: Scope, send: Send) -> bool:
        """Ask the server behind for its list of models; hand over its answer if it refuses, for want of a key say."""
        messages: list[Message] = []

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def kept(message: Message) -> None:
            messages.append(message)

        path = (scope.get("root_path") or "") + _MODELS
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        asked = {**scope, "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        await self.app({**asked, "headers": headers, "state": dict(scope.get("state") or {})}, nothing, kept)
        if messages and messages[0].get("status") == 200:
            return True
        for message in messages:
            await send(message)
        return False

    async def _ready(self, scope: Scope) -> None:
        """Open the folder and the tokenizer at the first request about a context."""
        async with self._lock:
            if self._folder is None or self._tokenizer is None:
                arguments = scope["app"].state.args
                try:
                    self._folder, self._tokenizer = await asyncio.to_thread(_opened, arguments)
                except ValueError as error:
                    raise RequestError(400, str(error)) from None


def _opened(arguments: Any) -> tuple[ContextFolder, Any]:
    """Open what vLLM's arguments name: the folder of contexts, and the tokenizer."""
    from transformers import AutoTokenizer

    from wildcat_kv.integrations.vllm.identity import ServedModel

    transfer = arguments.kv_transfer_config
    extra = transfer.get("kv_connector_extra_config") if isinstance(transfer, dict) else None
    if extra is None and transfer is not None:
        extra = transfer.kv_connector_extra_config
    if not extra or not extra.get("contexts"):
        raise ValueError("the server has no folder of contexts; start it by `wildcat-kv serve`")
    model = ServedModel.of(arguments.model, arguments.revision)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model, revision=arguments.revision)
    return ContextFolder(Path(extra["contexts"]), model, weighted=bool(extra.get("weighted", True))), tokenizer


def _parsed(body: bytes) -> dict[str, Any] | None:
    """Parse a body; None for what is no object, which the server refuses itself."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _named(given: dict[str, Any], told: bytes | None, *, chat: bool) -> str | None:
    """Find the name of the context that a request is about; None for a request about none.

    Raises:
        RequestError: a name that is no text, or different ones.
    """
    names = []
    transfer = given.get("kv_transfer_params")
    if isinstance(transfer, dict) and FIELD in transfer:
        if not isinstance(transfer[FIELD], str):
            raise RequestError(400, "kv_transfer_params.context must be the name of a context")
        names.append(transfer[FIELD])
    if told is not None:
        names.append(told.decode("latin-1").strip())
    if chat:
        try:
            named = Turns.of(given.get("messages")).named
        except ValueError:
            named = None  # said when a context is named in another way; otherwise the server's own affair
        if named is not None:
            names.append(named)
    if len(set(names)) > 1:
        raise RequestError(400, "the request names different contexts; name one")
    return names[0] if names else None


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    await respond(send, status, {"error": {"message": message, "type": kind, "param": FIELD, "code": status}})
