"""Clips that lie on another machine: registered, heard with ranges and lost again, over FTP on loopback by fsspec's own driver."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from base_models.audio import write_audio
from db.campaigns import Rules
from db.errors import StoreError
from db.schema import Clip
from db.store import Store, open_store
from feedback_app.api import create_api
from feedback_app.campaigns import Source, fill_campaign


class Remote:
    """A server in a process of its own that hands out a folder; `address` is for fsspec."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-W", "ignore", "-m", "pyftpdlib", "--interface", "127.0.0.1", "--port", "0", "--directory", str(folder)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said += line
            if found := re.search(r"starting FTP server on 127\.0\.0\.1:(\d+)", line):
                self.address = f"ftp://127.0.0.1:{found[1]}/telling"
                break
        else:
            pytest.fail(f"no FTP server: {said}")
        self._drain = threading.Thread(target=self._process.stderr.read)
        self._drain.start()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._drain.join(30)
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    clips = tmp_path / "remote" / "telling"
    clips.mkdir(parents=True)
    rows = []
    for i in range(4):
        tone = (0.1 + 0.1 * i) * np.sin(np.arange(160_000, dtype=np.float32) * (0.1 + 0.01 * i))
        write_audio(clips / f"{i}.wav", tone, 16000)
        rows.append({"file_name": f"{i}.wav", "prompt": f"prompt {i // 2}", "system": f"system {i % 2}"})
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    running = Remote(tmp_path / "remote")
    yield running
    running.stop()


@pytest.fixture
def store(remote: Remote, tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path / 'votes.db'}") as opened:
        assert fill_campaign(opened, "c", [Source(remote.address)], Rules(min_listen_ms=0)).n_pairs == 2
        yield opened


@pytest.fixture
def ada(store: Store) -> TestClient:
    client = TestClient(create_api(store, "only for these tests"))
    assert client.post("/api/v1/login", json={"handle": "ada", "token": store.add_rater("ada")}).status_code == 200
    return client


def test_clips_of_another_machine_are_measured_and_heard_whole_and_in_part_by_many_at_once(
    ada: TestClient, store: Store, remote: Remote
) -> None:
    with store.read() as session:
        clips = session.scalars(select(Clip)).all()
    assert {clip.uri.rpartition("/")[0] for clip in clips} == {remote.address}
    assert sorted(clip.lufs for clip in clips) == [clip.lufs for clip in sorted(clips, key=lambda clip: clip.uri)]  # each louder
    files = {path.read_bytes() for path in (remote.folder / "telling").glob("*.wav")}
    pair = ada.get("/api/v1/pairs/next").json()
    whole = {side: ada.get(pair["audio"][side]).content for side in "ab"}
    assert set(whole.values()) <= files
    assert whole["a"] != whole["b"]

    def part(i: int) -> bool:
        side, start = "ab"[i % 2], 37_000 * i
        answer = ada.get(pair["audio"][side], headers={"Range": f"bytes={start}-{start + 70_000 - 1}"})
        return (answer.status_code, answer.content) == (206, whole[side][start : start + 70_000])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(part, range(8)))


def test_a_store_that_is_gone_is_410_to_the_rater_without_its_name_and_an_error_in_words_to_the_owner(
    ada: TestClient, store: Store, remote: Remote
) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    remote.stop()
    answer = ada.get(pair["audio"]["a"])
    assert answer.status_code == 410
    assert answer.json()["detail"]["remedy"] == "skip this pair"
    assert not any(word in answer.text for word in ("telling", "ftp", "127.0.0.1"))
    with pytest.raises(StoreError, match="telling") as told:
        fill_campaign(store, "d", [Source(remote.address)], Rules())
    assert told.value.remedy == "check its address, its permissions and the store's driver"
