"""Files on a disk, in a zip and in memory look the same; nothing outside the folder is reached."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from db import storage
from db.errors import StoreError

CONTENT = bytes(range(256)) * 3000


@pytest.fixture(params=["path", "file", "zip", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/clip.WAV").write_bytes(CONTENT)
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
            archive.write(tmp_path / "a b/clip.WAV", "a b/clip.WAV")
        return f"zip://::{tmp_path}/clips.zip"
    if request.param == "memory":
        fsspec.filesystem("memory").pipe("/storage-test/a b/clip.WAV", CONTENT)
        return "memory://storage-test"
    return str(tmp_path) if request.param == "path" else tmp_path.as_uri()


def test_a_file_reads_the_same_wherever_it_lies(folder: str) -> None:
    uri = storage.inside(folder, "a b/clip.WAV")
    assert storage.is_file(uri)
    assert not storage.is_file(storage.inside(folder, "a b/none.wav"))
    assert storage.size_bytes(uri) == len(CONTENT)
    assert storage.sha256(uri) == hashlib.sha256(CONTENT).hexdigest()
    assert b"".join(storage.read_bytes(uri)) == CONTENT
    assert b"".join(storage.read_bytes(uri, 300_000, 600_001)) == CONTENT[300_000:600_001]
    assert storage.suffix(uri) == ".wav"
    with storage.local_copy(uri) as path:
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["../clip.wav", "/etc/passwd", "a/../../x", "", "x\x00y", "http://host/x", "file:///etc/passwd"])
def test_a_name_that_leads_outside_has_no_address(folder: str, name: str) -> None:
    uri = storage.inside(folder, name)
    assert uri is None or (storage.local_path(uri) and not storage.is_file(uri))


def test_a_link_that_leads_outside_has_no_address(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/link").symlink_to("/etc")
    assert storage.inside(str(tmp_path / "inside"), "link/passwd") is None


@pytest.mark.parametrize("uri", ["/no/such/clip.wav", "memory://none/clip.wav", "nosuchstore://x/clip.wav", "zip://a.wav::/no/such.zip"])
def test_a_file_that_cannot_be_had_is_named(uri: str) -> None:
    with pytest.raises(StoreError, match=r"clip\.wav|such"):
        storage.sha256(uri)


def test_a_campaign_is_registered_from_a_zip(store: object, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for row in rows:
            archive.write(tmp_path / "clips" / row["file"], f"sub/{row['file']}")
    assert store.create_campaign("c", rows, f"zip://sub::{tmp_path}/clips.zip").n_pairs == 2
