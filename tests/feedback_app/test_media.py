"""Audio addresses: for one rater, one side, one lease; bytes with ranges and nothing else."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from db.schema import Clip
from db.store import Store
from feedback_app.media import Ticket, Tickets


def test_a_clip_is_whole_private_and_unnamed(ada: TestClient, demo: object) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    clip = ada.get(pair["audio"]["a"])
    assert clip.status_code == 200
    assert clip.content in {path.read_bytes() for path in demo.folder.glob("*.wav")}
    assert clip.headers["content-type"] == "audio/wav"
    assert clip.headers["cache-control"] == "private, max-age=1800, immutable"
    assert clip.headers["x-content-type-options"] == "nosniff"
    assert "content-disposition" not in clip.headers
    assert clip.headers["last-modified"].endswith("1970 00:00:00 GMT")


def test_the_two_sides_are_the_two_clips(ada: TestClient) -> None:
    pair = ada.get("/api/v1/pairs/next").json()
    a, b = (ada.get(pair["audio"][side]).content for side in "ab")
    assert a != b
    assert ada.get("/api/v1/pairs/next").json()["audio"] == pair["audio"]  # cacheable: one lease, one address


@pytest.mark.parametrize(("asked", "part"), [("bytes=0-9", slice(0, 10)), ("bytes=100-", slice(100, None)), ("bytes=-7", slice(-7, None))])
def test_a_range_is_answered_206(ada: TestClient, asked: str, part: slice) -> None:
    address = ada.get("/api/v1/pairs/next").json()["audio"]["a"]
    whole = ada.get(address).content
    answer = ada.get(address, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"].endswith(f"/{len(whole)}")


def test_a_range_beyond_the_end_is_416(ada: TestClient) -> None:
    address = ada.get("/api/v1/pairs/next").json()["audio"]["a"]
    assert ada.get(address, headers={"Range": "bytes=99999999-"}).status_code == 416


def test_a_tampered_address_is_403(ada: TestClient) -> None:
    address = ada.get("/api/v1/pairs/next").json()["audio"]["a"]
    head, token = address.rsplit("/", 1)
    for i in (0, len(token) // 2, len(token) - 2):
        forged = token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]
        assert ada.get(f"{head}/{forged}").status_code == 403
    assert ada.get(f"{head}/nonsense").status_code == 403
    assert ada.get(address).status_code == 200


def test_another_raters_address_is_403(ada: TestClient, sign_in: Callable[[str], TestClient]) -> None:
    address = ada.get("/api/v1/pairs/next").json()["audio"]["a"]
    assert sign_in("bob").get(address).status_code == 403


def test_an_expired_address_is_403(ada: TestClient) -> None:
    tickets = Tickets("only for these tests")
    pair = ada.get("/api/v1/pairs/next").json()
    for expires_at, status in [(int(time.time()) - 1, 403), (int(time.time()) + 60, 200)]:
        token = tickets.sign(Ticket(pair["assignment_id"], "a", 1, expires_at))
        assert ada.get(f"/api/v1/audio/{token}").status_code == status


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(b"other")])
def test_a_clip_that_is_gone_or_changed_is_410(ada: TestClient, demo: object, change: Callable[[Path], object]) -> None:
    address = ada.get("/api/v1/pairs/next").json()["audio"]["a"]
    for path in demo.folder.glob("*.wav"):
        change(path)
    answer = ada.get(address)
    assert answer.status_code == 410
    assert "telling-name" not in answer.text


@pytest.fixture
def moved(demo: object, store: Store, tmp_path: Path) -> Path:
    """The campaign's clips now lie in a zip, which is no local file system."""
    archive = tmp_path / "telling-name.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed, store.write() as session:
        for clip in session.scalars(select(Clip)):
            packed.write(clip.uri, Path(clip.uri).name)
            clip.uri = f"zip://{Path(clip.uri).name}::{archive}"
    return archive


@pytest.mark.parametrize(
    ("asked", "part"),
    [(None, slice(None)), ("bytes=0-9", slice(0, 10)), ("bytes=100-", slice(100, None)), ("bytes=-7", slice(-7, None)),
     ("bytes=0-99999999", slice(None)), ("bytes=1-2,5-6", slice(None)), ("bytes=9-3", slice(None)), ("lines=1-2", slice(None))],
)  # fmt: skip
def test_a_clip_in_another_store_has_ranges_too(ada: TestClient, moved: Path, demo: object, asked: str | None, part: slice) -> None:
    answer = ada.get(ada.get("/api/v1/pairs/next").json()["audio"]["a"], headers={"Range": asked} if asked else {})
    whole = next(content for content in (path.read_bytes() for path in demo.folder.glob("*.wav")) if content[part] == answer.content)
    partial = asked is not None and answer.headers.get("content-range")
    assert answer.status_code == (206 if partial else 200)
    assert bool(partial) == (asked is not None and asked.startswith("bytes=") and "," not in asked and asked != "bytes=9-3")
    if partial:
        assert answer.headers["content-range"].endswith(f"/{len(whole)}")
    assert answer.headers["content-length"] == str(len(answer.content))
    assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("audio/wav", "bytes")
    assert "telling" not in str(answer.headers)


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_end_of_another_stores_clip_is_416(ada: TestClient, moved: Path, asked: str) -> None:
    assert ada.get(ada.get("/api/v1/pairs/next").json()["audio"]["a"], headers={"Range": asked}).status_code == 416


def test_a_store_that_is_gone_is_410_and_is_not_named(ada: TestClient, moved: Path) -> None:
    moved.unlink()
    answer = ada.get(ada.get("/api/v1/pairs/next").json()["audio"]["a"])
    assert answer.status_code == 410
    assert "telling-name" not in answer.text
