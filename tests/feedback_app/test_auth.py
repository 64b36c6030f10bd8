"""Sessions, cookies and requests from elsewhere."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from base_models.errors import UserError
from db.store import Store
from feedback_app.auth import CLIENT_HEADER, COOKIE, load_or_make_secret, secret_path


@pytest.fixture
def browser(api: FastAPI, store: Store) -> TestClient:
    """Signed in by cookie, as a browser is."""
    client = TestClient(api)
    token = store.add_rater("ada")
    answer = client.post("/api/v1/login", json={"handle": "ada", "token": token}, headers={"Origin": "http://testserver"})
    assert answer.status_code == 200
    return client


def send_skip(browser: TestClient, headers: dict[str, str]) -> int:
    pair = browser.get("/api/v1/pairs/next").json()
    body = {"assignment_id": pair["assignment_id"], "choice": "skip", "listen_ms": {"a": 0, "b": 0}}
    return browser.post("/api/v1/votes", json=body, headers={"Idempotency-Key": "key-00001", **headers}).status_code


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(api: FastAPI, store: Store) -> None:
    token = store.add_rater("ada")
    answer = TestClient(api).post("/api/v1/login", json={"handle": "ada", "token": token})
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(COOKIE)
    assert "httponly" in cookie
    assert "samesite=lax" in cookie


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://testserver"}, 201),
        ({CLIENT_HEADER: "1"}, 201),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, 201),
        ({}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", CLIENT_HEADER: "1"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
    ],
)
def test_a_cookie_changes_things_only_from_our_own_page(browser: TestClient, headers: dict, status: int) -> None:
    assert send_skip(browser, headers) == status


def test_another_site_cannot_sign_a_visitor_in(api: FastAPI, store: Store) -> None:
    token = store.add_rater("ada")
    answer = TestClient(api).post("/api/v1/login", json={"handle": "ada", "token": token}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("wrong", [{"token": "nope"}, {"handle": "bob"}, {"token": "\ud800"}])
def test_a_wrong_name_or_code_is_refused_alike(api: FastAPI, store: Store, wrong: dict) -> None:
    body = {"handle": "ada", "token": store.add_rater("ada")} | wrong
    answer = TestClient(api).post("/api/v1/login", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (401, 422)
    assert set(answer.json()["detail"]) == {"got", "expected", "remedy"}
    assert "set-cookie" not in answer.headers


def test_logout_ends_every_session_of_the_rater(browser: TestClient, api: FastAPI) -> None:
    session = browser.cookies[COOKIE]
    assert browser.post("/api/v1/logout", headers={"Origin": "http://testserver"}).status_code == 204
    headless = TestClient(api, headers={"Authorization": f"Bearer {session}"})
    assert headless.get("/api/v1/stats").status_code == 401
    assert browser.get("/api/v1/stats").status_code == 401


def test_a_session_of_another_secret_is_worth_nothing(ada: TestClient, api: FastAPI, store: Store) -> None:
    from feedback_app.api import create_api

    elsewhere = TestClient(create_api(store, "another secret"), headers=dict(ada.headers))
    assert ada.get("/api/v1/stats").status_code == 200
    assert elsewhere.get("/api/v1/stats").status_code == 401


def test_a_blocked_rater_is_out_at_once(ada: TestClient, store: Store) -> None:
    store.block_rater("ada")
    assert ada.get("/api/v1/pairs/next").status_code == 401


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = secret_path(f"sqlite:///{tmp_path / 'sub' / 'votes.db'}")
    assert path == tmp_path / "sub" / "votes.secret"
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: load_or_make_secret(path), range(8)))
    assert made == {load_or_make_secret(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["votes.secret"]


def test_a_server_database_needs_a_place_for_its_secret(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--secret-file") as caught:
        secret_path("postgresql://ada:hunter2@host/encore")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("prepare", [lambda p: p.mkdir(), lambda p: p.write_text("short")])
def test_a_secret_that_cannot_be_one_is_refused(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    prepare(tmp_path / "secret")
    with pytest.raises(UserError):
        load_or_make_secret(tmp_path / "secret")
