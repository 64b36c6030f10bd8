"""Votes from elsewhere: what a round trip keeps, what is read from others' files, and how wrong rows are told."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from db.errors import NoVotesError, StoreError
from db.export import export_snapshot
from db.imports import import_votes
from db.leaderboard import leaderboard
from db.schema import ASPECTS, Assignment, Campaign, Clip, Pair, Prompt, Rater, SpanMark, Vote, VoteAspect
from db.store import Store
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


HOSTILE = [
    "'; drop table vote; --",
    "<img onerror=alert(1)>",
    'a,"b"\n\r\n\u2028c',
    "\u202eevil",
    "${x} {{y}} `z`",
    "\ufeff",
    "\x1b[31m",
    "é́ 🎷",
]
TEXTS = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
MS = st.integers(0, 6000)
SHARES = st.none() | st.floats(0, 1)
VOTES = st.fixed_dictionaries(
    {
        "pair": st.integers(0, 3),
        "rater": st.integers(0, 3),
        "swapped": st.booleans(),
        "choice": st.sampled_from(["a", "b", "tie", "both_bad"]),
        "repeat": st.booleans(),
        "propensity": st.floats(1e-6, 1),
        "columns": st.fixed_dictionaries(
            {
                "confidence": st.none() | st.integers(1, 3),
                "comment": st.none() | TEXTS,
                "listen_a_ms": MS,
                "listen_b_ms": MS,
                "coverage_a": SHARES,
                "coverage_b": SHARES,
                "events": st.lists(st.tuples(MS, TEXTS, st.sampled_from("ab"), MS).map(list), max_size=3),
                "ui_version": st.none() | st.just("7"),
                "source": st.none() | st.just("elsewhere"),
                "excluded_reason": st.none() | st.just("late"),
            }
        ),
        "aspects": st.dictionaries(st.sampled_from(ASPECTS), st.integers(-2, 2)),
        "marks": st.lists(
            st.tuples(st.sampled_from("ab"), st.integers(0, 2999), st.integers(3000, 6000), st.sampled_from(["bad", "noise"]))
        ),
        "waited_s": st.integers(0, 10**6),
    }
)


def fill(url: str, votes: list[dict[str, Any]], prompts: list[str], gold: list[str | None]) -> None:
    """Stores generated votes as they could have been given: one vote an assignment, gold pairs as gold, second answers as repeats."""
    at = datetime(2025, 1, 1, tzinfo=UTC)
    with Store(url) as store, store.write() as session:
        session.add(Campaign(id=1, name="c", target_votes=99, min_listen_ms=3000, aspects=list(ASPECTS)))
        session.add_all(
            Rater(id=i + 1, handle=f"rater {i}", token_sha256=str(i), status="blocked" if i == 3 else "active") for i in range(5)
        )
        session.add_all(
            Prompt(
                id=i + 1, key=f"p{i}", text=text, text_sha256=hashlib.sha256(text.encode()).hexdigest(), split=("train", "held-out")[i % 2]
            )
            for i, text in enumerate(prompts)
        )
        session.flush()
        shape = {"size_bytes": 9, "duration_ms": 6000, "sample_rate": 16000, "adapters": ["ab"], "gen": {"t": 1.0}, "lufs": -20.0}
        for i in range(8):
            more = {
                "true_peak_dbfs": -3.0,
                "seed": 2**40,
                "codes_uri": "c.npy" if i % 2 else None,
                "system": prompts[i % len(prompts)][:99],
            }
            session.add(Clip(id=i + 1, prompt_id=i // 2 % len(prompts) + 1, sha256=f"{i:064x}", uri=prompts[0], **shape, **more))
        session.flush()
        for i in range(4):
            known = {"gain_x_db": 0.0, "gain_y_db": 0.0, "gold": gold[i], "target_votes": 99}
            ends = {"clip_x_id": 2 * i + 1, "clip_y_id": 2 * i + 2, "prompt_id": i % len(prompts) + 1}
            ends |= {f"system_{side}": session.get(Clip, ends[f"clip_{side}_id"]).system for side in "xy"}
            session.add(Pair(id=i + 1, campaign_id=1, **ends, **known))
        session.flush()
        reps = Counter[tuple[int, int]]()
        for i, vote in enumerate(votes):
            met = vote["pair"], vote["rater"]
            rep, reps[met] = reps[met], reps[met] + 1
            kind = "repeat" if rep else "gold" if gold[vote["pair"]] else "normal"
            given_at = at + timedelta(milliseconds=i)
            asked = {"rep": rep, "kind": kind, "policy": "random-256", "propensity": vote["propensity"], "swapped": vote["swapped"]}
            asked |= {"min_listen_ms": 3000, "aspects": list(ASPECTS)}
            when = {"issued_at": given_at - timedelta(seconds=vote["waited_s"]), "expires_at": at}
            session.add(Assignment(id=f"{i}", pair_id=met[0] + 1, rater_id=met[1] + 1, status="voted", **asked, **when))
            session.flush()
            said = {"choice": vote["choice"], "idempotency_key": f"{i}", "created_at": given_at, **vote["columns"]}
            session.add(Vote(id=i + 1, assignment_id=f"{i}", rater_id=met[1] + 1, **said))
            session.flush()
            session.add_all(VoteAspect(vote_id=i + 1, aspect=name, score=score) for name, score in vote["aspects"].items())
            session.add_all(SpanMark(vote_id=i + 1, side=side, t0_ms=t0, t1_ms=t1, tag=tag) for side, t0, t1, tag in vote["marks"])


COUNTS = {"choice": "a", "pair": 0, "rater": 4, "swapped": False, "propensity": 1.0, "aspects": {}, "marks": [], "waited_s": 60}
COUNTS["columns"] = {"listen_a_ms": 6000, "listen_b_ms": 6000, "events": []}


@settings(
    max_examples=15,
    phases=(Phase.explicit, Phase.generate),  # a failure is told as it was found: to make it smaller takes minutes
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    votes=st.lists(VOTES, max_size=12),
    prompts=st.lists(TEXTS, min_size=1, max_size=2),
    gold=st.tuples(st.none(), *[st.sampled_from([None, "x", "y"])] * 3).map(list),
)
def test_a_round_trip_loses_nothing_of_any_votes(migrated: Callable, tmp_path: Path, votes: list, prompts: list, gold: list) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        folder = Path(name)
        urls = [f"sqlite:///{shutil.copy(migrated('sqlite'), folder / file)}" for file in ("one.db", "two.db")]
        fill(urls[0], [COUNTS, *votes], prompts, gold)
        with Store(urls[0]) as store:
            first = export_snapshot(store, "c", folder, "first")
        with Store(urls[1]) as store:
            found = import_votes(store, folder / "first", "taken in")
            again = import_votes(store, folder / "first", "taken in")
            second = export_snapshot(store, "taken in", folder, "second")
        assert (found.n_votes, again.n_votes, again.n_known) == (len(votes) + 1, 0, len(votes) + 1)
        for key in ("n_votes", "n_excluded", "n_raters", "rules", "schema"):
            assert first[key] == second[key]
        assert lines(folder / "first/clips.jsonl") == lines(folder / "second/clips.jsonl")
        before, after = (lines(folder / f"{name}/votes.jsonl") for name in ("first", "second"))
        assert len({(one["pair_id"], other["pair_id"]) for one, other in zip(before, after, strict=True)}) == len(
            {one["pair_id"] for one in before}
        )
        for one, other, told in zip(before, after, [COUNTS, *votes], strict=True):
            assert one["source"] == told["columns"].get("source")
            assert other.pop("source") == (one.pop("source") or "import:first")
            for renamed in ("vote_id", "pair_id"):
                one.pop(renamed), other.pop(renamed)
            assert one == other
            # And the first export says what was stored: turned back it is what was shown.
            turn = {"x": "b", "y": "a"} if told["swapped"] else {"x": "a", "y": "b"}
            assert turn.get(one["choice"], one["choice"]) == told["choice"]
            assert one["comment"] == told["columns"].get("comment")
            assert [[since, what, turn[side], at] for since, what, side, at in one["events"]] == told["columns"]["events"]
            assert [(turn[mark["side"]], mark["t0_ms"], mark["t1_ms"], mark["tag"]) for mark in one["marks"]] == told["marks"]
            assert one["aspects"] == {name: (-1 if told["swapped"] else 1) * score for name, score in told["aspects"].items()}


def test_a_round_trip_goes_between_both_databases(
    store: Store, migrated: Callable, make_rows: Callable, add_raters: Callable, tmp_path: Path
) -> None:
    store.create_campaign("c", make_rows(4), tmp_path / "clips", target_votes=4, min_listen_ms=0)
    for rater in add_raters(2):
        while offer := store.next_assignment(rater):
            key = offer.assignment_id
            said = {"marks": [Mark("a", 0, 900, "bad")], "events": [(1, "play", "b", 0)], "comment": HOSTILE[2], "coverage_b": 0.1 + 0.2}
            store.submit_vote(rater, key, "b", idempotency_key=key, **said)
    export_snapshot(store, "c", tmp_path, "first")
    with Store(f"sqlite:///{shutil.copy(migrated('sqlite'), tmp_path / 'other.db')}") as other:
        import_votes(other, tmp_path / "first", "there")
        export_snapshot(other, "there", tmp_path, "second")
    assert import_votes(store, tmp_path / "second", "and back").n_votes == 8
    export_snapshot(store, "and back", tmp_path, "third")
    there, back = (lines(tmp_path / f"{name}/votes.jsonl") for name in ("second", "third"))
    for one, other in zip(there, back, strict=True):
        for row in (one, other):
            row.pop("vote_id"), row.pop("pair_id")
        assert one == other


def test_two_imports_at_once_may_share_clips_in_any_order(
    store: Store, tmp_path: Path, meet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.imports.CHUNK", 1)
    rows = [ROW, ROW | {"prompt": "a march"}]
    files = {name: write_lines(tmp_path / f"{name}.jsonl", order) for name, order in (("c", rows), ("d", rows[::-1]))}
    meet("INSERT INTO prompt")
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(import_votes, store, file, name) for name, file in files.items()]
        assert [taken.result().n_votes for taken in found] == [2, 2]
    assert count(store, Clip) == 4


def test_memory_does_not_grow_with_the_file(sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.imports.CHUNK", 100)
    peaks = []
    for n in (300, 300, 1500):  # the first one fills caches
        rows = [ROW | {"prompt": f"{n}-{i % 50}", "rater": f"rater {i}", "id": f"{n}-{i}", "comment": "x" * 1000} for i in range(n)]
        path = write_lines(tmp_path / f"{n}.jsonl", rows)
        del rows
        tracemalloc.start()
        assert import_votes(sqlite_store, path, f"c{len(peaks)}").n_votes == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


def test_what_would_not_fit_in_memory_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.vote_files.MAX_LINE", 1000)
    monkeypatch.setattr("db.vote_files.MAX_WHOLE_BYTES", 1000)
    long = ROW | {"comment": "x" * 2000}
    (tmp_path / "v.csv").write_text("prompt,comment\n" + f"a,{'x' * 2000}\n")
    (tmp_path / "v.json").write_text(json.dumps([long]))
    for path, told in (
        (write_lines(tmp_path / "v.jsonl", [ROW, long]), "line 2: more than 1000 characters"),
        (tmp_path / "v.csv", "larger than field limit"),
        (tmp_path / "v.json", "write it as JSON lines"),
    ):
        with pytest.raises(StoreError, match=told):
            import_votes(store, path, "c")
    assert count(store, Campaign) == 0


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


def test_an_answer_to_a_pair_of_another_snapshot_is_a_repeat_too(store: Store, tmp_path: Path) -> None:
    """Each snapshot calls it the first, as it was in its campaign: one person cannot agree with herself."""
    for name, more in (("one", {}), ("two", {"time": 1754042500})):
        import_votes(store, write_lines(tmp_path / f"{name}.jsonl", [ROW | more]), name)
        export_snapshot(store, name, tmp_path, f"snapshot-{name}")
        assert import_votes(store, tmp_path / f"snapshot-{name}", "all").n_votes == 1
    board = leaderboard(store, "all")
    assert (board.n_votes, board.agreement) == (1, None)
    export_snapshot(store, "all", tmp_path, "all")
    assert [(row["kind"], row["rep"]) for row in lines(tmp_path / "all/votes.jsonl")] == [("normal", 0), ("repeat", 1)]


def test_a_file_whose_winner_is_always_on_one_side_is_told_why_no_vote_counts(store: Store, tmp_path: Path) -> None:
    rows = [
        ROW | {"prompt": f"waltz {i}", "audio_a": f"a{i}.wav", "audio_b": f"b{i}.wav", "choice": "a", "time": 1754042500 + i}
        for i in range(40)
    ]
    import_votes(store, write_lines(tmp_path / "v.jsonl", rows), "c")
    with pytest.raises(NoVotesError, match=r"40 votes, 40 of them excluded \(40 one_sided\).*draw the sides anew"):
        export_snapshot(store, "c", tmp_path, "s")
