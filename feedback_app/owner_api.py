"""The owner's JSON API, under /api/v1/owner: whatever the owner's page can do, a headless client can do.

Every endpoint takes the role `owner`. All owners of one server see all its campaigns; the audit tells who did what.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field, StringConstraints
from starlette.background import BackgroundTask

from base_models.errors import UserError
from db import owners, storage
from db.campaigns import CampaignSummary, Rules
from db.errors import NotFoundError, RefusedError
from db.export import export_snapshot
from db.leaderboard import leaderboard, tags
from db.quality import qualities
from db.store import RaterIdentity, Store
from feedback_app.api import Problem
from feedback_app.auth import SignedIn
from feedback_app.campaigns import Progress, Source, fill_campaign
from feedback_app.fills import Fill, Fills
from feedback_app.limits import Limits

Id = Annotated[int, InPath(ge=1, le=2**31 - 1)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
SnapshotName = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
Status = Literal["open", "paused", "closed"]
ANSWER_WITHIN_S = 3.0
"""A campaign that is made sooner is answered with 201 and what was made, another with 202 and where it stands."""


@dataclass(frozen=True)
class Premises:
    """What the server lets an owner touch. `roots`: where clips may lie. `state_dir`: gold clips and snapshots go there."""

    roots: tuple[str, ...] = ()
    state_dir: Path | None = None

    def find(self, address: str) -> str:
        """The address of a file or folder below one of the roots. Raises RefusedError for any other."""
        for root in self.roots:
            prefix = root.rstrip("/") + "/"
            name = address.removeprefix(prefix) if address != root else "."
            found = storage.inside(root, name)
            if found is not None and (storage.is_file(found) or storage.is_folder(found)):
                return found
        got = f"{address!r}, which lies below none of the server's data roots"
        remedy = "copy it there, or start the server with --data-root"
        raise RefusedError(got, f"a path below {', '.join(self.roots) or 'a --data-root (none was given)'}", remedy)

    def state(self) -> Path:
        """Raises RefusedError where there is none."""
        if self.state_dir is None:
            raise RefusedError("a server without a folder of its own", "a place for files", "start it with --state-dir DIR")
        return self.state_dir


class RulesView(BaseModel):
    target_votes: int = Field(3, ge=1, le=1000)
    min_listen_ms: int = Field(3000, ge=0, le=600_000)
    chooser: Literal["least_voted", "random", "informative"] = "least_voted"
    random_floor: float = Field(0.2, gt=0, le=1, allow_inf_nan=False)
    gold_rate: float = Field(0.0, ge=0, le=0.5, allow_inf_nan=False)
    repeat_rate: float = Field(0.0, ge=0, le=0.5, allow_inf_nan=False)
    aspects: list[Literal["prompt_fit", "musicality", "sound_quality"]] = Field([], max_length=3)
    invited_only: bool = False
    practice: bool = False
    require_screen: bool = Field(False, description="only raters who passed the headphone check are handed its pairs")


class RulesChange(BaseModel):
    """What is left out stays as it is."""

    target_votes: int | None = Field(None, ge=1, le=1000)
    min_listen_ms: int | None = Field(None, ge=0, le=600_000)
    chooser: Literal["least_voted", "random", "informative"] | None = None
    random_floor: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    gold_rate: float | None = Field(None, ge=0, le=0.5, allow_inf_nan=False)
    repeat_rate: float | None = Field(None, ge=0, le=0.5, allow_inf_nan=False)
    aspects: list[Literal["prompt_fit", "musicality", "sound_quality"]] | None = Field(None, max_length=3)
    invited_only: bool | None = None
    practice: bool | None = None
    require_screen: bool | None = None


class SourceView(BaseModel):
    path: Text = Field(min_length=1, max_length=1000, description="manifest.jsonl or a folder, on the server, below a data root")
    system: Text | None = Field(None, max_length=128, description="the name its clips are compared under, over what its rows say")


class NewCampaign(BaseModel):
    name: Text = Field(min_length=1, max_length=128)
    sources: list[SourceView] = Field(min_length=1, max_length=2, description="one, or two systems, paired by prompt")
    rules: RulesView = Field(default_factory=lambda: RulesView.model_validate({}))
    every_pair: bool = Field(False, description="compare every two clips of a prompt, not each clip once")
    n_gold: int = Field(0, ge=0, le=1000, description="gold pairs to make by spoiling clips")


class FilledView(BaseModel):
    name: str
    n_clips: int
    n_pairs: int
    n_new_pairs: int
    n_gold: int
    n_named: int = Field(description="pairs that had one name on both sides, or no vote, and have the names of this call now")


class OwnedCampaign(BaseModel):
    id: int
    name: str
    status: str
    rules: RulesView
    created_at: datetime
    n_pairs: int
    n_gold: int
    votes: int
    votes_wanted: int
    leases: int
    skips: int
    excluded: dict[str, int] = Field(description="votes kept but not counted, by reason")


class FillView(BaseModel):
    """A campaign in the making; it is stored whole, at the end."""

    id: int
    name: str
    state: Literal["waiting", "running", "done", "failed"]
    stage: str = Field(description="what is being done")
    done: int
    total: int
    made: FilledView | None = None
    problem: Problem | None = Field(None, description="why it failed; nothing was stored then")


class HouseView(BaseModel):
    """All that the owner's first page shows."""

    handle: str
    roots: list[str]
    campaigns: list[OwnedCampaign]
    fills: list[FillView] = Field(description="campaigns made since this server started, newest first")


class StatusChange(BaseModel):
    status: Status


class StandingView(BaseModel):
    system: str
    strength: float = Field(description="nats of Davidson's model, mean 0")
    ci: tuple[float, float] | None = Field(description="95 %, clustered by rater")
    n_votes: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    separate: bool | None = Field(description="whether it can be told from the next one")
    votes_needed: int | None


class AgreementView(BaseModel):
    rate: float
    n: int
    ceiling: float = Field(description="the best accuracy a reward model can reach against single votes")
    ci: tuple[float, float]


class QualityView(BaseModel):
    rater_id: int
    handle: str
    status: str
    n_votes: int
    gold_accuracy: float | None
    repeat_agreement: float | None
    left_share: float | None
    coverage: float | None
    reliability: float | None


class ResultsView(BaseModel):
    """A campaign's board; `wins[i][j]`: votes for standing i over standing j. Sides are turned back."""

    standings: list[StandingView]
    wins: list[list[int]]
    ties: list[list[int]]
    n_votes: int
    n_raters: int
    excluded: dict[str, int] = Field(description="votes kept but not counted, by reason")
    side_bias: float | None
    connected: bool
    votes_by_day: list[tuple[str, int]]
    agreement: AgreementView | None
    alpha: float | None = Field(description="Krippendorff's alpha")
    raters: list[QualityView]
    tags: list[str]


class NewInvitation(BaseModel):
    campaign_id: int | None = Field(None, ge=1, le=2**31 - 1, description="null: to all campaigns that are open to everybody")
    max_uses: int = Field(1, ge=1, le=owners.MAX_INVITED)
    expires_in_h: float = Field(24.0 * 14, gt=0, le=24 * owners.MAX_INVITATION_DAYS, allow_inf_nan=False)
    note: Text | None = Field(None, max_length=500)


class MadeInvitation(BaseModel):
    token: str = Field(description="shown this once; the link is the rating page's address with `#invite=<token>`")


class InvitationView(BaseModel):
    id: int
    campaign: str | None
    note: str | None
    n_used: int
    max_uses: int
    expires_at: datetime


class RaterView(BaseModel):
    id: int
    handle: str
    role: str
    status: str
    votes: int
    created_at: datetime


class Erasure(BaseModel):
    votes: Literal["anonymise", "remove"] = "anonymise"


class TrainedView(BaseModel):
    name: str
    sha256: str
    n_votes: int


class ErasedView(BaseModel):
    snapshots: list[TrainedView] = Field(description="frozen snapshots with this person's votes, which cannot be taken back")


class AuditView(BaseModel):
    at: datetime
    actor: str | None = Field(description="null: the command line on the server")
    action: str
    detail: dict[str, Any]


class SnapshotView(BaseModel):
    """A snapshot made on this server; all but the name is null where its snapshot.json cannot be read."""

    name: str
    campaign: str | None = None
    sha256: str | None = None
    n_votes: int | None = None
    created_at: datetime | None = None


class NewSnapshot(BaseModel):
    name: SnapshotName


def owner_signed_in(request: Request, rater: SignedIn) -> RaterIdentity:
    """The owner of this request. Raises HTTPException 403 for a rater, 429 after too many changes."""
    if rater.role != "owner":
        raise HTTPException(403, {"got": "a rater", "expected": "an owner", "remedy": "sign in as an owner"})
    if request.method not in ("GET", "HEAD"):
        limits: Limits = request.app.state.limits
        limits.change(rater.id)
    return rater


Owner = Annotated[RaterIdentity, Depends(owner_signed_in)]
router = APIRouter(
    prefix="/api/v1/owner",
    responses={401: {"model": Problem}, 403: {"model": Problem}, 404: {"model": Problem}, 422: {"model": Problem}, 429: {"model": Problem}},
)


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _premises(request: Request) -> Premises:
    premises: Premises = request.app.state.premises
    return premises


@router.get("/house")
def house(request: Request, owner: Owner) -> HouseView:
    """Every campaign with its rules and progress."""
    rows = [OwnedCampaign.model_validate(row, from_attributes=True) for row in owners.campaigns(_store(request))]
    return HouseView(handle=owner.handle, roots=list(_premises(request).roots), campaigns=rows, fills=_fills(request))


@router.post("/campaigns", status_code=201, responses={202: {"model": FillView}, 409: {"model": Problem}})
def create_campaign(request: Request, response: Response, owner: Owner, wanted: NewCampaign) -> FilledView | FillView:
    """Makes a campaign of clips on the server, or adds what is new to it; all of it or nothing.

    What takes longer than a few seconds is answered with 202 and goes on: its state is among the `fills` of `/owner/house`.
    """
    premises, store, owner_id = _premises(request), _store(request), owner.id
    rules = Rules(**(wanted.rules.model_dump() | {"aspects": tuple(wanted.rules.aspects)}))
    sources = [Source(premises.find(source.path), source.system or None) for source in wanted.sources]
    gold_dir = premises.state() / "gold" if wanted.n_gold else None

    def work(progress: Progress) -> CampaignSummary:
        return fill_campaign(
            store,
            wanted.name,
            sources,
            rules,
            every=wanted.every_pair,
            n_gold=wanted.n_gold,
            gold_dir=gold_dir,
            owner_id=owner_id,
            progress=progress,
        )

    fills: Fills = request.app.state.fills
    fill = fills.start(wanted.name, work)
    if not fill.over.wait(ANSWER_WITHIN_S):
        response.status_code = 202
        return _fill(fill)
    if fill.error is not None:
        raise fill.error
    return FilledView.model_validate(fill.made, from_attributes=True)


def _fills(request: Request) -> list[FillView]:
    fills: Fills = request.app.state.fills
    return [_fill(fill) for fill in fills.newest_first()]


def _fill(fill: Fill) -> FillView:
    told = None if fill.error is None else {"got": fill.error.got, "expected": fill.error.expected, "remedy": fill.error.remedy}
    made = None if fill.made is None else FilledView.model_validate(fill.made, from_attributes=True)
    values = {key: getattr(fill, key) for key in ("id", "name", "state", "stage", "done", "total")}
    return FillView(**values, made=made, problem=None if told is None else Problem.model_validate(told))


@router.put("/campaigns/{campaign_id}/status", status_code=204)
def set_status(request: Request, owner: Owner, campaign_id: Id, change: StatusChange) -> None:
    """Opens, pauses or closes a campaign. Pairs already handed out may still be voted on."""
    owners.set_status(_store(request), owner.id, campaign_id, change.status)


@router.patch("/campaigns/{campaign_id}/rules")
def change_rules(request: Request, owner: Owner, campaign_id: Id, change: RulesChange) -> RulesView:
    """Changes some rules, for pairs handed out from now on, and answers with all of them."""
    wanted = change.model_dump(exclude_none=True)
    if "aspects" in wanted:
        wanted["aspects"] = tuple(wanted["aspects"])
    rules = owners.change_rules(_store(request), owner.id, campaign_id, **wanted)
    return RulesView.model_validate(rules, from_attributes=True)


@router.get("/campaigns/{campaign_id}/results")
def results(
    request: Request,
    owner: Owner,
    campaign_id: Id,
    aspect: Literal["prompt_fit", "musicality", "sound_quality"] | None = None,
    tag: Annotated[str | None, Query(max_length=128, pattern=r"^[^\x00]*$")] = None,
) -> ResultsView:
    """The board, what was left out and why, and how far each rater can be relied on. Systems are named here, never to raters."""
    store = _store(request)
    name = _name_of(store, campaign_id)
    board = leaderboard(store, name, aspect, tag or None)
    fields: dict[str, Any] = {key: getattr(board, key) for key in ResultsView.model_fields if hasattr(board, key)}
    people = sorted(qualities(store, name).values(), key=lambda quality: quality.rater_id)
    return ResultsView.model_validate(fields | {"raters": people, "tags": tags(store, name)}, from_attributes=True)


def _name_of(store: Store, campaign_id: int) -> str:
    for row in owners.campaigns(store):
        if row.id == campaign_id:
            return row.name
    raise NotFoundError(f"campaign {campaign_id}", "a registered campaign", "look at the list of campaigns")


@router.post("/campaigns/{campaign_id}/snapshots", status_code=201, responses={409: {"model": Problem}})
def make_snapshot(request: Request, owner: Owner, campaign_id: Id, wanted: NewSnapshot) -> dict[str, Any]:
    """Freezes the campaign's votes under a name and answers with its snapshot.json."""
    store = _store(request)
    name = _name_of(store, campaign_id)
    snapshot = export_snapshot(store, name, _premises(request).state() / "snapshots", wanted.name)
    with store.write() as session:
        owners.record(session, owner.id, "snapshot.make", campaign_id=campaign_id, name=wanted.name, sha256=snapshot["sha256"])
    return snapshot


@router.get("/snapshots")
def snapshots(request: Request, owner: Owner) -> list[SnapshotView]:
    """The snapshots that were made on this server, newest first."""
    folder = _premises(request).state_dir
    made = (folder / "snapshots").glob("*/snapshot.json") if folder else []
    found = [_snapshot(path) for path in made if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda view: (str(view.created_at or ""), view.name), reverse=True)


def _snapshot(path: Path) -> SnapshotView:
    try:
        return SnapshotView.model_validate(json.loads(path.read_bytes()) | {"name": path.parent.name})
    except (OSError, ValueError, TypeError):
        return SnapshotView(name=path.parent.name)


@router.get("/snapshots/{name}", response_class=FileResponse)
def download_snapshot(request: Request, owner: Owner, name: Annotated[SnapshotName, InPath()]) -> FileResponse:
    """A snapshot as a zip."""
    folder = _premises(request).state() / "snapshots" / name
    if not (folder / "snapshot.json").is_file():
        raise NotFoundError(f"snapshot {name!r}", "one that was made here", "make it first")
    scratch = Path(tempfile.mkdtemp(prefix="encore-"))
    packed = scratch / "snapshot.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{name}/{file.name}")
    clean = BackgroundTask(shutil.rmtree, scratch)
    return FileResponse(packed, media_type="application/zip", filename=f"{name}.zip", background=clean)


@router.get("/invitations")
def invitations(request: Request, owner: Owner) -> list[InvitationView]:
    """Every invitation, newest first; their tokens are known to nobody here."""
    return [InvitationView.model_validate(row, from_attributes=True) for row in owners.invitations(_store(request))]


@router.post("/invitations", status_code=201)
def invite(request: Request, owner: Owner, wanted: NewInvitation) -> MadeInvitation:
    """Makes an invitation and shows its token, this once."""
    expires_in = timedelta(hours=wanted.expires_in_h)
    token = owners.invite(_store(request), owner.id, wanted.campaign_id, max_uses=wanted.max_uses, expires_in=expires_in, note=wanted.note)
    return MadeInvitation(token=token)


@router.delete("/invitations/{invitation_id}", status_code=204)
def end_invitation(request: Request, owner: Owner, invitation_id: Id) -> None:
    """Lets nobody else in by this link."""
    owners.end_invitation(_store(request), owner.id, invitation_id)


@router.get("/raters")
def raters(request: Request, owner: Owner) -> list[RaterView]:
    """Everybody, with how many votes are stored of each."""
    return [RaterView.model_validate(row, from_attributes=True) for row in owners.raters(_store(request))]


@router.put("/raters/{rater_id}/block", status_code=204)
def block(request: Request, owner: Owner, rater_id: Id) -> None:
    """Ends a person's access; the votes stay and are excluded by that reason."""
    owners.set_blocked(_store(request), owner.id, rater_id, True)


@router.delete("/raters/{rater_id}/block", status_code=204)
def unblock(request: Request, owner: Owner, rater_id: Id) -> None:
    """Gives access back."""
    owners.set_blocked(_store(request), owner.id, rater_id, False)


@router.get("/raters/{rater_id}/copy")
def copy(request: Request, owner: Owner, rater_id: Id) -> dict[str, Any]:
    """Everything held about a person."""
    return owners.export_rater(_store(request), owner.id, rater_id)


@router.post("/raters/{rater_id}/erasure")
def erase(request: Request, owner: Owner, rater_id: Id, erasure: Erasure) -> ErasedView:
    """Forgets a person, for good; the votes are kept without a name, or removed."""
    found = owners.erase_rater(_store(request), owner.id, rater_id, erasure.votes)
    return ErasedView(snapshots=[TrainedView.model_validate(snapshot, from_attributes=True) for snapshot in found])


@router.get("/audit")
def audit(request: Request, owner: Owner, limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> list[AuditView]:
    """What owners did, newest first."""
    return [AuditView.model_validate(entry, from_attributes=True) for entry in owners.audit(_store(request), limit)]


def _tell_user_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    return JSONResponse({"detail": {"got": error.got, "expected": error.expected, "remedy": error.remedy}}, 422)


def add_owner_api(app: FastAPI, premises: Premises) -> None:
    """Adds the owner's endpoints to the application that `create_api` made."""
    app.state.fills = Fills()
    app.state.premises = replace(premises, roots=_absolute(premises.roots))
    app.include_router(router)
    app.add_exception_handler(UserError, _tell_user_error)


def _absolute(roots: Sequence[str]) -> tuple[str, ...]:
    local = [storage.local_path(root) for root in roots]
    return tuple(str(path.resolve()) if path is not None else root for root, path in zip(roots, local, strict=True))
