"""Whose pair is next, as the page and a headless client see it: an offer of the store with signed audio addresses."""

from __future__ import annotations

from pydantic import BaseModel, Field

from db.store import RaterIdentity, Store
from db.voting import Offer
from feedback_app.media import Ticket, Tickets


class Sides(BaseModel):
    a: str
    b: str


class Gains(BaseModel):
    a: float = Field(description="dB to apply to side A so that both sound equally loud")
    b: float


class ProgressView(BaseModel):
    done: int = Field(description="votes this rater has given")
    open: int = Field(description="pairs that still wait for this rater")


class PairView(BaseModel):
    """Everything a listener may know about a pair."""

    assignment_id: str
    campaign: str
    prompt: str
    audio: Sides
    gain_db: Gains
    duration_s: float
    min_listen_ms: int
    aspects: list[str] = Field(description="what this campaign asks for beside the vote; optional to answer")
    practice: bool = Field(description="whether this campaign wants new raters to rehearse first")
    progress: ProgressView


def next_pair(store: Store, tickets: Tickets, rater: RaterIdentity, campaign: str | None) -> PairView | None:
    """The rater's current pair, or a new one, or None when nothing is left."""
    offer = store.next_assignment(rater.id, campaign)
    return None if offer is None else _view(offer, tickets, rater)


def _view(offer: Offer, tickets: Tickets, rater: RaterIdentity) -> PairView:
    def address(side: str) -> str:
        expires_at = int(offer.expires_at.timestamp())
        return "/api/v1/audio/" + tickets.sign(Ticket(offer.assignment_id, side, rater.id, expires_at))

    return PairView(
        assignment_id=offer.assignment_id,
        campaign=offer.campaign,
        prompt=offer.prompt,
        audio=Sides(a=address("a"), b=address("b")),
        gain_db=Gains(a=offer.gain_a_db, b=offer.gain_b_db),
        duration_s=offer.duration_ms / 1000,
        min_listen_ms=offer.min_listen_ms,
        aspects=list(offer.aspects),
        practice=offer.practice,
        progress=ProgressView(done=offer.progress.done, open=offer.progress.open),
    )
