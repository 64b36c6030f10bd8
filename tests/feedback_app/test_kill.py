"""kill -9 of the server, 20 times under load, on both databases: every acknowledged vote is there, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert, select

from db.schema import Assignment, Campaign, Clip, Pair, Prompt, Vote
from db.store import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
N_KILLS, N_RATERS, VOTES_BETWEEN = 20, 6, 12
# Forked anew for each life, from a process that has all imports behind it: 20 full starts would take minutes. The listening
# socket outlives the server, as under a service manager; whoever connects meanwhile waits.
SERVER = """
import os, socket, sys
import uvicorn
from db.store import Store
from feedback_app.api import create_api
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    child = os.fork()
    if child == 0:
        api = create_api(Store(sys.argv[1]), "only for these tests")
        uvicorn.Server(uvicorn.Config(api, log_level="warning", access_log=False)).run(sockets=[listener])
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'votes.db'}"
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def reborn_server(url: str, tmp_path: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """(address, next_life): `next_life()` waits until the last one is dead and returns the id of the process that serves now."""
    open_store(url).close()
    with (tmp_path / "server.err").open("w") as errors:
        parent = subprocess.Popen([sys.executable, "-c", SERVER, url], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    assert parent.stdout is not None
    lines = iter(parent.stdout.readline, "")
    port, child = int(next(lines)), 0

    def next_life() -> int:
        nonlocal child
        child = int(next(lines))
        return child

    yield f"http://127.0.0.1:{port}", next_life
    parent.kill()
    os.kill(child, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()


def fill(store: Store, n_pairs: int, target_votes: int) -> None:
    with store.write() as session:
        session.execute(insert(Campaign).values(name="c", target_votes=target_votes, min_listen_ms=0, status="open"))
        session.execute(insert(Prompt).values(key="p", text="prompt", text_sha256="h", split="train"))
        common = {"prompt_id": 1, "uri": "u", "size_bytes": 1, "duration_ms": 1000, "sample_rate": 8000, "adapters": [], "gen": {}}
        session.execute(insert(Clip), [{**common, "sha256": str(i), "system": "ab"[i % 2]} for i in range(2 * n_pairs)])
        common = {"campaign_id": 1, "prompt_id": 1, "gain_x_db": 0.0, "gain_y_db": 0.0, "target_votes": target_votes}
        common |= {"system_x": "a", "system_y": "b"}
        session.execute(insert(Pair), [{**common, "clip_x_id": 2 * i + 1, "clip_y_id": 2 * i + 2} for i in range(n_pairs)])


def test_every_acknowledged_vote_is_there_once_after_20_times_kill_9(url: str, reborn_server: tuple[str, Callable[[], int]]) -> None:
    address, next_life = reborn_server
    with open_store(url) as store:
        fill(store, n_pairs=900, target_votes=2)
        codes = {name: store.add_rater(name) for name in (f"rater {i}" for i in range(N_RATERS))}
    acknowledged: dict[str, int] = {}
    resent, over, enough = Counter[str](), threading.Event(), threading.Semaphore(0)

    def insist(client: httpx.Client, method: str, path: str, **request: object) -> httpx.Response:
        """Sends until it is answered, as the page does with its outbox."""
        while True:
            try:
                return client.request(method, path, **request)
            except httpx.TransportError:
                resent[path] += 1

    def rate(name: str) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            credentials = {"handle": name, "token": codes[name]}
            session = insist(client, "POST", "/api/v1/login", json=credentials).json()["session"]
            client.headers["Authorization"] = f"Bearer {session}"
            while not over.is_set():
                pair = insist(client, "GET", "/api/v1/pairs/next")
                assert pair.status_code == 200, pair.text
                body = {"assignment_id": pair.json()["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}}
                stored = insist(client, "POST", "/api/v1/votes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
                assert stored.status_code in (200, 201), stored.text
                assert body["assignment_id"] not in acknowledged
                acknowledged[body["assignment_id"]] = stored.json()["vote_id"]
                enough.release()

    with ThreadPoolExecutor(N_RATERS) as pool:
        raters = [pool.submit(rate, name) for name in codes]
        try:
            for _ in range(N_KILLS):
                server = next_life()
                for _ in range(VOTES_BETWEEN):
                    assert enough.acquire(timeout=60)
                os.kill(server, signal.SIGKILL)
            next_life()
        finally:
            over.set()
        for rater in raters:
            rater.result(timeout=60)

    with open_store(url) as store, store.read() as session:
        votes = dict(session.execute(select(Vote.assignment_id, Vote.id)).all())
        n_votes = len(session.scalars(select(Vote.id)).all())
        held = Counter(session.scalars(select(Assignment.pair_id).where(Assignment.status.in_(("leased", "voted")))))
        n_open = dict(session.execute(select(Pair.id, Pair.n_open)).all())
    assert len(acknowledged) >= N_KILLS * VOTES_BETWEEN
    assert sum(resent.values()) >= N_KILLS  # the load was in full swing when the server died
    assert votes == acknowledged  # all were sent until answered: none is lost, none beside them
    assert n_votes == len(votes)
    assert n_open == {pair: held[pair] for pair in n_open}
