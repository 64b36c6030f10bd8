"""A small registered campaign, without any audio: the store knows clips by their bytes and figures."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from db.session import upgrade
from db.store import Store, open_store
from tests.postgres import Postgres

Rows = list[dict[str, Any]]


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., Rows]:
    """make_rows(n_prompts, systems) writes a file a clip into tmp_path/clips and returns their manifest rows."""

    def make(n_prompts: int, systems: tuple[str, ...] = ("base", "dpo"), salt: str = "") -> Rows:
        folder = tmp_path / "clips"
        folder.mkdir(exist_ok=True)
        rows = []
        for i in range(n_prompts):
            for system in systems:
                content = f"{system} {i} {salt}".encode()
                file = folder / f"{i}_{system}{salt}.wav"
                file.write_bytes(content)
                rows.append(
                    {
                        "file": file.name,
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "prompt": f"prompt {i}",
                        "prompt_id": f"p{i}",
                        "split": "heldout" if i % 2 else "train",
                        "system": system,
                        "duration_s": 6.0,
                        "sample_rate": 16000,
                        "tempo_bpm": 120.0,
                        "genre": "jazz",
                        "seed": 2**40 + i,
                        "policy_sha256": "ab" * 32,
                        "adapters": [],
                        "gen": {"temperature": 1.0},
                        "licence": "CC0-1.0",
                        "consent": "made here",
                        "lufs": -20.0 - 4 * (system == "dpo"),
                        "true_peak_dbfs": -6.0,
                    }
                )
        return rows

    return make


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'votes.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | str]:
    """migrated(kind): a database at the newest schema to copy from: migrating each anew would take longer than the tests."""

    @functools.cache
    def make(kind: str, postgres: Postgres | None = None) -> Path | str:
        if postgres is not None:
            url = postgres.new_database()
            upgrade(url)
            return url.split("/")[3].split("?")[0]
        path = tmp_path_factory.mktemp("migrated") / "votes.db"
        upgrade(f"sqlite:///{path}")
        return path

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, migrated: Callable[..., Path | str], tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        shutil.copy(migrated("sqlite"), tmp_path / "votes.db")
        url = f"sqlite:///{tmp_path / 'votes.db'}"
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.new_database(str(migrated("postgresql", postgres)))
    with Store(url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    with open_store(sqlite_url) as opened:
        yield opened


@pytest.fixture
def add_raters(store: Store) -> Callable[[int], list[int]]:
    """add_raters(n) -> their ids."""

    def add(n: int) -> list[int]:
        ids = []
        for i in range(n):
            rater = store.sign_in(f"rater {i}", store.add_rater(f"rater {i}"))
            assert rater is not None
            ids.append(rater.id)
        return ids

    return add


@pytest.fixture
def meet(store: Store) -> Callable[[str], None]:
    """meet(beginning): from now on the first two who have run a statement that begins so go on together, or after half a second."""

    def make(beginning: str) -> None:
        both = threading.Barrier(2)

        def wait(*told: Any) -> None:
            if told[2].startswith(beginning):
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(timeout=0.5)

        event.listen(store.engine, "after_cursor_execute", wait)

    return make
