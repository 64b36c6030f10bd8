"""A snapshot: the votes as stored sides, frozen and hashed, or a refusal that leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from db.errors import ConflictError, NotFoundError, StoreError
from db.export import export_snapshot, snapshot_sha256
from db.store import Store, open_store


@pytest.fixture
def campaign(store: Store, make_rows: Callable, tmp_path: Path) -> str:
    store.create_campaign("c", make_rows(8), tmp_path / "clips", target_votes=2, min_listen_ms=0)
    return "c"


def vote_for_base(store: Store, rater: int, n: int = 99) -> int:
    """Votes for the side that plays the base's clip; listens to it for 700 ms and to the other for 300."""
    done = 0
    while done < n and (offer := store.next_assignment(rater)):
        side = next(s for s in "ab" if store.audio_file(offer.assignment_id, s, rater).uri.endswith("_base.wav"))
        heard = {"listen_a_ms": 700 if side == "a" else 300, "listen_b_ms": 700 if side == "b" else 300}
        store.submit_vote(rater, offer.assignment_id, side, idempotency_key=offer.assignment_id, **heard)
        done += 1
    return done


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sides_are_turned_back_whatever_the_page_showed(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    for rater in add_raters(2):
        assert vote_for_base(store, rater) == 8
    export_snapshot(store, campaign, tmp_path / "out", "one")
    clips = {clip["sha256"]: clip for clip in read_lines(tmp_path / "out/one/clips.jsonl")}
    votes = read_lines(tmp_path / "out/one/votes.jsonl")
    assert len(votes) == 16
    for vote in votes:
        preferred = clips[vote[f"clip_{vote['choice']}"]]
        assert preferred["system"] == "base"
        assert vote[f"listen_{vote['choice']}_ms"] == 700
        assert preferred["prompt_id"] == vote["prompt_id"]


def test_rows_carry_what_training_needs(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    vote_for_base(store, add_raters(1)[0])
    snapshot = export_snapshot(store, campaign, tmp_path / "out", "one")
    assert set(snapshot) == {
        "name", "sha256", "created_at", "campaign", "n_votes", "n_excluded", "n_raters", "schema",
    }  # fmt: skip
    assert set(read_lines(tmp_path / "out/one/votes.jsonl")[0]) == {
        "vote_id", "pair_id", "prompt_id", "prompt", "split", "rater", "choice", "clip_x", "clip_y", "listen_x_ms",
        "listen_y_ms", "confidence", "created_at", "excluded_reason", "gold", "repeat",
    }  # fmt: skip
    clip = read_lines(tmp_path / "out/one/clips.jsonl")[0]
    assert set(clip) == {
        "sha256", "uri", "codes_uri", "prompt_id", "prompt", "tempo_bpm", "genre", "system", "policy_sha256",
        "adapters", "seed", "duration_s", "sample_rate", "licence", "consent",
    }  # fmt: skip
    assert clip["seed"] >= 2**40
    assert Path(clip["uri"]).is_file()


def test_ties_and_both_bad_stay_apart(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    (rater,) = add_raters(1)
    for choice in ("tie", "both_bad"):
        store.submit_vote(rater, store.next_assignment(rater).assignment_id, choice, idempotency_key=f"key-{choice}")
    export_snapshot(store, campaign, tmp_path / "out", "one")
    assert [vote["choice"] for vote in read_lines(tmp_path / "out/one/votes.jsonl")] == ["tie", "both_bad"]


def test_the_same_votes_keep_their_hash_and_folder(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    vote_for_base(store, add_raters(1)[0])
    first = export_snapshot(store, campaign, tmp_path / "out", "one")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/one").iterdir()}
    assert export_snapshot(store, campaign, tmp_path / "out", "one") == first
    assert export_snapshot(store, campaign, tmp_path / "out", "two")["sha256"] == first["sha256"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/one").iterdir()} == before
    assert snapshot_sha256(tmp_path / "out/one") == first["sha256"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]


def test_a_name_is_never_given_to_other_votes(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    (rater,) = add_raters(1)
    vote_for_base(store, rater, 3)
    export_snapshot(store, campaign, tmp_path / "out", "one")
    before = (tmp_path / "out/one/votes.jsonl").read_bytes()
    vote_for_base(store, rater, 1)
    with pytest.raises(ConflictError, match="one"):
        export_snapshot(store, campaign, tmp_path / "out", "one")
    assert (tmp_path / "out/one/votes.jsonl").read_bytes() == before


@pytest.mark.parametrize("file", ["votes.jsonl", "clips.jsonl", "snapshot.json"])
def test_a_snapshot_that_was_tampered_with_is_not_called_the_same(
    store: Store, campaign: str, add_raters: Callable, tmp_path: Path, file: str
) -> None:
    vote_for_base(store, add_raters(1)[0])
    export_snapshot(store, campaign, tmp_path / "out", "one")
    path = tmp_path / "out/one" / file
    path.write_text(path.read_text().replace("base", "evil").replace('"sha256": "', '"sha256": "0'))
    if file == "votes.jsonl":
        path.write_text(path.read_text().replace("prompt 1", "prompt 9"))
    with pytest.raises(ConflictError):
        export_snapshot(store, campaign, tmp_path / "out", "one")


def test_a_campaign_without_votes_makes_no_folder(store: Store, campaign: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="0 votes"):
        export_snapshot(store, campaign, tmp_path / "out", "one")
    assert not (tmp_path / "out").exists()


def test_excluded_votes_are_kept_and_counted_by_reason(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    good, bad = add_raters(2)
    vote_for_base(store, good, 3)
    vote_for_base(store, bad, 2)
    store.block_rater("rater 1")
    snapshot = export_snapshot(store, campaign, tmp_path / "out", "one")
    assert (snapshot["n_votes"], snapshot["n_excluded"], snapshot["n_raters"]) == (3, {"rater_blocked": 2}, 1)
    reasons = [vote["excluded_reason"] for vote in read_lines(tmp_path / "out/one/votes.jsonl")]
    assert reasons == [None, None, None, "rater_blocked", "rater_blocked"]


def test_a_blocked_raters_votes_alone_are_no_snapshot(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    vote_for_base(store, add_raters(1)[0])
    store.block_rater("rater 0")
    with pytest.raises(StoreError, match="8 votes, 8 of them excluded"):
        export_snapshot(store, campaign, tmp_path / "out", "one")


def test_raters_go_by_pseudonyms_that_differ_between_databases(
    store: Store, make_rows: Callable, campaign: str, add_raters: Callable, tmp_path: Path
) -> None:
    for rater in add_raters(2):
        vote_for_base(store, rater)
    export_snapshot(store, campaign, tmp_path / "out", "one")
    with open_store(f"sqlite:///{tmp_path / 'other.db'}") as other:
        other.create_campaign("c", make_rows(8), tmp_path / "clips", min_listen_ms=0)
        vote_for_base(other, other.sign_in("rater 0", other.add_rater("rater 0")).id)
        export_snapshot(other, "c", tmp_path / "out", "other")
    names = {vote["rater"] for vote in read_lines(tmp_path / "out/one/votes.jsonl")}
    others = {vote["rater"] for vote in read_lines(tmp_path / "out/other/votes.jsonl")}
    assert len(names) == 2
    assert not names & others
    assert "rater 0" not in (tmp_path / "out/one/votes.jsonl").read_text()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_folder_name_is_refused(store: Store, campaign: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="snapshot name"):
        export_snapshot(store, campaign, tmp_path / "out", name)


def test_an_unknown_campaign_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        export_snapshot(store, "nowhere", tmp_path, "one")
