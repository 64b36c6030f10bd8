"""The JSON API. Whatever the page can do, a headless client can do; the schema is at /openapi.json.

POST /api/v1/login -> GET /api/v1/pairs/next -> GET /api/v1/audio/... -> POST /api/v1/votes (Idempotency-Key) -> ...

Whoever comes by an invitation says POST /api/v1/join in place of the first, and has accepted GET /api/v1/consent with that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints

from db import people
from db.choice import renewed_priorities
from db.errors import ConflictError, NotFoundError, RefusedError, ScreenDueError, StoreError, UnavailableError
from db.schema import ASPECTS
from db.store import RaterIdentity, Store
from db.voting import Mark
from feedback_app import consent
from feedback_app.assignment import PairView, next_pair
from feedback_app.auth import COOKIE, SESSION_MAX_AGE_S, JoinCodes, Sessions, SignedIn, same_origin
from feedback_app.guard import Guard
from feedback_app.limits import Limits
from feedback_app.media import Tickets, audio_response
from feedback_app.screen import TONES, TRIALS, Checks

NoNul = r"^[^\x00]*$"
Milliseconds = Annotated[int, Field(ge=0, le=24 * 3600 * 1000)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
AspectName = Annotated[str, Field(min_length=1, max_length=32, pattern=NoNul)]
Code = Annotated[str, Field(min_length=1, max_length=128)]
Event = tuple[Milliseconds, Annotated[str, StringConstraints(max_length=12, pattern=NoNul)], Literal["a", "b"], Milliseconds]

AGREED_MAX = 100_000
"""Sessions whose consent is remembered without asking the database again."""

router = APIRouter(prefix="/api/v1")


class Problem(BaseModel):
    """Every refusal says what was got, what was expected, and what to do."""

    got: str
    expected: str
    remedy: str
    step: Literal["consent", "check"] | None = Field(None, description="what a rater has to do before the next pair, where that is it")


class Credentials(BaseModel):
    handle: str = Field(min_length=1, max_length=64)
    token: str = Field(min_length=1, max_length=128, description="the access code that `add_rater` showed once")


class SessionView(BaseModel):
    session: str = Field(description="send as `Authorization: Bearer <session>`; browsers have it as a cookie")
    handle: str


class Invited(BaseModel):
    invitation: Code = Field(description="the token of the invitation link")


class Joining(Invited):
    handle: str = Field(min_length=1, max_length=64, description="a name of the newcomer's own choice")
    consent_version: str = Field(max_length=32, description="the version of `GET /api/v1/consent` that was read and accepted")


class JoinedView(SessionView):
    access_code: str = Field(description="shown this once; signs in again from anywhere")


class ConsentView(BaseModel):
    version: str
    title: str
    text: list[str] = Field(description="paragraphs, plain text")


class ConsentAnswer(BaseModel):
    version: str = Field(max_length=32)
    accepted: bool = Field(description="false withdraws an earlier yes and ends all sessions; the votes so far stay")


class CheckView(BaseModel):
    number: int = Field(description="this rater's headphone check, counted from 0")
    trials: list[str] = Field(description="addresses of the trials' sound, in order; three tones each, one of them softer")


class ScreenAnswer(BaseModel):
    number: int = Field(ge=0, le=2**31 - 1, description="the check that was taken")
    answers: list[Annotated[int, Field(ge=0, lt=TONES)]] = Field(
        max_length=TRIALS, description="the softest tone of each trial, 0 to 2; empty where the check was left out"
    )


class ScreenView(BaseModel):
    passed: bool
    right: int
    trials: int
    tries: int


class MeView(BaseModel):
    """Who is signed in, what is still to do before the first pair, and what came of the votes."""

    handle: str
    role: str
    consent_due: bool
    screen: ScreenView | None = Field(description="the newest headphone check; null: none yet")
    practised: bool
    votes: int
    snapshots: int = Field(description="frozen snapshots, which models learn from, with votes of this rater")


class Listening(BaseModel):
    a: Milliseconds
    b: Milliseconds


class Coverage(BaseModel):
    a: Share
    b: Share


class MarkView(BaseModel):
    """A stretch of one side, as shown, in which something is wrong."""

    side: Literal["a", "b"]
    t0_ms: Milliseconds
    t1_ms: Milliseconds
    tag: str = Field("bad", min_length=1, max_length=32, pattern=NoNul)


class Ballot(BaseModel):
    assignment_id: str = Field(min_length=1, max_length=32, pattern=r"^[0-9a-f]+$")
    choice: Literal["a", "b", "tie", "both_bad", "skip"]
    listen_ms: Listening = Field(description="time heard of each side, by the player's clock")
    confidence: int | None = Field(None, ge=1, le=3, description="1 guess, 2 fairly sure, 3 sure")
    comment: str | None = Field(None, max_length=2000, pattern=NoNul)
    events: list[Event] = Field([], max_length=500, description="(ms since shown, what, side, playhead ms)")
    aspects: dict[AspectName, Annotated[int, Field(ge=-2, le=2)]] = Field(
        {}, max_length=len(ASPECTS), description="-2 A is much better, 0 alike, 2 B is much better; only what the pair's `aspects` names"
    )
    marks: list[MarkView] = Field([], max_length=100, description="where something is wrong, as shown")
    coverage: Coverage | None = Field(None, description="share of each side that was heard at least once")
    client_ms: int | None = Field(None, ge=0, le=2**53, description="the client's own clock, Unix ms")
    ui_version: str | None = Field(None, max_length=32, pattern=NoNul)


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


@router.post("/login", responses={401: {"model": Problem}, 429: {"model": Problem}})
def login(request: Request, response: Response, credentials: Credentials) -> SessionView:
    """Trades an access code for a session."""
    same_origin(request)
    limits: Limits = request.app.state.limits
    limits.before_sign_in(request, credentials.handle.strip())
    rater = _store(request).sign_in(credentials.handle.strip(), credentials.token.strip())
    if rater is None:
        limits.sign_in_failed(request, credentials.handle.strip())
        remedy = "check both, or ask for a new code"
        raise HTTPException(401, {"got": "an unknown name or code", "expected": "a matching pair", "remedy": remedy})
    return SessionView(session=_open_session(request, response, rater), handle=rater.handle)


def _open_session(request: Request, response: Response, rater: RaterIdentity) -> str:
    sessions: Sessions = request.app.state.sessions
    session = sessions.issue(rater)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, session, SESSION_MAX_AGE_S, path="/", httponly=True, samesite="lax", secure=secure)
    return session


@router.get("/consent")
def consent_page() -> ConsentView:
    """The words to be accepted before joining. Turning them down takes no call, and stores nothing."""
    return ConsentView(version=consent.VERSION, title=consent.TITLE, text=list(consent.TEXT))


@router.post("/invitation", status_code=204, responses={404: {"model": Problem}})
def invitation(request: Request, invited: Invited) -> None:
    """Whether an invitation link is still open. The token travels in the body: addresses end up in logs."""
    same_origin(request)
    people.check_invitation(_store(request), invited.invitation)


@router.post("/join", status_code=201, responses={404: {"model": Problem}, 409: {"model": Problem}})
def join(
    request: Request,
    response: Response,
    joining: Joining,
    idempotency_key: Annotated[str | None, Header(min_length=16, max_length=128, pattern=r"^[\x21-\x7e]+$")] = None,
) -> JoinedView:
    """Makes a rater from an open invitation and an accepted consent page, and signs in.

    With a random Idempotency-Key a lost answer costs nothing: the same key again is answered alike, and spends no place of the link.
    """
    same_origin(request)
    _current_consent(joining.consent_version)
    codes: JoinCodes = request.app.state.join_codes
    access_code = codes.of(joining.invitation, idempotency_key) if idempotency_key else None
    newcomer = people.join(_store(request), joining.invitation, joining.handle.strip(), joining.consent_version, access_code)
    session = _open_session(request, response, newcomer.rater)
    return JoinedView(session=session, handle=newcomer.rater.handle, access_code=newcomer.access_code)


@router.get("/me")
def me(request: Request, response: Response, rater: SignedIn) -> MeView:
    """Who is signed in, and what comes next."""
    response.headers["Cache-Control"] = "no-store"
    found = people.standing(_store(request), rater.id, consent.VERSION, request.app.state.consent_of_everyone)
    return MeView(
        handle=rater.handle,
        role=rater.role,
        consent_due=found.consent_due,
        screen=ScreenView.model_validate(found.screen) if found.screen else None,
        practised=found.practised,
        votes=found.votes,
        snapshots=found.snapshots,
    )


@router.post("/me/invitation", status_code=204, responses={404: {"model": Problem}})
def one_more_invitation(request: Request, invited: Invited, rater: SignedIn) -> None:
    """Lets a rater who has a name already into one more campaign."""
    people.join_as(_store(request), invited.invitation, rater.id)


@router.post("/me/consent", status_code=204)
def answer_consent(request: Request, answer: ConsentAnswer, rater: SignedIn) -> None:
    """Accepts the consent page, or withdraws from it."""
    if answer.accepted:
        _current_consent(answer.version)
    people.record_consent(_store(request), rater.id, answer.version, answer.accepted)


@router.get("/me/screen")
def check(request: Request, rater: SignedIn) -> CheckView:
    """The headphone check that this rater may take now; the same one until it is answered."""
    number = people.screens_taken(_store(request), rater.id)
    return CheckView(number=number, trials=[f"{router.prefix}/me/screen/{number}/{trial}" for trial in range(TRIALS)])


@router.get("/me/screen/{number}/{trial}", response_class=Response, responses={404: {"model": Problem}})
def check_sound(request: Request, number: int, trial: int, rater: SignedIn) -> Response:
    """Three tones as a WAV. Which is the softest is for the ear: nothing else that is sent tells it."""
    if not 0 <= trial < TRIALS or number != people.screens_taken(_store(request), rater.id):
        raise NotFoundError("a trial of no open headphone check", "one of GET /api/v1/me/screen", "begin the check anew")
    checks: Checks = request.app.state.checks
    return Response(checks.sound(rater.id, number, trial), media_type="audio/wav")


@router.post("/me/screen", status_code=201, responses={409: {"model": Problem}, 429: {"model": Problem}})
def screen(request: Request, answer: ScreenAnswer, rater: SignedIn) -> dict[Literal["passed"], bool]:
    """Counts and stores what the headphone check found. It locks nobody out, except of campaigns that want it passed."""
    if len(answer.answers) not in (0, TRIALS):
        raise RefusedError(f"{len(answer.answers)} answers", f"{TRIALS}, or none", "answer each trial, or leave the check out")
    limits: Limits = request.app.state.limits
    limits.check(rater.id)
    checks: Checks = request.app.state.checks
    right = checks.count_right(rater.id, answer.number, answer.answers)
    return {"passed": people.record_screen(_store(request), rater.id, right, len(answer.answers), answer.number)}


@router.post("/me/practice", status_code=204)
def practised(request: Request, rater: SignedIn) -> None:
    """Notes that the rehearsal is over. Its answers stay on the page."""
    people.record_practice(_store(request), rater.id)


def _current_consent(version: str) -> None:
    if version != consent.VERSION:
        raise RefusedError("consent to another version", f"version {consent.VERSION}", "read GET /api/v1/consent again")


def _agreed(request: Request, rater: RaterIdentity) -> None:
    """Raises HTTPException 403 while the consent page is due. A yes is remembered until the session's epoch moves on."""
    agreed: set[tuple[int, int]] = request.app.state.agreed
    key = (rater.id, rater.session_epoch)
    if key in agreed:
        return
    if people.consent_due(_store(request), rater.id, consent.VERSION, request.app.state.consent_of_everyone):
        remedy = "read GET /api/v1/consent, then POST /api/v1/me/consent"
        raise HTTPException(
            403, {"got": "no consent yet", "expected": f"version {consent.VERSION} accepted", "remedy": remedy, "step": "consent"}
        )
    if len(agreed) >= AGREED_MAX:
        agreed.clear()
    agreed.add(key)


@router.post("/logout", status_code=204)
def logout(request: Request, response: Response, rater: SignedIn) -> None:
    """Ends all sessions of this rater."""
    _store(request).end_sessions(rater.id)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")


@router.get(
    "/pairs/next",
    response_model=PairView,
    responses={
        204: {"description": "nothing is left to rate"},
        403: {"model": Problem, "description": "consent, or a passed headphone check, is due"},
    },
)
def pairs_next(request: Request, rater: SignedIn, campaign: Annotated[str | None, Query(max_length=128)] = None) -> Any:
    """The pair to hear now, held for half an hour; the same one until it is answered."""
    _agreed(request, rater)
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
    limits: Limits = request.app.state.limits
    limits.vote(rater.id)
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
        aspects=ballot.aspects,
        marks=[Mark(mark.side, mark.t0_ms, mark.t1_ms, mark.tag) for mark in ballot.marks],
        coverage_a=ballot.coverage.a if ballot.coverage else None,
        coverage_b=ballot.coverage.b if ballot.coverage else None,
        client_ms=ballot.client_ms,
        ui_version=ballot.ui_version,
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


STATUS = {ScreenDueError: 403, NotFoundError: 404, ConflictError: 409, RefusedError: 422, UnavailableError: 503}


def _tell_store_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreError)
    problem = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
    if isinstance(error, ScreenDueError):
        problem["step"] = "check"
    status = STATUS.get(type(error), 422)
    return JSONResponse({"detail": problem}, status, headers={"Retry-After": "1"} if status == 503 else None)


def _tell_invalid(_request: Request, error: Exception) -> JSONResponse:
    """Says which field is wrong and what it should be. What was sent is not repeated: it may be an access code."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    problem = {"got": f"an unfit {place}", "expected": str(first["msg"]), "remedy": "correct it; see /openapi.json"}
    return JSONResponse({"detail": problem}, 422)


def create_api(store: Store, secret: str, consent_of_everyone: bool = False) -> FastAPI:
    """The JSON endpoints over an open store, which the application closes when it ends. `app.py` adds the page.

    Args:
        secret: signs sessions and audio addresses; whoever knows it can be anyone.
        consent_of_everyone: whether raters whom the owner added by hand must accept the consent page too, as those who
            came by invitation must.
    """

    @asynccontextmanager
    async def closing_store(_app: FastAPI) -> AsyncIterator[None]:
        with renewed_priorities(store):
            yield
        store.close()

    app = FastAPI(title="Encore rating API", version="1", docs_url=None, redoc_url=None, lifespan=closing_store)
    app.state.store, app.state.sessions, app.state.tickets = store, Sessions(secret), Tickets(secret)
    app.state.checks, app.state.join_codes = Checks(secret), JoinCodes(secret)
    app.state.consent_of_everyone, app.state.agreed = consent_of_everyone, set()
    app.state.limits = Limits()
    app.include_router(router)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.add_exception_handler(StoreError, _tell_store_error)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_middleware(Guard)
    return app
