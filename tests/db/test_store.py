"""Raters and counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from db.campaigns import Rules, check_rows, choose_pairs, create
from db.errors import ConflictError, NotFoundError, StoreError
from db.schema import Assignment, Rater
from db.store import Store


def test_an_access_code_opens_the_door_and_is_stored_only_as_a_hash(store: Store) -> None:
    token = store.add_rater("ada")
    assert store.sign_in("ada", token).handle == "ada"
    assert store.sign_in("ada", token + "x") is None
    assert store.sign_in("bob", token) is None
    with store.read() as session:
        assert token not in session.scalars(select(Rater.token_sha256)).one()


def test_a_handle_is_given_once(store: Store) -> None:
    store.add_rater("ada")
    with pytest.raises(ConflictError, match="ada"):
        store.add_rater("ada")


@pytest.mark.parametrize("handle", ["", " ada", "a" * 65, "a\nb", "a\x00"])
def test_a_handle_that_cannot_be_typed_is_refused(store: Store, handle: str) -> None:
    with pytest.raises(StoreError, match="handle"):
        store.add_rater(handle)


def test_an_unknown_role_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="role"):
        store.add_rater("ada", role="king")


def test_a_renewed_code_ends_the_old_one_and_its_sessions(store: Store) -> None:
    old = store.add_rater("ada")
    rater = store.sign_in("ada", old)
    new = store.renew_token("ada")
    assert store.sign_in("ada", old) is None
    assert store.rater_in_session(rater.id, rater.session_epoch) is None
    assert store.sign_in("ada", new) is not None
    with pytest.raises(NotFoundError):
        store.renew_token("bob")


def test_a_blocked_rater_is_out(store: Store) -> None:
    token = store.add_rater("ada")
    rater = store.sign_in("ada", token)
    store.block_rater("ada")
    assert store.sign_in("ada", token) is None
    assert store.rater_in_session(rater.id, rater.session_epoch) is None


def test_stats_count_votes_leases_and_skips(store: Store, make_rows: Callable, add_raters: Callable, tmp_path: Path) -> None:
    store.create_campaign("c", make_rows(4), tmp_path / "clips", target_votes=2, min_listen_ms=0)
    (rater,) = add_raters(1)
    for choice in ("a", "skip"):
        offer = store.next_assignment(rater)
        store.submit_vote(rater, offer.assignment_id, choice, idempotency_key=offer.assignment_id)
    store.next_assignment(rater)
    (campaign,) = store.stats().campaigns
    assert (campaign.pairs, campaign.votes, campaign.votes_wanted) == (4, 1, 8)
    assert (campaign.leases, campaign.skips, campaign.excluded) == (1, 1, {})
    assert store.stats().raters == 1


def test_answers_to_controls_bring_a_campaign_no_nearer_to_its_target(
    store: Store, make_rows: Callable, add_raters: Callable, tmp_path: Path
) -> None:
    rows = check_rows([*make_rows(12), *make_rows(1, ("good", "bad"))], tmp_path / "clips")
    one, two = (key for key, row in rows.items() if row.fields["system"] in ("good", "bad"))
    pairs = [pair for pair in choose_pairs(rows) if pair != (one, two)]
    create(store, "c", rows, Rules(target_votes=2, min_listen_ms=0, gold_rate=0.25, repeat_rate=0.25), pairs=pairs, gold=[(one, two)])
    rng = random.Random(0)
    for rater in add_raters(2):
        while offer := store.next_assignment(rater, rng=rng):
            store.submit_vote(rater, offer.assignment_id, "tie", idempotency_key=offer.assignment_id)
    with store.read() as session:
        kinds = Counter(session.scalars(select(Assignment.kind)))
    (campaign,) = store.stats().campaigns
    assert kinds["gold"] > 0
    assert kinds["repeat"] > 0
    assert (campaign.pairs, campaign.gold_pairs, campaign.votes, campaign.votes_wanted) == (12, 1, 24, 24)
    assert (campaign.gold_votes, campaign.repeat_votes) == (kinds["gold"], kinds["repeat"])
    assert store.stats().votes == kinds.total()


def test_the_pseudonym_salt_is_drawn_once(store: Store) -> None:
    assert store.pseudonym_salt() == store.pseudonym_salt()
