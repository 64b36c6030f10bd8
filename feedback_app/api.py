"""The JSON API. Whatever the page can do, a headless client can do; the schema is at /openapi.json.

POST /api/v1/login -> GET /api/v1/pairs/next -> GET /api/v1/audio/... -> POST /api/v1/votes (Idempotency-Key) -> ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints

from db.errors import ConflictError, NotFoundError, RefusedError, StoreError, UnavailableError
from db.store import Store
from feedback_app.assignment import PairView, next_pair
from feedback_app.auth import COOKIE, SESSION_MAX_AGE_S, Sessions, SignedIn, same_origin
from feedback_app.guard import Guard
from feedback_app.media import Tickets, audio_response

NoNul = r"^[^\x00]*$"
Milliseconds = Annotated[int, Field(ge=0, le=24 * 3600 * 1000)]
Event = tuple[Milliseconds, Annotated[str, StringConstraints(max_length=12, pattern=NoNul)], Literal["a", "b"], Milliseconds]

router = APIRouter(prefix="/api/v1")


class Problem(BaseModel):
    """Every refusal says what was got, what was expected, and what to do."""

    got: str
    expected: str
    remedy: str


class Credentials(BaseModel):
    handle: str = Field(min_length=1, max_length=64)
    token: str = Field(min_length=1, max_length=128, description="the access code that `add_rater` showed once")


class SessionView(BaseModel):
    session: str = Field(description="send as `Authorization: Bearer <session>`; browsers have it as a cookie")
    handle: str


class Listening(BaseModel):
    a: Milliseconds
    b: Milliseconds


class Ballot(BaseModel):
    assignment_id: str = Field(min_length=1, max_length=32, pattern=r"^[0-9a-f]+$")
    choice: Literal["a", "b", "tie", "both_bad", "skip"]
    listen_ms: Listening = Field(description="time heard of each side, by the player's clock")
    confidence: int | None = Field(None, ge=1, le=3, description="1 guess, 2 fairly sure, 3 sure")
    comment: str | None = Field(None, max_length=2000, pattern=NoNul)
    events: list[Event] = Field([], max_length=500, description="(ms since shown, what, side, playhead ms)")


class ReceiptView(BaseModel):
    """`vote_id` is null for a skip. `choice` is the one that stands: the first, if another was sent before."""

    vote_id: int | None
    duplicate: bool
    choice: str


class CampaignView(BaseModel):
    name: str
    status: str
    pairs: int
    votes: int
    votes_wanted: int
    leases: int
    skips: int
    excluded: dict[str, int] = Field(description="votes kept but not counted, by reason")


class StatsView(BaseModel):
    raters: int
    votes: int
    campaigns: list[CampaignView]


class HealthView(BaseModel):
    ok: bool
    database: str


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


@router.post("/login", responses={401: {"model": Problem}})
def login(request: Request, response: Response, credentials: Credentials) -> SessionView:
    """Trades an access code for a session."""
    same_origin(request)
    rater = _store(request).sign_in(credentials.handle.strip(), credentials.token.strip())
    if rater is None:
        remedy = "check both, or ask for a new code"
        raise HTTPException(401, {"got": "an unknown name or code", "expected": "a matching pair", "remedy": remedy})
    sessions: Sessions = request.app.state.sessions
    session = sessions.issue(rater)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, session, SESSION_MAX_AGE_S, path="/", httponly=True, samesite="lax", secure=secure)
    return SessionView(session=session, handle=rater.handle)


@router.post("/logout", status_code=204)
def logout(request: Request, response: Response, rater: SignedIn) -> None:
    """Ends all sessions of this rater."""
    _store(request).end_sessions(rater.id)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")


@router.get("/pairs/next", response_model=PairView, responses={204: {"description": "nothing is left to rate"}})
def pairs_next(request: Request, rater: SignedIn, campaign: Annotated[str | None, Query(max_length=128)] = None) -> Any:
    """The pair to hear now, held for half an hour; the same one until it is answered."""
    tickets: Tickets = request.app.state.tickets
    view = next_pair(_store(request), tickets, rater, campaign)
    headers = {"Cache-Control": "no-store"}
    if view is None:
        return Response(status_code=204, headers=headers)
    return JSONResponse(view.model_dump(), headers=headers)


@router.get("/audio/{token}", response_class=Response, responses={206: {"description": "part of the clip"}})
def audio(request: Request, token: str, rater: SignedIn) -> Response:
    """The bytes of one side of this rater's pair. Understands ranges."""
    tickets: Tickets = request.app.state.tickets
    ticket = tickets.read(token, rater.id)
    found = _store(request).audio_file(ticket.assignment_id, ticket.side, rater.id)
    return audio_response(found, token, request.headers.get("range"))


@router.post("/votes", status_code=201, response_model=ReceiptView, responses={200: {"model": ReceiptView}})
def votes(
    request: Request,
    response: Response,
    ballot: Ballot,
    rater: SignedIn,
    idempotency_key: Annotated[str, Header(min_length=8, max_length=128, pattern=r"^[\x21-\x7e]+$")],
) -> ReceiptView:
    """Takes a vote; answers once it is on disk. 201: stored now. 200: it already was, and the first one stands."""
    receipt = _store(request).submit_vote(
        rater.id,
        ballot.assignment_id,
        ballot.choice,
        listen_a_ms=ballot.listen_ms.a,
        listen_b_ms=ballot.listen_ms.b,
        idempotency_key=idempotency_key,
        confidence=ballot.confidence,
        comment=ballot.comment,
        events=ballot.events,
    )
    if receipt.duplicate:
        response.status_code = 200
    return ReceiptView(vote_id=receipt.vote_id, duplicate=receipt.duplicate, choice=receipt.choice)


@router.get("/stats")
def stats(request: Request, rater: SignedIn) -> StatsView:
    """Counts by campaign; nothing about what made the clips."""
    return StatsView.model_validate(_store(request).stats(), from_attributes=True)


def healthz(request: Request) -> HealthView:
    """Whether the server and its database answer."""
    _store(request).ping()
    return HealthView(ok=True, database=_store(request).engine.dialect.name)


STATUS = {NotFoundError: 404, ConflictError: 409, RefusedError: 422, UnavailableError: 503}


def _tell_store_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreError)
    problem = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
    status = STATUS.get(type(error), 422)
    return JSONResponse({"detail": problem}, status, headers={"Retry-After": "1"} if status == 503 else None)


def _tell_invalid(_request: Request, error: Exception) -> JSONResponse:
    """Says which field is wrong and what it should be. What was sent is not repeated: it may be an access code."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    problem = {"got": f"an unfit {place}", "expected": str(first["msg"]), "remedy": "correct it; see /openapi.json"}
    return JSONResponse({"detail": problem}, 422)


def create_api(store: Store, secret: str) -> FastAPI:
    """The JSON endpoints over an open store, which the application closes when it ends. `app.py` adds the page.

    Args: secret: signs sessions and audio addresses; whoever knows it can be anyone.
    """

    @asynccontextmanager
    async def closing_store(_app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(title="Encore rating API", version="1", docs_url=None, redoc_url=None, lifespan=closing_store)
    app.state.store, app.state.sessions, app.state.tickets = store, Sessions(secret), Tickets(secret)
    app.include_router(router)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.add_exception_handler(StoreError, _tell_store_error)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_middleware(Guard)
    return app
