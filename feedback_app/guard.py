"""Headers that keep the page to itself, and a closed door where Gradio has one that we do not use."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GUARD_HEADERS = {
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'self'"
    ),
    b"referrer-policy": b"same-origin",
    b"x-content-type-options": b"nosniff",
}
"""With these a browser contacts nobody else, and nobody else frames the page."""


class Guard:
    """ASGI middleware: safe headers on every answer, and Gradio's own API (uploads, files, proxy, queue) closed.

    The page needs none of it: it has no events, and it talks to the JSON API alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                missing = [(name, value) for name, value in GUARD_HEADERS.items() if name not in present]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        if path.startswith("/gradio_api"):
            await send_guarded({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send_guarded)
