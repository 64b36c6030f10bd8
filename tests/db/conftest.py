"""A small registered campaign, without any audio: the store knows clips by their bytes and figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from db.store import Store, open_store

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
def db_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'votes.db'}"


@pytest.fixture
def store(db_url: str) -> Iterator[Store]:
    with open_store(db_url) as opened:
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
