"""The TRL export is a preference dataset: `datasets` loads it and TRL takes its rows as they are."""

# ruff: noqa: F811  (fixtures that come from another folder)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_dataset
from trl.data_utils import is_conversational, maybe_extract_prompt, unpair_preference_dataset

from db.export import export_preferences
from db.store import Store
from tests.db.conftest import add_raters, make_rows, sqlite_store, sqlite_url  # noqa: F401


@pytest.fixture
def store(sqlite_store: Store) -> Store:
    return sqlite_store


def test_it_loads_by_split_and_fits_trls_preference_format(
    store: Store,
    make_rows: Callable,
    add_raters: Callable,
    tmp_path: Path,
) -> None:
    store.create_campaign("c", make_rows(4), tmp_path / "clips", min_listen_ms=0)
    for rater, choices in zip(add_raters(2), (("a", "a", "tie", "tie"), ("a", "b", "tie", "both_bad")), strict=True):
        for choice in choices:
            key = store.next_assignment(rater).assignment_id
            store.submit_vote(rater, key, choice, idempotency_key=key)
    export_preferences(store, "c", tmp_path, "trl")
    files = {split: str(tmp_path / f"trl/{split}.jsonl") for split in ("train", "heldout")}
    loaded = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 2, "heldout": 2}
    for split, rows in loaded.items():
        kinds = {name: feature.dtype for name, feature in rows.features.items()}
        assert [kinds[name] for name in ("prompt", "chosen", "rejected")] == ["string"] * 3
        assert kinds["margin"] == kinds["chosen_probability"] == "float64"
        for row in rows:
            assert not is_conversational(row)
            assert maybe_extract_prompt(row) == row  # an explicit prompt
            assert 0.5 <= row["chosen_probability"] <= 1
            assert row["margin"] == pytest.approx(2 * row["chosen_probability"] - 1)
            assert row["prompt"].startswith("prompt ")
            assert Path(row["chosen"]).is_file()
            assert Path(row["rejected"]).is_file()
        unpaired = unpair_preference_dataset(rows.select_columns(["prompt", "chosen", "rejected"]))  # KTO's format
        assert sorted(unpaired["label"]) == [False] * 2 + [True] * 2, split
