"""Parts of ASGI: requests whose body was read, and answers that are held back."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_STREAMED_ERROR = b'data: {"error"'


class HeldAnswer:
    """An answer that is held back until it is known not to fail at once.

    A stream's first piece tells the role alone, and comes together with the second.

    Args:
        send: where the answer goes.

    Attributes:
        failed: True if the answer is an error of the server's, which is still held.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] | None = []
        self.failed = False

    async def __call__(self, message: Message) -> None:
        """Take a part of the answer."""
        if self._held is None:
            await self._send(message)
            return
        self._held.append(message)
        body = message.get("body", b"")
        if message.get("status", 200) >= 500 or body.startswith(_STREAMED_ERROR):
            self.failed = True
        bodies = sum(other["type"] == "http.response.body" for other in self._held)
        if not self.failed and (bodies > 1 or (bodies and not message.get("more_body"))):
            await self.release()

    async def release(self) -> None:
        """Let go of what is held."""
        held, self._held = self._held or [], None
        for message in held:
            await self._send(message)


def header(scope: Scope, name: bytes) -> bytes | None:
    """Give the value of a request's header; None without it."""
    return next((value for other, value in scope["headers"] if other.lower() == name), None)


async def read(receive: Receive) -> bytes | None:
    """Read the body of a request; None if the client hangs up before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def sized(scope: Scope, body: bytes) -> Scope:
    """Give the scope of a request with another body."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, and then what the client sends: that it hangs up, say."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def respond(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a whole answer of JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
