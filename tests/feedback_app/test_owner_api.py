"""The owner's endpoints: for owners alone, below the data roots alone, and all on record."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event

from db.store import Store
from feedback_app.owner_api import Premises, add_owner_api

OPEN = {"/healthz", "/api/v1/login", "/api/v1/invitation", "/api/v1/join", "/api/v1/consent"}


@pytest.fixture
def api(api: FastAPI, demo: object, tmp_path: Path) -> FastAPI:
    add_owner_api(api, Premises((str(demo.folder),), tmp_path / "state"))
    return api


@pytest.fixture
def boss(api: FastAPI, store: Store) -> TestClient:
    client = TestClient(api)
    answer = client.post("/api/v1/login", json={"handle": "boss", "token": store.add_rater("boss", "owner")})
    client.cookies.clear()
    client.headers["Authorization"] = f"Bearer {answer.json()['session']}"
    return client


def endpoints(api: FastAPI) -> list[tuple[str, str]]:
    paths = api.openapi()["paths"]
    return [(method.upper(), path) for path, item in paths.items() for method in item]


def test_every_endpoint_but_the_doors_needs_a_session_and_the_owners_need_an_owner(api: FastAPI, ada: TestClient) -> None:
    nobody = TestClient(api, headers={"Authorization": "Bearer forged.session.here"})
    found = endpoints(api)
    assert len([path for _, path in found if path.startswith("/api/v1/owner/")]) >= 15
    for method, path in found:
        address = path.replace("{token}", "x").replace("{name}", "x").format(campaign_id=1, rater_id=1, invitation_id=1, number=0, trial=0)
        if path not in OPEN:
            assert nobody.request(method, address, json={}).status_code == 401, (method, path)
        if path.startswith("/api/v1/owner/"):
            assert ada.request(method, address, json={}).status_code == 403, (method, path)


def test_an_owner_makes_runs_and_freezes_a_campaign(
    boss: TestClient, ada: TestClient, demo: object, tmp_path: Path, take_check: Callable
) -> None:
    wanted = {"name": "new", "sources": [{"path": str(demo.folder)}], "rules": {"min_listen_ms": 0, "target_votes": 1}, "n_gold": 2}
    made = boss.post("/api/v1/owner/campaigns", json=wanted)
    counted = {"name": "new", "n_clips": 10, "n_pairs": 4, "n_new_pairs": 4, "n_gold": 2, "n_named": 0}
    assert (made.status_code, made.json()) == (201, counted)
    row = boss.get("/api/v1/owner/house").json()["campaigns"][1]
    assert (row["n_pairs"], row["n_gold"], row["votes_wanted"]) == (4, 2, 4)
    url = f"/api/v1/owner/campaigns/{row['id']}"
    assert boss.put(f"{url}/status", json={"status": "paused"}).status_code == 204
    assert ada.get("/api/v1/pairs/next?campaign=new").status_code == 204
    boss.put(f"{url}/status", json={"status": "open"})
    assert boss.patch(f"{url}/rules", json={"aspects": ["musicality"], "target_votes": 2}).json()["aspects"] == ["musicality"]
    assert boss.patch(f"{url}/rules", json={"require_screen": True}).json()["require_screen"]
    assert ada.get("/api/v1/pairs/next?campaign=new").json()["detail"]["step"] == "check"
    take_check(ada, 6)

    pair = ada.get("/api/v1/pairs/next?campaign=new").json()
    ballot = {"assignment_id": pair["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}}
    assert ada.post("/api/v1/votes", json=ballot, headers={"Idempotency-Key": "key-00001"}).status_code == 201
    results = boss.get(f"{url}/results").json()
    assert {standing["system"] for standing in results["standings"]} == {"secret-base", "secret-dpo"}
    assert results["raters"][0]["handle"] == "ada"

    frozen = boss.post(f"{url}/snapshots", json={"name": "first"})
    assert (frozen.status_code, frozen.json()["n_votes"]) == (201, 1)
    boss.post(f"{url}/snapshots", json={"name": "broken"})
    (tmp_path / "state/snapshots/broken/snapshot.json").write_text("[1")
    first, broken = boss.get("/api/v1/owner/snapshots").json()
    assert {key: first[key] for key in ("name", "campaign", "n_votes")} == {"name": "first", "campaign": "new", "n_votes": 1}
    assert first["sha256"] == frozen.json()["sha256"]
    assert broken == {"name": "broken", "campaign": None, "sha256": None, "n_votes": None, "created_at": None}
    packed = boss.get("/api/v1/owner/snapshots/first")
    names = zipfile.ZipFile(io.BytesIO(packed.content)).namelist()
    assert {"first/votes.jsonl", "first/clips.jsonl", "first/snapshot.json"} <= set(names)
    done = [entry["action"] for entry in boss.get("/api/v1/owner/audit").json()]
    assert {"snapshot.make", "campaign.rules", "campaign.status", "campaign.fill"} <= set(done)


def test_looking_writes_nothing_but_a_copy_goes_on_record(boss: TestClient, ada: TestClient, store: Store, api: FastAPI) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    ballot = {"assignment_id": pair["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}}
    assert ada.post("/api/v1/votes", json=ballot, headers={"Idempotency-Key": "key-00001"}).status_code == 201
    rater_id = next(row["id"] for row in boss.get("/api/v1/owner/raters").json() if row["handle"] == "ada")
    written: list[str] = []
    writes = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE")
    event.listen(store.engine, "before_cursor_execute", lambda *told: written.extend([told[2]] * told[2].startswith(writes)))
    pages = [path for method, path in endpoints(api) if method == "GET" and path.startswith("/api/v1/owner/")]
    assert "/api/v1/owner/campaigns/{campaign_id}/results" in pages
    for path in pages:
        written.clear()
        assert boss.get(path.format(campaign_id=1, rater_id=rater_id, name="none")).status_code in (200, 404)
        assert [statement.split("(")[0].strip() for statement in written] == (
            ["BEGIN IMMEDIATE", "INSERT INTO audit"] if path.endswith("/copy") else []
        ), path


@pytest.mark.parametrize(
    "path", ["/etc", "../", "..", "/etc/passwd", "file:///etc", "http://localhost/x", "'; drop table vote; --", "memory://"]
)
def test_clips_outside_the_data_roots_are_refused(boss: TestClient, demo: object, path: str) -> None:
    for address in (path, f"{demo.folder}/{path}"):
        answer = boss.post("/api/v1/owner/campaigns", json={"name": "x", "sources": [{"path": address}]})
        assert answer.status_code == 422, address
        assert set(answer.json()["detail"]) == {"got", "expected", "remedy"}
    assert len(boss.get("/api/v1/owner/house").json()["campaigns"]) == 1


def test_a_campaign_that_takes_long_is_made_in_the_background_whole_or_not_at_all(
    boss: TestClient, demo: object, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> tuple[float, float]:
        heard.set()
        assert go_on.wait(30)
        return -20.0, -3.0

    def house() -> dict:
        return boss.get("/api/v1/owner/house").json()

    monkeypatch.setattr("feedback_app.owner_api.ANSWER_WITHIN_S", 0.05)
    monkeypatch.setattr("feedback_app.campaigns.measure", slow)
    twin = demo.folder / "twin"
    twin.mkdir()
    rows = [json.loads(line) for line in (demo.folder / "manifest.jsonl").read_text().split("\n") if line]
    for row in rows:
        (twin / row["file"]).write_bytes((demo.folder / row["file"]).read_bytes())
    (twin / "manifest.jsonl").write_text("".join(json.dumps(row | {"prompt": "anew"}) + "\n" for row in rows))
    for name in ("first", "second"):
        answer = boss.post("/api/v1/owner/campaigns", json={"name": name, "sources": [{"path": str(twin)}]})
        assert (answer.status_code, answer.json()["made"]) == (202, None)
    assert heard.wait(30)
    second, first = house()["fills"]
    assert (first["state"], first["stage"], first["total"]) == ("running", "measuring loudness", len(rows))
    assert second["state"] == "waiting"
    assert [campaign["name"] for campaign in house()["campaigns"]] == ["c"]  # nothing is half-made
    assert boss.get("/healthz").status_code == 200
    (twin / rows[-1]["file"]).write_bytes(b"changed meanwhile")
    go_on.set()
    deadline = time.monotonic() + 30
    while house()["fills"][0]["state"] in ("waiting", "running") and time.monotonic() < deadline:
        time.sleep(0.02)
    second, first = house()["fills"]
    assert (first["state"], first["made"]["n_clips"], first["problem"]) == ("done", len(rows), None)
    assert (second["state"], second["made"]) == ("failed", None)
    assert "sha256" in second["problem"]["got"]
    assert [campaign["name"] for campaign in house()["campaigns"]] == ["c", "first"]


def test_an_invitation_is_shown_once(boss: TestClient, api: FastAPI) -> None:
    token = boss.post("/api/v1/owner/invitations", json={"campaign_id": 1, "max_uses": 2, "note": "<b>class</b>"}).json()["token"]
    (listed,) = boss.get("/api/v1/owner/invitations").json()
    assert (listed["campaign"], listed["note"], listed["max_uses"], listed["n_used"]) == ("c", "<b>class</b>", 2, 0)
    assert token not in json.dumps(boss.get("/api/v1/owner/audit").json()) + json.dumps(listed)
    knock = {"json": {"invitation": token}}
    assert TestClient(api).post("/api/v1/invitation", **knock).status_code == 204
    assert boss.delete(f"/api/v1/owner/invitations/{listed['id']}").status_code == 204
    assert TestClient(api).post("/api/v1/invitation", **knock).status_code in (404, 422)


def test_a_rater_is_blocked_copied_and_forgotten(boss: TestClient, ada: TestClient, sign_in: Callable[[str], TestClient]) -> None:
    people = {row["handle"]: row["id"] for row in boss.get("/api/v1/owner/raters").json()}
    ada.get("/api/v1/pairs/next")
    url = f"/api/v1/owner/raters/{people['ada']}"
    assert boss.put(f"{url}/block").status_code == 204
    assert ada.get("/api/v1/pairs/next").status_code == 401
    copy = boss.get(f"{url}/copy").json()
    assert (copy["rater"]["handle"], len(copy["assignments"])) == ("ada", 1)
    assert boss.post(f"{url}/erasure", json={"votes": "remove"}).json() == {"snapshots": []}
    left = [row["handle"] for row in boss.get("/api/v1/owner/raters").json()]
    assert "ada" not in left
    assert boss.put(f"/api/v1/owner/raters/{people['boss']}/block").status_code == 422
    assert boss.get("/api/v1/owner/raters/99/copy").status_code == 404


def test_without_roots_or_a_folder_the_server_says_what_to_start_it_with(store: Store, boss: TestClient, api: FastAPI) -> None:
    api.state.premises = Premises()
    answer = boss.post("/api/v1/owner/campaigns", json={"name": "x", "sources": [{"path": "/tmp"}]})
    assert "--data-root" in answer.json()["detail"]["remedy"]
    assert "--state-dir" in boss.post("/api/v1/owner/campaigns/1/snapshots", json={"name": "x"}).json()["detail"]["remedy"]
