"""Counts what passes the HTTPS door: requests by status code, bytes of bodies."""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Traffic:
    """An ASGI application around another one; used in one event loop, read from any thread."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.answers: Counter[int] = Counter()
        self.received = self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted_receive() -> Message:
            message = await receive()
            self.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[message["status"]] += 1
            self.sent += len(message.get("body", b""))
            await send(message)

        await self._app(scope, counted_receive, counted_send)
