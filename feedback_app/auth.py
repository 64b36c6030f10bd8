"""Who is asking: signed sessions, and proof that a browser's request came from our own page.

An access code is shown once and stored hashed (`db.store.Store.add_rater`). Signing in trades it for a session: signed,
dated, bound to the rater's `session_epoch`, in a cookie (HttpOnly, SameSite=Lax) or as `Authorization: Bearer`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from itsdangerous import BadSignature, URLSafeTimedSerializer

from base_models.errors import UserError
from db.session import parse_url
from db.store import RaterIdentity, Store

COOKIE = "encore_session"
CLIENT_HEADER = "X-Encore-Client"
SESSION_MAX_AGE_S = 14 * 24 * 3600


class Sessions:
    """Makes and reads sessions. Args: secret: any string nobody else knows."""

    def __init__(self, secret: str) -> None:
        self._signer = URLSafeTimedSerializer(secret, salt="encore-session")

    def issue(self, rater: RaterIdentity) -> str:
        return str(self._signer.dumps([rater.id, rater.session_epoch]))

    def read(self, session: str) -> tuple[int, int] | None:
        """(rater id, session epoch) of a session that is ours and not too old, else None."""
        try:
            rater_id, epoch = self._signer.loads(session, max_age=SESSION_MAX_AGE_S)
            return int(rater_id), int(epoch)
        except (BadSignature, ValueError, TypeError):
            return None


class JoinCodes:
    """Access codes of those who join, drawn from a key of their own: the same call again is given the same code.

    Nobody can tell a code without the server's secret, the invitation and the newcomer's key. Args: secret: as for `Sessions`.
    """

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def of(self, invitation: str, key: str) -> str:
        said = f"encore-join:{hashlib.sha256(invitation.encode('utf-8', 'surrogatepass')).hexdigest()}:{key}"
        return base64.urlsafe_b64encode(hmac.digest(self._key, said.encode(), hashlib.sha256)[:16]).decode().rstrip("=")


def same_origin(request: Request) -> None:
    """Refuses a request that a browser sent from a foreign page. Browsers name the origin of every POST themselves."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    foreign = site not in (None, "same-origin", "none") or (origin is not None and urlsplit(origin).netloc != request.headers.get("host"))
    if foreign:
        raise HTTPException(403, _problem("a request from another site", "the rating page itself", "open that page"))


def signed_in(request: Request) -> RaterIdentity:
    """The rater of this request, by bearer session or cookie.

    A cookie alone is not enough to change anything: that also takes `Origin` (or our own header), checked above.
    Raises: HTTPException 401 without a valid session, 403 for a forged request.
    """
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    by_cookie = scheme.lower() != "bearer"
    session = request.cookies.get(COOKIE, "") if by_cookie else bearer
    if by_cookie and request.method not in ("GET", "HEAD"):
        same_origin(request)
        if "origin" not in request.headers and CLIENT_HEADER not in request.headers:
            expected = f"an Origin or {CLIENT_HEADER} header"
            raise HTTPException(403, _problem("a request of unknown origin", expected, "use the rating page"))
    sessions: Sessions = request.app.state.sessions
    store: Store = request.app.state.store
    claim = sessions.read(session)
    rater = store.rater_in_session(*claim) if claim else None
    if rater is None:
        raise HTTPException(401, _problem("no valid session", "a signed-in rater", "sign in"))
    return rater


SignedIn = Annotated[RaterIdentity, Depends(signed_in)]


def _problem(got: str, expected: str, remedy: str) -> dict[str, str]:
    return {"got": got, "expected": expected, "remedy": remedy}


def secret_path(db_url: str) -> Path:
    """Where the signing secret of a database lies: beside an SQLite file. Raises UserError for a server's URL."""
    url = parse_url(db_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        got = f"{url.render_as_string(hide_password=True)} without a secret file"
        raise UserError(got, "a place to keep the signing secret", "pass --secret-file PATH")
    return Path(url.database).with_suffix(".secret")


def load_or_make_secret(path: Path) -> str:
    """The secret in `path`; made once, readable by its owner alone. Two servers that start together get the same.

    Raises: UserError when the file cannot be read or written, or is too short to be a secret.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)  # fails, and rightly so, if another process was first
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        secret = path.read_text().strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable secret file", "choose another --secret-file") from error
    if len(secret) < 16:
        raise UserError(f"{path} with {len(secret)} characters", "a secret of 16 or more", "delete it to get a new one")
    return secret
