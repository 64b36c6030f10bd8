"""Clips over HTTP: a signed address for one side of one assignment, one rater, one lease, and bytes that tell no more.

Nothing that leaves here names a system, a file or the time at which a clip was made.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import FileResponse
from itsdangerous import BadSignature, URLSafeSerializer

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


def audio_response(audio: AudioFile, token: str) -> FileResponse:
    """The clip, with range requests. Raises HTTPException 410 if the file is gone or is no longer the one registered."""
    path = Path(audio.uri)
    try:
        stat = path.stat()
    except OSError:
        stat = None
    if stat is None or stat.st_size != audio.size_bytes:
        got = "a clip that is missing or was changed after it was registered"
        raise HTTPException(410, {"got": got, "expected": "the registered clip", "remedy": "skip this pair"})
    return FileResponse(
        path,
        stat_result=stat,
        media_type=MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream"),
        headers={
            "Cache-Control": "private, max-age=1800, immutable",
            "X-Content-Type-Options": "nosniff",
            "ETag": f'"{hashlib.sha256(token.encode()).hexdigest()[:32]}"',
            "Last-Modified": LONG_AGO,  # a file's own date would tell one system from another
        },
    )
