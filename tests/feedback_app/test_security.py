"""The locks: who may do what, how often, and what a browser is told to keep to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from db.store import Store
from feedback_app.guard import GUARD_HEADERS, MAX_BODY
from feedback_app.limits import Buckets


def log_in(client: TestClient, handle: str, token: str):
    return client.post("/api/v1/login", json={"handle": handle, "token": token})


def test_every_answer_is_guarded_and_json_is_never_cached(ada: TestClient, api: FastAPI) -> None:
    answers = [
        ada.get("/api/v1/pairs/next"), ada.get("/api/v1/stats"), ada.get("/api/v1/audio/x"), ada.get("/nowhere"),
        ada.post("/api/v1/votes", json={}), TestClient(api).get("/api/v1/pairs/next"), ada.get("/openapi.json"),
    ]  # fmt: skip
    for answer in answers:
        assert {name.decode(): value.decode() for name, value in GUARD_HEADERS.items()}.items() <= dict(answer.headers).items()
        if answer.request.url.path.startswith("/api/"):
            assert answer.headers["cache-control"] == "no-store"
        assert "strict-transport-security" not in answer.headers


def test_behind_https_the_cookie_is_secure_and_https_is_remembered(api: FastAPI, store: Store) -> None:
    code = store.add_rater("eve")
    for base, secure in [("http://testserver", False), ("https://testserver", True)]:
        answer = log_in(TestClient(api, base_url=base), "eve", code)
        cookie = answer.headers["set-cookie"].lower()
        assert ("secure" in cookie) is secure
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert ("strict-transport-security" in answer.headers) is secure


def test_guessing_a_code_meets_a_wall_that_the_owner_of_the_name_does_not_see_elsewhere(api: FastAPI, store: Store) -> None:
    code = store.add_rater("eve")
    api.state.limits.named = Buckets(per_s=1 / 6, burst=10, clock=lambda: 0.0)  # the real wall, on a machine of any speed
    guesser = TestClient(api, client=("10.0.0.1", 1))
    statuses = [log_in(guesser, "eve", f"guess {i}").status_code for i in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    wall = log_in(guesser, "eve", code)
    assert wall.status_code == 429
    assert 1 <= int(wall.headers["retry-after"]) <= 6
    assert set(wall.json()["detail"]) == {"got", "expected", "remedy"}
    assert log_in(TestClient(api, client=("10.0.0.2", 1)), "eve", code).status_code == 200


def test_guessing_under_many_names_meets_the_address_wall(api: FastAPI) -> None:
    api.state.limits.address = Buckets(per_s=1.0, burst=100, clock=lambda: 0.0)
    guesser = TestClient(api, client=("10.0.0.1", 1))
    assert {log_in(guesser, f"name {i}", "guess").status_code for i in range(100)} == {401}
    assert log_in(guesser, "another", "guess").status_code == 429


def test_many_right_sign_ins_from_one_address_are_fine(api: FastAPI, store: Store) -> None:
    code = store.add_rater("eve")
    assert {log_in(TestClient(api), "eve", code).status_code for _ in range(130)} == {200}


def test_a_flood_of_votes_is_429_with_retry_after(api: FastAPI, ada: TestClient) -> None:
    assert api.state.limits.votes.take("nobody") == 0  # the real wall is generous; a low one is tested
    api.state.limits.votes = Buckets(per_s=0.1, burst=20)
    body = {"assignment_id": "ab", "choice": "a", "listen_ms": {"a": 0, "b": 0}}
    answers = [ada.post("/api/v1/votes", json=body, headers={"Idempotency-Key": f"key-{i:05}"}) for i in range(22)]
    assert [answer.status_code for answer in answers] == [404] * 20 + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 10


def test_a_bucket_fills_with_time_and_memory_is_bounded() -> None:
    now = [0.0]
    buckets = Buckets(per_s=2.0, burst=3, capacity=10, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(0.5)
    now[0] = 0.5
    assert (buckets.take("a"), buckets.take("a") > 0) == (0, True)
    for i in range(1000):
        buckets.take(i)
    assert len(buckets) == 10


def test_a_large_body_is_413_or_refused(ada: TestClient) -> None:
    stated = ada.post("/api/v1/votes", content=b"x" * (MAX_BODY + 1), headers={"Content-Type": "application/json"})
    assert stated.status_code == 413
    headers = {"Content-Type": "application/json", "Idempotency-Key": "key-00001"}
    unstated = ada.post("/api/v1/votes", content=(b"x" * 65536 for _ in range(64)), headers=headers)
    assert unstated.status_code in (400, 413)


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/owner/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/owner/gradio_api/queue/join"]
)
def test_gradios_own_doors_are_closed_below_every_page(ada: TestClient, path: str) -> None:
    assert (ada.get(path).status_code, ada.post(path).status_code) == (404, 404)


def test_a_foreign_page_changes_nothing(api: FastAPI, store: Store) -> None:
    browser = TestClient(api)
    assert log_in(browser, "eve", store.add_rater("eve")).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {}):
        assert browser.post("/api/v1/logout", headers=headers).status_code == 403
    assert browser.post("/api/v1/logout", headers={"Origin": "http://testserver"}).status_code == 204


def test_no_token_is_stored_as_it_is(store: Store, tmp_path: Path) -> None:
    code = store.add_rater("eve")
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("votes.db*"))
    assert b"eve" in stored
    assert code.encode() not in stored
