"""A middleware of vLLM's HTTP server (`--middleware`) that asks for the server's key on every path.

vLLM's own check covers `/v1`, `/v2`, `/inference` and `/cohere` only: whoever reaches the port could otherwise pause
the engine, replace its weights, or call any method of its workers (`/collective_rpc`). vLLM runs the middleware that is
named last before all others, so this one is named last.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

POLICY_VIOLATION = 1008
"""Status of a websocket that is closed because its opener may not use it."""


class KeyCheck:
    """ASGI middleware. It answers 401 to requests without the key, whatever their method, and opens no websocket."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})


def has_key(scope: Message) -> bool:
    """Whether the request has the server's key, or the server has none."""
    keys = [key for key in scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not keys or any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in keys)
