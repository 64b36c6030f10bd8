"""A snapshot: the votes as stored sides, frozen and hashed, or a refusal that leaves everything as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select, update

from db import owners
from db.errors import ConflictError, NotFoundError, StoreError
from db.export import export_preferences, export_snapshot, is_recorded, snapshot_sha256
from db.imports import import_votes
from db.leaderboard import leaderboard
from db.quality import qualities
from db.schema import Campaign, Pair, Snapshot, SnapshotRater
from db.store import Store, open_store
from db.voting import Mark


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
        "name", "sha256", "created_at", "campaign", "n_votes", "n_excluded", "n_raters", "schema", "rules",
    }  # fmt: skip
    assert set(read_lines(tmp_path / "out/one/votes.jsonl")[0]) == {
        "vote_id", "pair_id", "prompt_id", "prompt", "split", "rater", "choice", "clip_x", "clip_y", "listen_x_ms",
        "listen_y_ms", "confidence", "created_at", "excluded_reason", "gold", "repeat", "aspects", "marks", "coverage_x", "coverage_y",
        "system_x", "system_y", "comment", "kind", "shown_first", "policy", "propensity", "source", "ui_version",
        "rep", "issued_at", "events",
    }  # fmt: skip
    clip = read_lines(tmp_path / "out/one/clips.jsonl")[0]
    assert set(clip) == {
        "sha256", "uri", "codes_uri", "codes_sha256", "prompt_id", "prompt", "tempo_bpm", "genre", "system", "policy_sha256",
        "adapters", "seed", "duration_s", "sample_rate", "licence", "consent", "gen", "size_bytes", "lufs", "true_peak_dbfs",
    }  # fmt: skip
    assert clip["seed"] >= 2**40
    assert Path(clip["uri"]).is_file()


def test_a_snapshot_knows_the_codes_of_its_clips_where_they_can_be_read(
    store: Store, make_rows: Callable, add_raters: Callable, tmp_path: Path
) -> None:
    rows = make_rows(2)
    for number, row in enumerate(rows[:3]):
        row["codes_file"] = f"{number}.npy"
        (tmp_path / "clips" / row["codes_file"]).write_bytes(b"codes %d" % number)
    store.create_campaign("c", rows, tmp_path / "clips", target_votes=2, min_listen_ms=0)
    vote_for_base(store, add_raters(1)[0])
    (tmp_path / "clips" / "2.npy").unlink()
    first = export_snapshot(store, "c", tmp_path / "out", "one")
    clips = {clip["sha256"]: clip["codes_sha256"] for clip in read_lines(tmp_path / "out/one/clips.jsonl")}
    known = [hashlib.sha256(b"codes %d" % number).hexdigest() for number in range(2)]
    assert [clips[row["sha256"]] for row in rows] == [*known, None, None]
    (tmp_path / "clips" / "0.npy").write_bytes(b"others")
    assert export_snapshot(store, "c", tmp_path / "out", "two")["sha256"] != first["sha256"]


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


def test_a_rule_that_is_raised_leaves_votes_that_were_counted(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    """Snapshot, dataset, board, quality and what raters agree in: all of them judge a vote by what it was asked for."""
    (rater,) = add_raters(1)
    vote_for_base(store, rater, 5)  # 300 ms of one side
    before = export_snapshot(store, campaign, tmp_path / "out", "before")
    owners.change_rules(store, None, 1, min_listen_ms=5000)
    after = export_snapshot(store, campaign, tmp_path / "out", "after")
    assert (after["n_votes"], after["n_excluded"], after["sha256"]) == (5, {}, before["sha256"])
    assert export_preferences(store, campaign, tmp_path / "out", "trl")["n_votes"] == 5
    board = leaderboard(store, campaign)
    assert (board.n_votes, board.excluded) == (5, {})
    assert qualities(store, campaign)[rater].n_votes == 5


def test_a_blocked_raters_votes_alone_are_no_snapshot(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    vote_for_base(store, add_raters(1)[0])
    store.block_rater("rater 0")
    with pytest.raises(StoreError, match="8 votes, 8 of them excluded"):
        export_snapshot(store, campaign, tmp_path / "out", "one")


def test_the_first_two_who_ask_for_the_salt_at_once_get_the_same(store: Store, meet: Callable) -> None:
    meet("SELECT setting")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: store.pseudonym_salt(), range(2))
    assert first == second == store.pseudonym_salt()


def test_two_exports_of_the_same_votes_at_once_are_one_snapshot(
    store: Store, campaign: str, add_raters: Callable, tmp_path: Path, meet: Callable
) -> None:
    (rater,) = add_raters(1)
    vote_for_base(store, rater)
    store.pseudonym_salt()
    meet("SELECT snapshot.id")
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda name: export_snapshot(store, campaign, tmp_path / "out", name), ("one", "two"))
    assert one["sha256"] == two["sha256"]
    assert is_recorded(store, one["sha256"])
    assert [(held.sha256, held.n_votes) for held in owners.trained_on(store, "rater 0")] == [(one["sha256"], 8)]


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


def test_aspects_marks_and_coverage_follow_their_clips(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    with store.write() as session:
        session.execute(update(Campaign).values(aspects=["musicality"]))
    shown = set()
    for rater in add_raters(2):
        while offer := store.next_assignment(rater):
            base = next(s for s in "ab" if store.audio_file(offer.assignment_id, s, rater).uri.endswith("_base.wav"))
            shown.add(base)
            heard = {"coverage_a": 0.9 if base == "a" else 0.1, "coverage_b": 0.9 if base == "b" else 0.1}
            said = {"aspects": {"musicality": -2 if base == "a" else 2}, "marks": [Mark(base, 100, 900, "noise")], "comment": "clear"}
            store.submit_vote(rater, offer.assignment_id, base, idempotency_key=offer.assignment_id, **said, **heard)
    assert shown == {"a", "b"}
    export_snapshot(store, campaign, tmp_path / "out", "one")
    clips = {clip["sha256"]: clip for clip in read_lines(tmp_path / "out/one/clips.jsonl")}
    for vote in read_lines(tmp_path / "out/one/votes.jsonl"):
        side = vote["choice"]
        assert clips[vote[f"clip_{side}"]]["system"] == "base"
        assert vote["aspects"] == {"musicality": -2 if side == "x" else 2}
        assert vote["marks"] == [{"side": side, "t0_ms": 100, "t1_ms": 900, "tag": "noise"}]
        assert vote[f"coverage_{side}"] == 0.9
        assert (vote["comment"], vote["kind"], 0 < vote["propensity"] <= 1) == ("clear", "normal", True)


def test_it_is_known_whose_votes_went_out(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    good, bad = add_raters(2)
    vote_for_base(store, good, 3)
    vote_for_base(store, bad, 2)
    store.block_rater("rater 1")
    snapshot = export_snapshot(store, campaign, tmp_path / "out", "one")
    export_snapshot(store, campaign, tmp_path / "out", "two")
    with store.read() as session:
        (row,) = session.scalars(select(Snapshot)).all()
        raters = session.execute(select(SnapshotRater.rater_id, SnapshotRater.n_votes)).all()
    assert (row.name, row.sha256, row.n_votes) == ("one", snapshot["sha256"], 3)
    assert raters == [(good, 3), (bad, 0)]  # the blocked one's rows are in the file, too
    assert snapshot["n_raters"] == 1
    assert [held.n_votes for held in owners.erase_rater(store, None, bad)] == [0]


def test_a_trainer_gets_one_row_a_pair_with_ties_as_soft_labels(store: Store, campaign: str, add_raters: Callable, tmp_path: Path) -> None:
    one, two = add_raters(2)
    vote_for_base(store, one)
    for i in range(8):
        key = store.next_assignment(two).assignment_id
        store.submit_vote(two, key, "both_bad" if i < 2 else "tie", idempotency_key=key, listen_a_ms=0, listen_b_ms=0)
    snapshot = export_preferences(store, campaign, tmp_path / "out", "trl")
    rows = [row for split in ("heldout", "train") for row in read_lines(tmp_path / f"out/trl/{split}.jsonl")]
    assert (snapshot["n_pairs"], snapshot["n_votes"], len(rows)) == (8, 16, 8)
    assert sum(row["n_both_bad"] for row in rows) == 2
    for row in rows:
        assert row["chosen"].endswith("_base.wav")
        assert row["rejected"].endswith("_dpo.wav")
        expected = (1.0, 1.0) if row["n_both_bad"] else (0.75, 0.5)
        assert (row["chosen_probability"], row["margin"]) == expected
    assert snapshot_sha256(tmp_path / "out/trl") == snapshot["sha256"]
    assert export_preferences(store, campaign, tmp_path / "out", "trl") == snapshot


@pytest.mark.parametrize("policy", ["anonymise", "remove"])
def test_what_a_forgotten_rater_wrote_leaves_in_no_later_export(
    store: Store, campaign: str, add_raters: Callable, tmp_path: Path, policy: str
) -> None:
    gone, blocked, stays = add_raters(3)
    with store.write() as session:
        session.execute(update(Campaign).values(target_votes=3))
        session.execute(update(Pair).values(target_votes=3))
    for rater, words in ((gone, "Eve was here"), (blocked, "noise"), (stays, "clear")):
        for _ in range(2):
            key = store.next_assignment(rater).assignment_id
            store.submit_vote(rater, key, "tie", idempotency_key=key, comment=words, client_ms=1, events=[(5, words, "a", 0)])
    export_snapshot(store, campaign, tmp_path / "out", "before")
    (alias,) = {vote["rater"] for vote in read_lines(tmp_path / "out/before/votes.jsonl") if vote["comment"] == "Eve was here"}
    owners.set_blocked(store, None, blocked, True)
    owners.erase_rater(store, None, gone, policy)

    after = export_snapshot(store, campaign, tmp_path / "out", "after")
    text = "".join(file.read_text() for file in sorted((tmp_path / "out/after").iterdir()))
    votes = read_lines(tmp_path / "out/after/votes.jsonl")
    assert "Eve" not in text
    assert "rater 0" not in text
    assert sorted(vote["comment"] or "" for vote in votes) == ["", "", "clear", "clear", "noise", "noise"][2 * (policy == "remove") :]
    assert alias not in text  # who kept a list of pseudonyms finds nobody by it
    assert len({vote["rater"] for vote in votes}) == (3 if policy == "anonymise" else 2)
    # The board and the export count alike: the blocked are out, the nameless are in.
    board = leaderboard(store, campaign)
    assert after["n_votes"] == board.n_votes == (4 if policy == "anonymise" else 2)
    assert after["n_excluded"] == board.excluded == {"rater_blocked": 2}

    with open_store(f"sqlite:///{tmp_path / 'other.db'}") as other:
        import_votes(other, tmp_path / "out/after", "taken in")
        again = export_snapshot(other, "taken in", tmp_path / "out", "again")
        assert leaderboard(other, "taken in").n_votes == after["n_votes"]
    assert [again[key] for key in ("n_votes", "n_excluded", "n_raters")] == [after[key] for key in ("n_votes", "n_excluded", "n_raters")]


def test_a_full_disk_leaves_no_folder(
    store: Store, campaign: str, add_raters: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vote_for_base(store, add_raters(1)[0])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        export_snapshot(store, campaign, tmp_path / "out", "one")
    assert list((tmp_path / "out").iterdir()) == []
