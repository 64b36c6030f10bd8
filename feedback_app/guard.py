"""Headers that keep the page to itself, and a closed door where Gradio has one that we do not use."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GUARD_HEADERS = {
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; connect-src 'self'; media-src 'self' blob:; object-src 'none'; "
        b"form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
    ),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), display-capture=(), geolocation=(), microphone=(), midi=(), payment=(), usb=()",
    b"referrer-policy": b"same-origin",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}
"""With these a browser contacts nobody else, and nobody else frames the page or embeds its answers."""
HSTS = (b"strict-transport-security", b"max-age=31536000")
"""Only behind https: said over plain http it means nothing."""
MAX_BODY = 1024 * 1024
"""Bytes that a request may bring: a vote with 500 events is a tenth of it, and nothing is uploaded here."""
TOO_LARGE = b'{"detail":{"got":"a request of more than 1 MiB","expected":"a vote or a setting","remedy":"send less"}}'


class Guard:
    """ASGI middleware: safe headers on every answer, JSON never cached, large bodies refused, and Gradio's own API (uploads,
    files, proxy, queue) closed below every page.

    The pages need none of it: they have no events, and they talk to the JSON API alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                wanted = list(GUARD_HEADERS.items())
                if path.startswith("/api/"):
                    wanted.append((b"cache-control", b"no-store"))
                if scope["scheme"] == "https":
                    wanted.append(HSTS)
                message["headers"] = [*message["headers"], *(header for header in wanted if header[0] not in present)]
            await send(message)

        if "/gradio_api" in path:
            await _answer(send_guarded, 404, b"")
            return
        left = MAX_BODY

        async def receive_guarded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLargeError
            return message

        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > MAX_BODY:
            await _answer(send_guarded, 413, TOO_LARGE)
            return
        try:
            await self.app(scope, receive_guarded, send_guarded)
        except _TooLargeError:  # a body that came in pieces and never said how long it would be
            if not started:
                await _answer(send_guarded, 413, TOO_LARGE)


class _TooLargeError(Exception):
    """More bytes than any request of ours needs."""


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
