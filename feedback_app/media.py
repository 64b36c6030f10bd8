"""Clips over HTTP: a signed address for one side of one assignment, one rater, one lease, and bytes that tell no more.

Nothing that leaves here names a system, a file or the time at which a clip was made.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass

from fastapi import HTTPException, Response
from fastapi.responses import FileResponse, StreamingResponse
from itsdangerous import BadSignature, URLSafeSerializer

from db import storage
from db.errors import StoreError
from db.store import AudioFile

MEDIA_TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".mp3": "audio/mpeg"}
LONG_AGO = "Thu, 01 Jan 1970 00:00:00 GMT"


@dataclass(frozen=True)
class Ticket:
    """What an audio address stands for."""

    assignment_id: str
    side: str
    rater_id: int
    expires_at: int


class Tickets:
    """Signs and reads audio addresses; one lease always gives the same address, so browsers may cache."""

    def __init__(self, secret: str) -> None:
        self._signer = URLSafeSerializer(secret, salt="encore-audio")

    def sign(self, ticket: Ticket) -> str:
        return str(self._signer.dumps([ticket.assignment_id, ticket.side, ticket.rater_id, ticket.expires_at]))

    def read(self, token: str, rater_id: int) -> Ticket:
        """The ticket behind a token. Raises HTTPException 403: forged, another rater's, or expired."""
        try:
            assignment_id, side, owner_id, expires_at = self._signer.loads(token)
            ticket = Ticket(str(assignment_id), str(side), int(owner_id), int(expires_at))
        except (BadSignature, ValueError, TypeError):
            raise _forbidden("an audio address that was not issued here") from None
        if ticket.rater_id != rater_id:
            raise _forbidden("another rater's audio address")
        if ticket.expires_at < time.time():
            raise _forbidden("an audio address that has expired")
        return ticket


def _forbidden(got: str) -> HTTPException:
    remedy = "ask for the next pair"
    return HTTPException(403, {"got": got, "expected": "one from this rater's own current pair", "remedy": remedy})


def audio_response(audio: AudioFile, token: str, asked: str | None = None) -> Response:
    """The clip, with range requests, from wherever it lies.

    Args: asked: the request's Range header.
    Raises: HTTPException 410 if the file is gone or is no longer the one registered.
    """
    headers = {
        "Cache-Control": "private, max-age=1800, immutable",
        "X-Content-Type-Options": "nosniff",
        "ETag": f'"{hashlib.sha256(token.encode()).hexdigest()[:32]}"',
        "Last-Modified": LONG_AGO,  # a file's own date would tell one system from another
    }
    media_type = MEDIA_TYPES.get(storage.suffix(audio.uri), "application/octet-stream")
    try:
        found = storage.size_bytes(audio.uri)
    except StoreError:
        found = None  # it names the file, which a rater must not learn
    if found != audio.size_bytes:
        got = "a clip that is missing or was changed after it was registered"
        raise HTTPException(410, {"got": got, "expected": "the registered clip", "remedy": "skip this pair"})
    path = storage.local_path(audio.uri)
    if path is not None:
        return FileResponse(path, media_type=media_type, headers=headers)
    headers["Accept-Ranges"] = "bytes"
    part = _one_range(asked, audio.size_bytes)
    if part is None:
        headers["Content-Length"] = str(audio.size_bytes)
        return StreamingResponse(storage.read_bytes(audio.uri), 200, headers, media_type)
    start, stop = part
    if start >= stop:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{audio.size_bytes}"})
    headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{audio.size_bytes}", "Content-Length": str(stop - start)}
    return StreamingResponse(storage.read_bytes(audio.uri, start, stop), 206, headers, media_type)


def _one_range(asked: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, one past the last) of a Range header; an empty range cannot be had; None: the whole (RFC 9110, 14.2).

    Several ranges at once are answered with the whole, as the standard allows.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (asked or "").replace(" ", ""))
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size if int(last) else 0
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size
