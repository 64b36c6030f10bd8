"""A server whose disk fills up: a vote that found no room is refused in words, and is stored once when there is room again."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from db.store import open_store
from feedback_app.campaigns import register_campaign
from tests.feedback_app.browsing import votes_of
from tests.small_disk import WAYS, make_small_disk  # noqa: F401


@pytest.mark.parametrize("way", WAYS)
def test_no_vote_is_acknowledged_that_found_no_room(way, make_demo, start_server, make_small_disk):  # noqa: F811
    disk = make_small_disk(way)
    demo = replace(make_demo([f"prompt {i}" for i in range(3)]), url=f"sqlite:///{disk.folder / 'votes.db'}")
    with open_store(demo.url) as store:
        register_campaign(store, "c", demo.folder / "manifest.jsonl", min_listen_ms=0)
    code = demo.add_rater("ada")
    server = start_server(demo)
    with httpx.Client(base_url=server.url, timeout=60) as ada:
        session = ada.post("/api/v1/login", json={"handle": "ada", "token": code}).json()["session"]
        ada.headers["Authorization"] = f"Bearer {session}"

        def vote(pair: dict, key: str) -> httpx.Response:
            body = {"assignment_id": pair["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}, "comment": "warm " * 400}
            return ada.post("/api/v1/votes", json=body, headers={"Idempotency-Key": key})

        acknowledged = [vote(ada.get("/api/v1/pairs/next").json(), "key-00001").json()["vote_id"]]
        pair = ada.get("/api/v1/pairs/next").json()
        disk.fill(server.process.pid)
        for _ in range(3):
            refused = vote(pair, "key-00002")
            assert refused.status_code == 503, refused.text
            told = refused.json()["detail"]
            assert set(told) == {"got", "expected", "remedy"}
            assert "disk" in told["got"] + told["expected"] + told["remedy"]
            assert refused.headers["Retry-After"]
        assert ada.get("/healthz").status_code in (200, 503)  # it lives
        disk.make_room(server.process.pid)
        stored = vote(pair, "key-00002")
        assert stored.status_code == 201, stored.text
        acknowledged.append(stored.json()["vote_id"])
        assert [row.id for row, _, _ in votes_of(demo.url)] == acknowledged
        assert ada.get("/api/v1/pairs/next").status_code == 200
