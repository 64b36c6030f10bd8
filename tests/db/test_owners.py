"""What an owner does, all of it on record; and what is left of a rater who asked to be forgotten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select

from db import owners
from db.errors import NotFoundError, RefusedError, StoreError
from db.export import export_snapshot
from db.quality import qualities
from db.schema import Assignment, Audit, Consent, Invitation, Pair, Rater, Snapshot, SnapshotRater, Vote
from db.store import Store

LATER = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def voted(store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> list[int]:
    """Two raters; each voted on two pairs of three and holds a lease of the last. The first prefers the system `dpo`."""
    store.create_campaign("c", make_rows(3), tmp_path / "clips", target_votes=2, min_listen_ms=0)
    people = add_raters(2)
    for rater_id in people:
        for k in range(2):
            offer = store.next_assignment(rater_id)
            with store.read() as session:
                swapped = session.get(Assignment, offer.assignment_id).swapped
            key = f"{rater_id}-{k}"
            store.submit_vote(rater_id, offer.assignment_id, "a" if swapped else "b", idempotency_key=key, comment="my name is Eve")
        store.next_assignment(rater_id)
    return people


def n_open(store: Store) -> int:
    with store.read() as session:
        return session.scalar(select(func.sum(Pair.n_open)))


def actions(store: Store) -> list[str]:
    return [entry.action for entry in owners.audit(store)]


def test_a_paused_campaign_hands_nothing_out_and_says_so_in_the_audit(store: Store, voted: list[int], add_raters: Callable) -> None:
    code = store.add_rater("new")
    newcomer = store.sign_in("new", code)
    owners.change_rules(store, None, 1, target_votes=9)
    owners.set_status(store, voted[0], 1, "paused")
    assert store.next_assignment(newcomer.id) is None
    owners.set_status(store, voted[0], 1, "open")
    assert store.next_assignment(newcomer.id) is not None
    with pytest.raises(RefusedError):
        owners.set_status(store, None, 1, "gone")
    with pytest.raises(NotFoundError):
        owners.set_status(store, None, 99, "open")
    assert actions(store)[:2] == ["campaign.status"] * 2
    assert owners.audit(store)[0].actor == "rater 0"


def test_rules_change_together_and_a_lower_target_takes_nothing_back(store: Store, voted: list[int]) -> None:
    rules = owners.change_rules(store, None, 1, target_votes=1, aspects=("musicality",), gold_rate=0.1)
    assert (rules.target_votes, rules.aspects, rules.min_listen_ms) == (1, ("musicality",), 0)
    with store.read() as session:
        assert all(pair.n_open <= pair.target_votes and pair.target_votes in (1, 2) for pair in session.scalars(select(Pair)))
    assert owners.change_rules(store, None, 1, target_votes=5).target_votes == 5
    (row,) = owners.campaigns(store)
    assert (row.n_pairs, row.votes, row.votes_wanted) == (3, 4, 15)
    for wrong in ({"target_votes": 0}, {"gold_rate": 0.4, "repeat_rate": 0.4}, {"chooser": "x"}):
        with pytest.raises(StoreError):
            owners.change_rules(store, None, 1, **wrong)
    assert actions(store)[:2] == ["campaign.rules"] * 2


def test_rules_that_two_owners_change_at_once_are_judged_together(store: Store, voted: list[int], meet: Callable) -> None:
    meet("SELECT campaign")
    with ThreadPoolExecutor(2) as pool:
        changes = [pool.submit(owners.change_rules, store, None, 1, **{share: 0.4}) for share in ("gold_rate", "repeat_rate")]
        refused = [change.exception() for change in changes]
    assert sorted(type(error).__name__ for error in refused) == ["NoneType", "StoreError"]


def test_an_invitation_is_stored_hashed_and_can_be_ended(store: Store, voted: list[int]) -> None:
    token = owners.invite(store, voted[0], 1, max_uses=5, expires_in=timedelta(days=2), note="class of 2026")
    with store.read() as session:
        stored = session.scalars(select(Invitation)).one()
    assert stored.token_sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert (stored.max_uses, stored.n_used, stored.campaign_id) == (5, 0, 1)
    owners.end_invitation(store, None, stored.id)
    (row,) = owners.invitations(store)
    assert row.campaign == "c"
    assert row.expires_at <= datetime.now(UTC)
    assert token not in json.dumps([entry.detail for entry in owners.audit(store)])


@pytest.mark.parametrize("wrong", [{"max_uses": 0}, {"expires_in": timedelta()}, {"expires_in": timedelta(days=999)}])
def test_an_invitation_without_bounds_is_refused(store: Store, wrong: dict) -> None:
    with pytest.raises(RefusedError):
        owners.invite(store, None, None, **wrong)


def test_blocking_ends_access_and_nobody_blocks_oneself(store: Store, voted: list[int]) -> None:
    owners.set_blocked(store, voted[1], voted[0], True)
    assert store.rater_in_session(voted[0], 0) is None
    owners.set_blocked(store, voted[1], voted[0], False)
    assert [row.status for row in owners.raters(store)] == ["active", "active"]
    assert [row.votes for row in owners.raters(store)] == [2, 2]
    with pytest.raises(RefusedError, match="oneself"):
        owners.set_blocked(store, voted[1], voted[1], True)


def snapshot_of(store: Store, rater_id: int) -> None:
    with store.write() as session:
        snapshot = Snapshot(name="s", sha256="ab" * 32, campaign_id=1, n_votes=2)
        session.add(snapshot)
        session.flush()
        session.add(SnapshotRater(snapshot_id=snapshot.id, rater_id=rater_id, n_votes=2))
        session.add(Consent(rater_id=rater_id, version="1", accepted=True))


def test_a_copy_holds_everything_but_the_key(store: Store, voted: list[int]) -> None:
    snapshot_of(store, voted[0])
    copy = owners.export_rater(store, None, voted[0])
    text = json.dumps(copy)
    assert copy["rater"]["handle"] == "rater 0"
    assert [len(copy[key]) for key in ("votes", "assignments", "consents", "snapshots")] == [2, 3, 1, 1]
    assert "my name is Eve" in text
    assert "token" not in text
    assert "rater 1" not in text
    assert {vote["rater_id"] for vote in copy["votes"]} == {voted[0]}
    (seen,) = copy["quality"]
    assert (seen["campaign_id"], seen["rater_id"], seen["n_votes"], seen["gold_accuracy"]) == (1, voted[0], 2, None)
    assert seen["reliability"] == qualities(store, "c")[voted[0]].reliability


@pytest.mark.parametrize("policy", ["anonymise", "remove"])
def test_erasing_leaves_no_name_and_tells_what_was_trained(store: Store, voted: list[int], tmp_path: Path, policy: str) -> None:
    snapshot_of(store, voted[0])
    owners.set_status(store, voted[1], 1, "paused")
    before = n_open(store)
    assert before == 6
    assert owners.erase_rater(store, None, voted[0], policy) == [owners.TrainedOn("s", "ab" * 32, 2)]
    with store.read() as session:
        rater = session.get(Rater, voted[0])
        votes = session.scalars(select(Vote).where(Vote.rater_id == voted[0])).all()
        assert (rater.status, rater.screen, rater.handle.startswith("erased-")) == ("erased", None, True)
        assert len(votes) == (2 if policy == "anonymise" else 0)
        assert all(vote.comment is None for vote in votes)
        held = select(func.count()).select_from(Assignment).where(Assignment.status.in_(("leased", "voted")))
        assert session.scalar(held) == n_open(store) == before - (1 if policy == "anonymise" else 3)
        everything = json.dumps([entry.detail for entry in session.scalars(select(Audit))])
    assert "rater 0" not in everything
    assert store.rater_in_session(voted[0], 0) is None
    with pytest.raises(StoreError) if policy == "remove" else nullcontext():  # nobody else's vote is left then
        owners.set_blocked(store, None, voted[1], True)
        kept = export_snapshot(store, "c", tmp_path / "snapshots", "s")
        assert (kept["n_votes"], kept["n_excluded"]) == (2, {"rater_blocked": 2})
    assert owners.export_rater(store, None, voted[1])["votes"]


def test_a_blocked_raters_votes_do_not_count_again_once_the_rater_is_erased(store: Store, voted: list[int], tmp_path: Path) -> None:
    owners.set_blocked(store, None, voted[0], True)
    before = export_snapshot(store, "c", tmp_path, "before")
    owners.erase_rater(store, None, voted[0], "anonymise")
    after = export_snapshot(store, "c", tmp_path, "after")
    assert before["n_excluded"] == after["n_excluded"] == {"rater_blocked": 2}
    assert before["n_votes"] == after["n_votes"] == 2


def test_an_owner_is_not_erased(store: Store) -> None:
    store.add_rater("boss", "owner")
    with pytest.raises(RefusedError, match="owner"):
        owners.erase_rater(store, None, owners.rater_id_of(store, "boss"))
    with pytest.raises(NotFoundError):
        owners.rater_id_of(store, "nobody")
