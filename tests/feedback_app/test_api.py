"""The JSON API, as a headless client meets it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from db.schema import Campaign, SpanMark, Vote, VoteAspect
from db.store import Store


def ballot(pair: dict, choice: str = "a", **more: object) -> dict:
    return {"assignment_id": pair["assignment_id"], "choice": choice, "listen_ms": {"a": 0, "b": 0}, **more}


def vote(client: TestClient, pair: dict, key: str, **more: object):
    return client.post("/api/v1/votes", json=ballot(pair, **more), headers={"Idempotency-Key": key})


def count_votes(store: Store) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(Vote)) or 0


def test_a_rater_walks_through_all_pairs(ada: TestClient, store: Store) -> None:
    done = 0
    while (answer := ada.get("/api/v1/pairs/next")).status_code == 200:
        pair = answer.json()
        assert pair["progress"] == {"done": done, "open": 4 - done}
        assert vote(ada, pair, f"key-{done:05}").status_code == 201
        done += 1
    assert (answer.status_code, answer.content, done, count_votes(store)) == (204, b"", 4, 4)
    assert ada.get("/api/v1/stats").json()["campaigns"][0] == {
        "name": "c", "status": "open", "pairs": 4, "votes": 4, "votes_wanted": 12, "leases": 0, "skips": 0,
        "excluded": {},
    }  # fmt: skip


def test_a_pair_has_the_agreed_shape(ada: TestClient) -> None:
    pair = ada.get("/api/v1/pairs/next?campaign=c").json()
    assert set(pair) == {
        "assignment_id", "campaign", "prompt", "audio", "gain_db", "duration_s", "min_listen_ms", "aspects", "practice",
        "progress",
    }  # fmt: skip
    assert set(pair["audio"]) == set(pair["gain_db"]) == {"a", "b"}
    assert abs(pair["gain_db"]["a"] - pair["gain_db"]["b"]) == pytest.approx(12.04, abs=0.2)  # 0.1 against 0.4


def test_a_vote_sent_twice_is_answered_200_and_stored_once(ada: TestClient, store: Store) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    first = vote(ada, pair, "key-00001", confidence=2, comment="warm", events=[[10, "play", "a", 0]])
    again = vote(ada, pair, "key-00001", confidence=2, comment="warm")
    other_tab = vote(ada, pair, "key-00002", choice="b")
    assert (first.status_code, again.status_code, other_tab.status_code) == (201, 200, 200)
    assert first.json() == {"vote_id": 1, "duplicate": False, "choice": "a"}
    assert again.json() == other_tab.json() == {"vote_id": 1, "duplicate": True, "choice": "a"}
    assert count_votes(store) == 1
    with store.read() as session:
        row = session.scalars(select(Vote)).one()
        assert (row.confidence, row.comment, row.events) == (2, "warm", [[10, "play", "a", 0]])


def test_aspects_marks_coverage_and_clock_are_stored_as_shown(ada: TestClient, store: Store) -> None:
    with store.write() as session:
        session.execute(update(Campaign).values(aspects=["prompt_fit", "sound_quality"]))
    pair = ada.get("/api/v1/pairs/next").json()
    assert (pair["aspects"], pair["practice"]) == (["prompt_fit", "sound_quality"], False)
    more = {
        "aspects": {"sound_quality": -2},
        "marks": [{"side": "b", "t0_ms": 100, "t1_ms": 400, "tag": "noise"}, {"side": "a", "t0_ms": 0, "t1_ms": 50}],
        "coverage": {"a": 0.25, "b": 1.0},
        "client_ms": 1_800_000_000_123,
        "ui_version": "abc123",
    }
    assert vote(ada, pair, "key-00001", **more).status_code == 201
    with store.read() as session:
        stored = session.scalars(select(Vote)).one()
        assert (stored.coverage_a, stored.coverage_b, stored.client_ms, stored.ui_version) == (0.25, 1.0, 1_800_000_000_123, "abc123")
        assert [(row.aspect, row.score) for row in session.scalars(select(VoteAspect))] == [("sound_quality", -2)]
        marks = session.scalars(select(SpanMark).order_by(SpanMark.id))
        assert [(m.side, m.t0_ms, m.t1_ms, m.tag) for m in marks] == [("b", 100, 400, "noise"), ("a", 0, 50, "bad")]


def test_sql_and_html_in_every_field_are_stored_as_they_are_and_do_nothing(ada: TestClient, store: Store) -> None:
    nasty = "'); drop table vote; -- <img src=x onerror=alert(1)> ${1} {{1}} \u202egnol"
    pair = ada.get("/api/v1/pairs/next").json()
    mark = {"side": "a", "t0_ms": 0, "t1_ms": 50, "tag": nasty[:32]}
    more = {"comment": nasty, "marks": [mark], "events": [[10, nasty[:12], "a", 0]], "ui_version": nasty[:32]}
    assert vote(ada, pair, "'); drop--<b>", **more).status_code == 422  # a key has no spaces
    assert vote(ada, pair, "');drop--<b>", **more).status_code == 201
    for parameter in ("campaign", "token"):
        assert ada.get("/api/v1/pairs/next", params={parameter: nasty}).status_code == (404 if parameter == "campaign" else 200)
    refused = TestClient(ada.app).post("/api/v1/login", json={"handle": nasty[:64], "token": nasty})
    assert (refused.status_code, nasty[:20] in refused.text) == (401, False)
    with store.read() as session:
        stored = session.scalars(select(Vote)).one()
        assert (stored.comment, stored.events, stored.ui_version) == (nasty, [[10, nasty[:12], "a", 0]], nasty[:32])
        assert session.scalars(select(SpanMark.tag)).one() == nasty[:32]


def test_a_clients_clock_decides_nothing(ada: TestClient, store: Store) -> None:
    for i, client_ms in enumerate((0, 2**53)):  # 1970, and 285,000 years on
        pair = ada.get("/api/v1/pairs/next").json()
        assert vote(ada, pair, f"key-{i:05}", client_ms=client_ms).status_code == 201
    with store.read() as session:
        votes = session.scalars(select(Vote).order_by(Vote.id)).all()
    assert [stored.client_ms for stored in votes] == [0, 2**53]
    assert abs(votes[0].created_at.timestamp() - votes[1].created_at.timestamp()) < 60


def test_a_skip_is_no_vote(ada: TestClient, store: Store) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    assert vote(ada, pair, "key-00001", choice="skip").json() == {"vote_id": None, "duplicate": False, "choice": "skip"}
    assert ada.get("/api/v1/pairs/next").json()["assignment_id"] != pair["assignment_id"]
    assert count_votes(store) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": "c"},
        {"assignment_id": "x'; drop table vote; --"},
        {"listen_ms": {"a": -1, "b": 0}},
        {"listen_ms": {"a": 0}},
        {"confidence": 9},
        {"comment": "x" * 2001},
        {"comment": "nul \x00"},
        {"events": [[0, "play", "c", 0]]},
        {"aspects": {"musicality": 3}},
        {"aspects": {"musicality": 1}},
        {"aspects": {"taste'; drop table vote; --": 1}},
        {"marks": [{"side": "c", "t0_ms": 0, "t1_ms": 9}]},
        {"marks": [{"side": "a", "t0_ms": 9, "t1_ms": 9}]},
        {"marks": [{"side": "a", "t0_ms": 0, "t1_ms": 99999}]},
        {"marks": [{"side": "a", "t0_ms": 0, "t1_ms": 9, "tag": "x" * 33}]},
        {"coverage": {"a": 1.01, "b": 0}},
        {"client_ms": -1},
    ],
)
def test_a_ballot_that_makes_no_sense_is_422(ada: TestClient, store: Store, wrong: dict) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    body = json.dumps(ballot(pair) | wrong)
    headers = {"Idempotency-Key": "key-00001", "Content-Type": "application/json"}
    answer = ada.post("/api/v1/votes", content=body, headers=headers)
    assert answer.status_code == 422
    assert set(answer.json()["detail"]) == {"got", "expected", "remedy"}
    assert count_votes(store) == 0


@pytest.mark.parametrize("key", [None, "short", "x" * 129, "has a space"])
def test_a_vote_needs_a_good_idempotency_key(ada: TestClient, store: Store, key: str | None) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    headers = {} if key is None else {"Idempotency-Key": key}
    assert ada.post("/api/v1/votes", json=ballot(pair), headers=headers).status_code == 422
    assert count_votes(store) == 0


def test_another_raters_pair_is_404_and_a_used_key_409(ada: TestClient, sign_in: Callable[[str], TestClient]) -> None:
    bob = sign_in("bob")
    pair = ada.get("/api/v1/pairs/next").json()
    assert vote(bob, pair, "key-00001").status_code == 404
    assert vote(ada, pair, "key-00001").status_code == 201
    assert vote(ada, ada.get("/api/v1/pairs/next").json(), "key-00001").status_code == 409


def test_too_little_listening_is_422_with_a_remedy(make_demo: Callable, store: Store, ada: TestClient, demo: object) -> None:
    with store.write() as session:
        session.connection().exec_driver_sql("update campaign set min_listen_ms = 900")
    pair = ada.get("/api/v1/pairs/next").json()
    assert pair["min_listen_ms"] == 900
    answer = vote(ada, pair, "key-00001")
    assert answer.status_code == 422
    assert answer.json()["detail"] == {
        "got": "0 ms of listening to one side",
        "expected": "at least 900 ms of each",
        "remedy": "listen on, then vote",
    }


def test_a_locked_database_is_503_with_got_expected_remedy_and_then_works(ada: TestClient, store: Store, tmp_path: Path) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    other = sqlite3.connect(tmp_path / "votes.db", isolation_level=None)
    other.execute("begin immediate")
    answer = vote(ada, pair, "key-00001")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert set(answer.json()["detail"]) == {"got", "expected", "remedy"}
    other.execute("rollback")
    other.close()
    assert vote(ada, pair, "key-00001").status_code == 201
    assert count_votes(store) == 1


def test_nothing_is_to_be_had_without_a_session(api: FastAPI) -> None:
    client = TestClient(api)
    for method, path in [
        ("GET", "/api/v1/pairs/next"), ("GET", "/api/v1/audio/x"), ("POST", "/api/v1/votes"), ("GET", "/api/v1/stats"),
        ("POST", "/api/v1/logout"),
    ]:  # fmt: skip
        headers = {"Authorization": "Bearer forged.session.here", "Idempotency-Key": "key-00001"}
        body = {"assignment_id": "ab", "choice": "a", "listen_ms": {"a": 0, "b": 0}} if "votes" in path else None
        answer = client.request(method, path, headers=headers, json=body)
        assert answer.status_code == 401, path
        assert answer.json()["detail"]["remedy"] == "sign in"


def test_an_unknown_campaign_is_404(ada: TestClient) -> None:
    assert ada.get("/api/v1/pairs/next?campaign=nowhere").status_code == 404


def test_the_schema_names_every_endpoint_and_health_is_open(api: FastAPI) -> None:
    client = TestClient(api)
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if not path.startswith("/api/v1/owner")} == {
        "/api/v1/invitation", "/api/v1/join", "/api/v1/consent", "/api/v1/me", "/api/v1/me/invitation", "/api/v1/me/consent",
        "/api/v1/me/screen", "/api/v1/me/screen/{number}/{trial}",
        "/api/v1/me/practice", "/api/v1/login", "/api/v1/logout", "/api/v1/pairs/next", "/api/v1/audio/{token}",
        "/api/v1/votes", "/api/v1/stats", "/healthz",
    }  # fmt: skip
    assert client.get("/healthz").json() == {"ok": True, "database": "sqlite"}


def test_nothing_sent_out_names_a_system_a_file_or_a_rater(ada: TestClient) -> None:
    seen = []
    while (answer := ada.get("/api/v1/pairs/next")).status_code == 200:
        pair = answer.json()
        clips = [ada.get(pair["audio"][side]) for side in "ab"]
        seen += [answer.text, *pair["audio"].values(), *(str(dict(clip.headers)) for clip in clips)]
        receipt = vote(ada, pair, "key-" + pair["assignment_id"])
        seen += [receipt.text, str(dict(receipt.headers))]
    seen += [ada.get("/api/v1/stats").text, ada.get("/openapi.json").text]
    text = " ".join(seen)
    assert len(seen) > 20
    for secret in ("secret", "telling-name", '.wav"', "_dpo", "_base"):
        assert secret not in text, secret
    for word in ("ada", "p0"):  # as words: a random token may hold any three letters
        assert not re.search(rf"(?<![\w-]){word}(?![\w-])", text), word
