"""The app as a process: ready, refusing in words, and losing nothing when it is killed."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from db.schema import Assignment, Pair, Vote
from db.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def run_app(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "feedback_app.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


def test_every_acknowledged_vote_survives_kill_9_and_is_there_once(make_demo: Callable, start_server: Callable) -> None:
    demo = make_demo([f"prompt {i}" for i in range(60)], target_votes=8, seconds=0.1)
    codes = {f"rater {i}": demo.add_rater(f"rater {i}") for i in range(8)}
    server = start_server(demo)
    acknowledged: list[int] = []
    enough = threading.Event()

    def rate(name: str) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            try:
                session = client.post("/api/v1/login", json={"handle": name, "token": codes[name]}).json()["session"]
                client.headers["Authorization"] = f"Bearer {session}"
                while (answer := client.get("/api/v1/pairs/next")).status_code == 200:
                    body = {"assignment_id": answer.json()["assignment_id"], "choice": "a", "listen_ms": {"a": 0, "b": 0}}
                    stored = client.post("/api/v1/votes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
                    assert stored.status_code == 201
                    acknowledged.append(stored.json()["vote_id"])
                    if len(acknowledged) >= 40:
                        enough.set()
            except httpx.TransportError:
                return  # the server is gone

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(rate, name) for name in codes]
        assert enough.wait(240)
        server.process.send_signal(signal.SIGKILL)
        for future in futures:
            future.result()
    assert server.process.wait(30) == -signal.SIGKILL

    with open_store(demo.url) as store, store.read() as session:
        votes = session.execute(select(Vote.id, Vote.assignment_id)).all()
        held = Counter(session.scalars(select(Assignment.pair_id).where(Assignment.status.in_(("leased", "voted")))))
        n_open = dict(session.execute(select(Pair.id, Pair.n_open)).all())
    assert len(acknowledged) == len(set(acknowledged)) >= 40
    assert set(acknowledged) <= {vote_id for vote_id, _ in votes}
    assert len({assignment_id for _, assignment_id in votes}) == len(votes)
    assert len(votes) - len(acknowledged) <= 8  # in flight: stored, and the answer never arrived
    assert n_open == {pair: held[pair] for pair in n_open}


def test_a_restarted_server_knows_its_sessions_and_leases_and_asks_for_consent_if_told_to(demo: object, start_server: Callable) -> None:
    code = demo.add_rater("ada")
    first = start_server(demo)
    session = httpx.post(f"{first.url}/api/v1/login", json={"handle": "ada", "token": code}, timeout=60).json()["session"]
    headers = {"Authorization": f"Bearer {session}"}
    pair = httpx.get(f"{first.url}/api/v1/pairs/next", headers=headers, timeout=60).json()
    first.process.terminate()
    assert first.process.wait(60) in (0, -signal.SIGTERM)
    second = start_server(demo)
    assert httpx.get(f"{second.url}/api/v1/pairs/next", headers=headers, timeout=60).json() == pair
    second.process.terminate()
    assert second.process.wait(60) in (0, -signal.SIGTERM)

    second = start_server(demo, "--consent-of-everyone")
    refused = httpx.get(f"{second.url}/api/v1/pairs/next", headers=headers, timeout=60)
    assert (refused.status_code, refused.json()["detail"]["got"]) == (403, "no consent yet")
    version = httpx.get(f"{second.url}/api/v1/consent", timeout=60).json()["version"]
    answer = {"version": version, "accepted": True}
    assert httpx.post(f"{second.url}/api/v1/me/consent", json=answer, headers=headers, timeout=60).status_code == 204
    assert httpx.get(f"{second.url}/api/v1/pairs/next", headers=headers, timeout=60).json() == pair

    page = httpx.get(second.url, timeout=60)
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    for path in ("upload", "file=/etc/passwd", "queue/join", "proxy=http://example.com", "info"):
        assert httpx.post(f"{second.url}/gradio_api/{path}", timeout=60).status_code == 404
        assert httpx.get(f"{second.url}/gradio_api/{path}", timeout=60).status_code == 404


def test_each_rater_that_is_named_gets_a_code_once(demo: object) -> None:
    names = [part for name in ("ada", "bo", "ada") for part in ("--rater", name)]
    command = [sys.executable, "-m", "feedback_app.app", "--db", demo.url, "--port", "0", *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        said = ""
        while "ready at" not in said and (line := process.stdout.readline()):
            said += line
        process.terminate()
    codes = dict(re.findall(r"Sign in as (\w+) with access code (\S+)", said))
    assert said.count("Sign in as") == 2
    with open_store(demo.url) as store:
        for name in ("ada", "bo"):
            rater = store.sign_in(name, codes[name])
            assert rater is not None
            assert rater.handle == name


def test_a_port_in_use_is_an_error_with_a_remedy(demo: object) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_app("--db", demo.url, "--port", str(port))
    assert ended.returncode == 2
    assert f"port {port} on 127.0.0.1, which is in use" in ended.stderr
    assert "remedy" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bad_database_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "song.db").write_bytes(b"RIFF" * 1000)
    ended = run_app("--db", f"sqlite:///{tmp_path / 'song.db'}", "--port", "0")
    assert ended.returncode == 2
    assert "no database" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_app_loads_without_torch() -> None:
    code = (
        "import sys, feedback_app.app, feedback_app.campaigns; "
        "bad = {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize("asset", ["player.js", "sounds.js", "lane.js", "steps.js", "rate.js", "page.css", "page.html"])
def test_the_page_asks_nothing_of_other_hosts(asset: str) -> None:
    text = (ROOT / "feedback_app/pages" / asset).read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "//cdn" not in text
