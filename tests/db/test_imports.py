"""Votes from elsewhere: what a round trip keeps, what is read from others' files, and how wrong rows are told."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from db.errors import StoreError
from db.export import export_snapshot
from db.imports import import_votes
from db.leaderboard import leaderboard
from db.schema import Assignment, Campaign, Clip, Pair, Rater, Vote
from db.store import Store, open_store
from db.voting import Mark

ROW = {
    "prompt": "a waltz", "audio_a": "a.wav", "audio_b": "b.wav", "system_a": "s1", "system_b": "s2", "choice": "A", "rater": "ann",
    "time": "2025-08-01T10:00:00+00:00",
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def count(store: Store, table: type) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_round_trip_loses_nothing(store: Store, make_rows: Callable, add_raters: Callable, tmp_path: Path) -> None:
    store.create_campaign("c", make_rows(10), tmp_path / "clips", target_votes=4, min_listen_ms=0)
    rng = random.Random(0)
    with store.write() as session:
        session.execute(update(Campaign).values(aspects=["prompt_fit", "musicality"]))
    for rater in add_raters(4):
        while offer := store.next_assignment(rater, rng=rng):
            said = {
                "aspects": {name: rng.randint(-2, 2) for name in rng.sample(["prompt_fit", "musicality"], rng.randint(0, 2))},
                "marks": [Mark(rng.choice("ab"), 100 * i, 100 * i + 50, "noise") for i in range(rng.randint(0, 2))],
                "coverage_a": rng.choice([None, 0.25]), "coverage_b": rng.choice([None, 1.0]),
                "confidence": rng.choice([None, 1, 3]), "ui_version": "7",
                "comment": rng.choice([None, 'häßlich, "quoted"\nand \u2028 cut']),
            }  # fmt: skip
            choice = rng.choice(["a", "b", "tie", "both_bad"])
            store.submit_vote(
                rater,
                offer.assignment_id,
                choice,
                idempotency_key=offer.assignment_id,
                listen_a_ms=rng.randint(0, 9),
                listen_b_ms=0,
                **said,
            )
    store.block_rater("rater 3")
    with store.write() as session:
        golds = session.scalars(select(Pair.id).order_by(Pair.id).limit(2)).all()
        session.execute(update(Pair).where(Pair.id.in_(golds)).values(gold="y"))
        session.execute(update(Assignment).where(Assignment.pair_id.in_(golds)).values(kind="gold"))
    first = export_snapshot(store, "c", tmp_path / "out", "first")
    with open_store(f"sqlite:///{tmp_path / 'other.db'}") as other:
        found = import_votes(other, tmp_path / "out/first", "taken in")
        again = import_votes(other, tmp_path / "out/first", "taken in")
        second = export_snapshot(other, "taken in", tmp_path / "out", "second")
    assert (found.n_votes, found.n_raters, found.n_pairs) == (40, 4, 10)
    assert (again.n_votes, again.n_known) == (0, 40)
    assert {key: first[key] for key in ("n_votes", "n_excluded", "n_raters", "rules")} == {
        key: second[key] for key in ("n_votes", "n_excluded", "n_raters", "rules")
    }
    assert lines(tmp_path / "out/first/clips.jsonl") == lines(tmp_path / "out/second/clips.jsonl")
    before, after = (lines(tmp_path / f"out/{name}/votes.jsonl") for name in ("first", "second"))
    pairs = {one["pair_id"]: other["pair_id"] for one, other in zip(before, after, strict=True)}
    assert len(set(pairs.values())) == 10
    for one, other in zip(before, after, strict=True):
        assert other.pop("source") == "import:first"
        assert pairs[one["pair_id"]] == other["pair_id"]
        for renamed in ("vote_id", "pair_id"):
            one.pop(renamed), other.pop(renamed)
        one.pop("source")
        assert one == other


def test_a_changed_snapshot_is_refused(store: Store, make_rows: Callable, add_raters: Callable, tmp_path: Path) -> None:
    store.create_campaign("c", make_rows(2), tmp_path / "clips", min_listen_ms=0)
    (rater,) = add_raters(1)
    key = store.next_assignment(rater).assignment_id
    store.submit_vote(rater, key, "a", idempotency_key=key, listen_a_ms=0, listen_b_ms=0)
    export_snapshot(store, "c", tmp_path, "one")
    votes = tmp_path / "one/votes.jsonl"
    votes.write_text(votes.read_text().replace("prompt", "prompts"))
    with pytest.raises(StoreError, match="changed since its export"):
        import_votes(store, tmp_path / "one", "d")


def test_csv_and_json_lines_make_the_same_votes(store: Store, tmp_path: Path) -> None:
    rows = [ROW, ROW | {"rater": "bob", "choice": "tie"}, ROW | {"prompt": "a march", "choice": "both_bad", "listen_a_ms": "4000"}]
    with (tmp_path / "v.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROW, "listen_a_ms"])
        writer.writeheader()
        writer.writerows(rows)
    write_lines(tmp_path / "v.jsonl", rows)
    assert import_votes(store, tmp_path / "v.csv", "one").n_votes == 3
    assert import_votes(store, tmp_path / "v.jsonl", "two").n_votes == 3
    boards = [leaderboard(store, name) for name in ("one", "two")]
    assert [(board.n_votes, board.n_both_bad, board.n_raters) for board in boards] == [(2, 1, 2)] * 2
    assert boards[0].standings[0].system == "s1"
    with store.read() as session:
        assert set(session.scalars(select(Rater.status))) == {"external"}
        assert set(session.scalars(select(Vote.source))) == {"import:v.csv", "import:v.jsonl"}
    assert store.sign_in("ann", "") is None
    assert export_snapshot(store, "one", tmp_path / "out", "one")["n_raters"] == 2


def test_every_wrong_row_is_told_and_nothing_is_stored(store: Store, tmp_path: Path) -> None:
    wrong = [
        ROW, ROW | {"choice": "left"}, {k: v for k, v in ROW.items() if k != "time"}, ROW | {"audio_b": "a.wav"}, ROW | {"time": "soon"},
        ROW | {"listen_a_ms": -1}, ["no", "object"], ROW | {"rater": ""}, ROW | {"duration_a_s": "nan"},
        ROW | {"sha256_a": "'; drop table vote"},
    ]  # fmt: skip
    with pytest.raises(StoreError) as caught:
        import_votes(store, write_lines(tmp_path / "v.jsonl", wrong), "c")
    told = str(caught.value)
    assert "9 wrong rows" in told
    assert all(f"line {number}: " in told for number in range(2, 11))
    assert "line 1: " not in told
    assert [count(store, table) for table in (Campaign, Rater, Clip, Pair, Vote)] == [0] * 5


def test_a_name_that_is_a_rater_here_is_refused_as_a_whole(store: Store, tmp_path: Path) -> None:
    store.add_rater("bob")
    with pytest.raises(StoreError, match="line 2: rater 'bob'"):
        import_votes(store, write_lines(tmp_path / "v.jsonl", [ROW, ROW | {"rater": "bob"}]), "c")
    assert count(store, Vote) == count(store, Campaign) == 0


@pytest.mark.parametrize("content", ["", "\n", "{", "\ufeff"])
def test_a_file_without_votes_is_refused(store: Store, tmp_path: Path, content: str) -> None:
    (tmp_path / "v.jsonl").write_text(content)
    with pytest.raises(StoreError):
        import_votes(store, tmp_path / "v.jsonl", "c")
    with pytest.raises(StoreError, match="readable file"):
        import_votes(store, tmp_path / "nowhere.jsonl", "c")


def test_music_arenas_rows_and_battle_logs_tell_the_same(store: Store, tmp_path: Path) -> None:
    published = {
        "battle_uuid": "b1", "prompt": "a waltz", "preference": "B", "user_pseudonym": "u1", "timestamp": 1754042400.0, "audio_a": "",
        "audio_b": "audio_files/b.mp3", "system_a": "s1", "system_b": "s2", "total_listening_time_a": 6.5, "total_listening_time_b": 5.0,
        "feedback": "", "duration_a": 30.0, "duration_b": 31.5, "sample_rate_a": 44100, "sample_rate_b": 48000,
    }  # fmt: skip
    logged = {
        "uuid": "b1", "prompt": {"prompt": "a waltz"}, "prompt_user": {"salted_ip": "u1"}, "a_audio_url": None,
        "b_audio_url": "audio_files/b.mp3",
        "a_metadata": {"system_key": {"system_tag": "s1", "variant_tag": "v"}, "duration": 30.0, "sample_rate": 44100},
        "b_metadata": {"system_key": {"system_tag": "s2", "variant_tag": "v"}, "duration": 31.5, "sample_rate": 48000},
        "vote": {
            "preference": "B", "preference_time": 1754042400.0,
            "a_listen_data": [["PLAY", 10.0], ["TICK", 12.0], ["PAUSE", 14.5], ["PLAY", 20.0], ["STOP", 22.0]],
            "b_listen_data": [["PLAY", 30.0], ["PAUSE", 35.0]],
        },
    }  # fmt: skip
    found = import_votes(
        store, write_lines(tmp_path / "a.jsonl", [published, published | {"battle_uuid": "b2", "preference": None}]), "rows"
    )
    assert (found.n_votes, found.n_without_vote) == (1, 1)
    (tmp_path / "b.json").write_text(json.dumps(logged))
    assert import_votes(store, tmp_path / "b.json", "rows").n_known == 1  # the same battle
    assert import_votes(store, tmp_path / "b.json", "logs").n_votes == 1
    with store.read() as session:
        one, other = session.execute(select(Vote.choice, Vote.listen_a_ms, Vote.listen_b_ms, Vote.created_at, Vote.rater_id)).all()
    assert one == other
    assert tuple(one[:3]) == ("b", 6500, 5000)


def test_a_second_answer_to_a_pair_is_a_repeat(store: Store, tmp_path: Path) -> None:
    rows = [ROW, ROW | {"time": 1754042500, "choice": "b"}]
    assert import_votes(store, write_lines(tmp_path / "v.jsonl", rows), "c").n_votes == 2
    assert leaderboard(store, "c").n_votes == 1
