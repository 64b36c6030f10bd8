"""Real clips in a real campaign, behind the JSON API, the page, or a server in its own process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from db.schema import Rater
from db.store import Store, open_store
from feedback_app.api import create_api
from feedback_app.campaigns import register_campaign
from feedback_app.screen import TONES, TRIALS, Checks
from tests.feedback_app.browsing import browser, hostile_demo, playwright, visit  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SECRET = "only for these tests"


@dataclass
class Demo:
    """A database file with a campaign of `n` pairs; the clips' folder and systems have telling names."""

    folder: Path
    url: str

    def add_rater(self, handle: str) -> str:
        with open_store(self.url) as store:
            return store.add_rater(handle)


@pytest.fixture
def make_demo(tmp_path: Path) -> Callable[..., Demo]:
    """make_demo(prompts, min_listen_ms=0, target_votes=3, seconds=1.0)."""

    def make(prompts: list[str], min_listen_ms: int = 0, target_votes: int = 3, seconds: float = 1.0) -> Demo:
        folder = tmp_path / "telling-name"
        folder.mkdir()
        t = np.arange(int(8000 * seconds)) / 8000
        rows = []
        for i, prompt in enumerate(prompts):
            for j, system in enumerate(("secret-base", "secret-dpo")):
                file = folder / f"{i}_{system}.wav"
                soundfile.write(file, (0.1 + 0.3 * j) * np.sin(2 * np.pi * (220 + 10 * i + 3 * j) * t), 8000)
                rows.append(
                    {
                        "file": file.name,
                        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                        "prompt": prompt,
                        "prompt_id": f"p{i}",
                        "system": system,
                        "duration_s": seconds,
                        "sample_rate": 8000,
                    }
                )
        manifest = folder / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        demo = Demo(folder, f"sqlite:///{tmp_path / 'votes.db'}")
        with open_store(demo.url) as store:
            register_campaign(store, "c", manifest, min_listen_ms=min_listen_ms, target_votes=target_votes)
        return demo

    return make


@pytest.fixture
def demo(make_demo: Callable[..., Demo]) -> Demo:
    return make_demo([f"prompt {i}" for i in range(4)])


@pytest.fixture
def store(demo: Demo) -> Iterator[Store]:
    with open_store(demo.url, busy_timeout_s=0.1) as opened:
        yield opened


@pytest.fixture
def api(store: Store) -> FastAPI:
    return create_api(store, SECRET)


@pytest.fixture
def sign_in(api: FastAPI, store: Store) -> Callable[[str], TestClient]:
    """sign_in(handle) -> a headless client with a bearer session and no cookies."""

    def enter(handle: str) -> TestClient:
        client = TestClient(api)
        answer = client.post("/api/v1/login", json={"handle": handle, "token": store.add_rater(handle)})
        assert answer.status_code == 200, answer.text
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {answer.json()['session']}"
        return client

    return enter


@pytest.fixture
def take_check(api: FastAPI, store: Store) -> Callable[..., httpx.Response]:
    """take_check(client, right) answers so many trials of the client's open headphone check right and the others wrong."""

    def take(client: TestClient, right: int) -> httpx.Response:
        number = client.get("/api/v1/me/screen").json()["number"]
        with store.read() as session:
            rater_id = session.scalars(select(Rater.id).where(Rater.handle == client.get("/api/v1/me").json()["handle"])).one()
        checks: Checks = api.state.checks
        answers = [(checks.draw(rater_id, number, trial)[0] + (trial >= right)) % TONES for trial in range(TRIALS)]
        return client.post("/api/v1/me/screen", json={"number": number, "answers": answers})

    return take


@pytest.fixture
def ada(sign_in: Callable[[str], TestClient]) -> TestClient:
    return sign_in("ada")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[Demo], Server]]:
    """start_server(demo, *options, port=0) runs the real app in its own process, in another folder, until its ready line."""
    running: list[subprocess.Popen[str]] = []

    def start(demo: Demo, *options: str, port: int = 0) -> Server:
        command = [sys.executable, "-m", "feedback_app.app", "--db", demo.url, "--port", str(port), *options]
        with (tmp_path / "server.err").open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "ready at http://" in line, line + (tmp_path / "server.err").read_text()
        url = line.split(" at ")[1].strip()
        assert httpx.get(f"{url}/healthz", timeout=60).json() == {"ok": True, "database": "sqlite"}
        return Server(process, url)

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
