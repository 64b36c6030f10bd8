"""From an invitation link to the first pair, as a headless client walks it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from db.schema import Campaign, Consent, Invitation, Membership, Rater, Snapshot, SnapshotRater, utc_now
from db.store import Store
from feedback_app import consent
from feedback_app.api import create_api

TOKEN = "an-invitation-that-was-sent"
SAME_ORIGIN = {"Origin": "http://testserver"}


@pytest.fixture
def invite(store: Store) -> Callable[..., str]:
    """invite(max_uses=1, days=1, campaign=True) stores a link's token, hashed, and returns it."""

    def make(token: str = TOKEN, max_uses: int = 1, days: float = 1, campaign: bool = True) -> str:
        with store.write() as session:
            campaign_id = session.scalar(select(Campaign.id)) if campaign else None
            session.add(
                Invitation(
                    token_sha256=hashlib.sha256(token.encode()).hexdigest(),
                    campaign_id=campaign_id,
                    max_uses=max_uses,
                    expires_at=utc_now() + timedelta(days=days),
                )
            )
        return token

    return make


def join(client: TestClient, token: str, handle: str = "ada", version: str = consent.VERSION, key: str | None = None):
    body = {"invitation": token, "handle": handle, "consent_version": version}
    return client.post("/api/v1/join", json=body, headers=SAME_ORIGIN | ({"Idempotency-Key": key} if key else {}))


def count(store: Store, table: type) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def uses(store: Store) -> int:
    with store.read() as session:
        return session.scalars(select(Invitation.n_used)).one()


def test_an_invited_person_joins_rates_and_comes_back_with_the_code(api: FastAPI, store: Store, invite: Callable) -> None:
    with store.write() as session:
        session.execute(update(Campaign).values(invited_only=True))
    newcomer = TestClient(api)
    joined = join(newcomer, invite(), "ada")
    assert joined.status_code == 201
    assert newcomer.get("/api/v1/pairs/next").status_code == 200
    with store.read() as session:
        rater = session.scalars(select(Rater)).one()
        membership = session.scalars(select(Membership)).one()
        answer = session.scalars(select(Consent)).one()
    assert rater.token_sha256 == hashlib.sha256(joined.json()["access_code"].encode()).hexdigest()
    assert (membership.rater_id, answer.rater_id, answer.version, answer.accepted) == (rater.id, rater.id, consent.VERSION, True)
    back = TestClient(api).post("/api/v1/login", json={"handle": "ada", "token": joined.json()["access_code"]})
    assert back.status_code == 200


def test_reading_and_turning_down_the_consent_page_stores_nothing(api: FastAPI, store: Store, invite: Callable) -> None:
    token, visitor = invite(), TestClient(api)
    assert visitor.post("/api/v1/invitation", json={"invitation": token}).status_code == 204
    page = visitor.get("/api/v1/consent").json()
    assert page["version"] == consent.VERSION
    assert len(page["text"]) >= 3
    assert (count(store, Rater), count(store, Consent), uses(store)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("how", "status"),
    [({}, 404), ({"days": -0.001}, 422), ({"max_uses": 0}, 422)],
    ids=["unknown", "expired", "used up"],
)
def test_a_link_that_is_not_open_lets_nobody_in(api: FastAPI, store: Store, invite: Callable, how: dict, status: int) -> None:
    if how:
        invite(**how)
    for answer in (TestClient(api).post("/api/v1/invitation", json={"invitation": TOKEN}), join(TestClient(api), TOKEN)):
        assert answer.status_code == status
        assert set(answer.json()["detail"]) == {"got", "expected", "remedy"}
        assert "set-cookie" not in answer.headers
    assert count(store, Rater) == 0


@pytest.mark.parametrize("handle", [" ", "a\u202eb", "a\nb", "x" * 65, "\x00"])
def test_a_name_that_cannot_be_spends_no_use(api: FastAPI, store: Store, invite: Callable, handle: str) -> None:
    assert join(TestClient(api), invite(), handle).status_code == 422
    assert (count(store, Rater), uses(store)) == (0, 0)


def test_a_taken_name_spends_no_use(api: FastAPI, store: Store, invite: Callable) -> None:
    store.add_rater("ada")
    assert join(TestClient(api), invite(), "ada").status_code == 409
    assert (count(store, Rater), count(store, Consent), uses(store)) == (1, 0, 0)


def test_joining_takes_consent_to_the_words_of_today(api: FastAPI, store: Store, invite: Callable) -> None:
    assert join(TestClient(api), invite(), "ada", "of another day").status_code == 422
    assert (count(store, Rater), uses(store)) == (0, 0)


def test_sixteen_who_come_at_once_share_three_places(api: FastAPI, store: Store, invite: Callable) -> None:
    token = invite(max_uses=3)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: join(TestClient(api), token, f"rater {i}").status_code, range(16)))
    assert sorted(answers) == [201] * 3 + [422] * 13
    assert (count(store, Rater), count(store, Membership), uses(store)) == (3, 3, 3)


KEY = "0123456789abcdef0123456789abcdef"


def test_a_joining_whose_answer_was_lost_is_sent_again_and_spends_one_place(api: FastAPI, store: Store, invite: Callable) -> None:
    token = invite()
    lost = join(TestClient(api), token, "ada", key=KEY)
    newcomer = TestClient(api)
    for handle in ("ada", "ada", "a name thought better of"):  # the first name stands
        again = join(newcomer, token, handle, key=KEY)
        assert again.status_code == 201
        assert (again.json()["handle"], again.json()["access_code"]) == ("ada", lost.json()["access_code"])
    assert newcomer.get("/api/v1/pairs/next").status_code == 200
    assert (count(store, Rater), count(store, Membership), count(store, Consent), uses(store)) == (1, 1, 1, 1)
    back = TestClient(api).post("/api/v1/login", json={"handle": "ada", "token": lost.json()["access_code"]})
    assert back.status_code == 200


def test_the_same_joining_sixteen_times_at_once_is_one_person(api: FastAPI, store: Store, invite: Callable) -> None:
    token = invite(max_uses=3)

    def until_there_is_room(_: int) -> Any:
        """On a busy machine a write may wait for longer than a database waits: 503, nothing written, and asked again as the answer says."""
        for _ in range(20):
            answer = join(TestClient(api), token, "ada", key=KEY)
            if answer.status_code != 503:
                break
            assert answer.headers["retry-after"] == "1"
        return answer

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(until_there_is_room, range(16)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["access_code"] for answer in answers}) == 1
    assert (count(store, Rater), uses(store)) == (1, 1)


def test_a_key_is_worth_nothing_without_its_invitation_and_server(api: FastAPI, store: Store, invite: Callable) -> None:
    first, other = invite(), invite("another-invitation")
    assert join(TestClient(api), first, "ada", key=KEY).status_code == 201
    assert join(TestClient(api), other, "ada", key=KEY).status_code == 409
    assert join(TestClient(api), first, "ada", key=KEY[::-1]).status_code == 422  # the link is used up
    assert join(TestClient(create_api(store, "another secret")), first, "ada", key=KEY).status_code == 422
    assert join(TestClient(api), other, "eve", key="short").status_code == 422
    store.block_rater("ada")
    assert join(TestClient(api), first, "ada", key=KEY).status_code == 422


def test_a_rater_takes_up_one_more_invitation_once(ada: TestClient, store: Store, invite: Callable) -> None:
    token = invite(max_uses=5)
    for _ in range(2):
        assert ada.post("/api/v1/me/invitation", json={"invitation": token}).status_code == 204
    assert (count(store, Membership), uses(store)) == (1, 1)
    assert ada.get("/api/v1/me").json()["consent_due"]  # added by hand, and now here by invitation
    assert ada.get("/api/v1/pairs/next").status_code == 403


def test_no_pair_without_consent_for_the_invited(api: FastAPI, store: Store, invite: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = TestClient(api, headers=SAME_ORIGIN)
    code = join(ada, invite()).json()["access_code"]
    assert ada.get("/api/v1/pairs/next").status_code == 200

    no = {"version": consent.VERSION, "accepted": False}
    assert ada.post("/api/v1/me/consent", json=no).status_code == 204
    assert ada.get("/api/v1/pairs/next").status_code == 401  # a withdrawal ends all sessions
    assert ada.post("/api/v1/login", json={"handle": "ada", "token": code}).status_code == 200
    refused = ada.get("/api/v1/pairs/next")
    assert (refused.status_code, set(refused.json()["detail"])) == (403, {"got", "expected", "remedy", "step"})
    assert refused.json()["detail"]["step"] == "consent"
    assert ada.post("/api/v1/me/consent", json={"version": "of another day", "accepted": True}).status_code == 422
    assert ada.post("/api/v1/me/consent", json={**no, "accepted": True}).status_code == 204
    assert ada.get("/api/v1/pairs/next").status_code == 200
    assert count(store, Consent) == 3

    monkeypatch.setattr(consent, "VERSION", "other words")
    ada.app = create_api(store, "only for these tests")  # a server that was updated
    ada._transport.app = ada.app
    assert ada.get("/api/v1/me").json()["consent_due"]
    assert ada.get("/api/v1/pairs/next").status_code == 403


def test_whom_the_owner_added_by_hand_is_asked_only_if_the_server_is_told_to(store: Store) -> None:
    code = store.add_rater("ada")
    for everyone, status in [(False, 200), (True, 403)]:
        client = TestClient(create_api(store, "only for these tests", consent_of_everyone=everyone))
        assert client.post("/api/v1/login", json={"handle": "ada", "token": code}).status_code == 200
        assert client.get("/api/v1/me").json()["consent_due"] is everyone
        assert client.get("/api/v1/pairs/next").status_code == status


def test_practice_is_noted_once(ada: TestClient, store: Store) -> None:
    stored = []
    for _ in range(2):
        assert ada.post("/api/v1/me/practice").status_code == 204
        with store.read() as session:
            stored.append(session.scalars(select(Rater.practised_at)).one())
    assert stored[0] is not None
    assert stored[0] == stored[1]
    assert ada.get("/api/v1/me").json()["practised"]


def test_a_rater_is_told_what_the_votes_did(ada: TestClient, store: Store) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    body = {"assignment_id": pair["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}}
    assert ada.post("/api/v1/votes", json=body, headers={"Idempotency-Key": "key-00001"}).status_code == 201
    assert (ada.get("/api/v1/me").json()["votes"], ada.get("/api/v1/me").json()["snapshots"]) == (1, 0)
    with store.write() as session:
        snapshot = Snapshot(name="s", sha256="0" * 64, campaign_id=session.scalars(select(Campaign.id)).one(), n_votes=1)
        session.add(snapshot)
        session.flush()
        session.add(SnapshotRater(snapshot_id=snapshot.id, rater_id=session.scalars(select(Rater.id)).one(), n_votes=1))
    assert ada.get("/api/v1/me").json()["snapshots"] == 1


def test_another_site_can_neither_join_nor_answer_for_a_visitor(api: FastAPI, store: Store, invite: Callable) -> None:
    token, evil = invite(), {"Origin": "http://evil.example"}
    visitor = TestClient(api, headers=evil)
    body = {"invitation": token, "handle": "ada", "consent_version": consent.VERSION}
    assert visitor.post("/api/v1/join", json=body).status_code == 403
    assert join(visitor, token).status_code == 201
    for path, body in [
        ("consent", {"version": consent.VERSION, "accepted": False}),
        ("practice", None),
        ("screen", {"number": 0, "answers": []}),
    ]:
        assert visitor.post(f"/api/v1/me/{path}", json=body).status_code == 403


def test_changed_words_need_a_new_version() -> None:
    digest = hashlib.sha256("\n".join((consent.TITLE, *consent.TEXT)).encode()).hexdigest()[:16]
    assert (consent.VERSION, digest) == ("2026-11-25", "273989a186b2f495"), "give consent.VERSION a new date, then write both here"
