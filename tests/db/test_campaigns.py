"""Registering clips and pairs: what is believed, what is refused, and that a second time changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import event, func, select, update

from db import owners
from db.campaigns import SPOILED, CampaignSummary, Rules, check_rows, claim_campaign, create, pairs_of_systems
from db.errors import ConflictError, StoreError, UnavailableError
from db.export import export_snapshot, snapshot_sha256
from db.imports import import_votes
from db.leaderboard import leaderboard
from db.people import join
from db.schema import Assignment, Campaign, Clip, Pair
from db.store import Store
from tests.postgres import Postgres


def test_the_same_rows_again_add_nothing(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(3)
    first = store.create_campaign("c", rows, tmp_path / "clips")
    again = store.create_campaign("c", rows, tmp_path / "clips")
    assert (first.n_clips, first.n_pairs, first.n_new_pairs) == (6, 3, 3)
    assert (again.n_clips, again.n_pairs, again.n_new_pairs) == (6, 3, 0)


def test_a_row_that_stands_twice_in_a_manifest_is_one_clip(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2)
    made = store.create_campaign("c", [*rows, rows[0], *reversed(rows)], tmp_path / "clips")
    assert (made.n_clips, made.n_pairs) == (4, 2)
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Clip)) == 4


def test_more_rows_add_their_own_pairs(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    store.create_campaign("c", make_rows(3), tmp_path / "clips")
    more = store.create_campaign("c", make_rows(5), tmp_path / "clips")
    assert (more.n_pairs, more.n_new_pairs) == (5, 2)


def test_clips_of_a_prompt_meet_two_by_two_each_once(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2, systems=("a", "b", "c", "d", "e"))
    assert store.create_campaign("c", rows, tmp_path / "clips").n_pairs == 4
    with store.read() as session:
        pairs = session.execute(select(Pair.clip_x_id, Pair.clip_y_id)).all()
        prompts = dict(session.execute(select(Clip.id, Clip.prompt_id)).all())
    assert len({clip for pair in pairs for clip in pair}) == 8
    assert all(prompts[x] == prompts[y] for x, y in pairs)


def test_explicit_pairs_are_the_pairs(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(1, systems=("a", "b", "c"))
    a, b, c = (row["sha256"] for row in rows)
    made = store.create_campaign("c", rows, tmp_path / "clips", pairs=[(a, b), (c, a), (a, c)])
    assert made.n_pairs == 2


def test_pairs_across_prompts_or_of_one_clip_are_refused(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2)
    x, other = rows[0]["sha256"], rows[2]["sha256"]
    for pair in [(x, other), (x, x), (x, "0" * 64)]:
        with pytest.raises(StoreError, match="pair"):
            store.create_campaign("c", rows, tmp_path / "clips", pairs=[pair])
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Campaign)) == 0


def test_the_same_bytes_may_answer_two_prompts(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2)
    rows[2] = rows[2] | {"file": rows[0]["file"], "sha256": rows[0]["sha256"]}
    assert store.create_campaign("c", rows, tmp_path / "clips").n_pairs == 2


def test_two_systems_with_the_same_bytes_are_nothing_to_compare(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    row = make_rows(1)[0]
    with pytest.raises(StoreError, match="no pair"):
        store.create_campaign("c", [row, row | {"system": "other"}], tmp_path / "clips")


def test_other_rules_under_a_taken_name_are_a_conflict(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    store.create_campaign("c", make_rows(1), tmp_path / "clips", target_votes=3)
    with pytest.raises(ConflictError, match="target_votes=3"):
        store.create_campaign("c", make_rows(1), tmp_path / "clips", target_votes=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file": "missing.wav"}, "no file"),
        ({"file": "../outside.wav"}, "path"),
        ({"file": "/etc/hostname"}, "path"),
        ({"codes_file": "../../codes.npy"}, "path"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"prompt": ""}, "'prompt'"),
        ({"system": None}, "'system'"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"lufs": None}, "no loudness"),
    ],
)
def test_a_row_that_cannot_be_believed_is_refused_and_nothing_stored(
    store: Store, make_rows: Callable, tmp_path: Path, change: dict, says: str
) -> None:
    (tmp_path / "outside.wav").write_bytes(b"base 0 ")
    rows = make_rows(2)
    rows[3] |= change
    with pytest.raises(StoreError, match=says) as caught:
        store.create_campaign("c", rows, tmp_path / "clips")
    assert caught.value.remedy
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Clip)) == 0


def test_an_altered_file_is_refused(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(1)
    (tmp_path / "clips" / rows[0]["file"]).write_bytes(b"something else")
    with pytest.raises(StoreError, match="changed"):
        store.create_campaign("c", rows, tmp_path / "clips")


def test_an_empty_manifest_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="empty manifest"):
        store.create_campaign("c", [], tmp_path)


def test_loudness_is_measured_once_a_clip(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("lufs", "true_peak_dbfs")} for row in make_rows(2)]
    measured: list[str] = []

    def measure(path: Path) -> tuple[float, float]:
        measured.append(path.name)
        return -16.0, -1.0

    for _ in range(2):
        store.create_campaign("c", rows, tmp_path / "clips", measure=measure)
    assert sorted(measured) == sorted(row["file"] for row in rows)


def test_a_moved_folder_is_found_again(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(1)
    store.create_campaign("c", rows, tmp_path / "clips")
    (tmp_path / "clips").rename(tmp_path / "moved")
    store.create_campaign("c", rows, tmp_path / "moved")
    with store.read() as session:
        assert all(Path(uri).is_file() for uri in session.scalars(select(Clip.uri)))


def test_a_prompt_of_5000_characters_and_one_of_emoji_are_taken(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(2)
    for i, prompt in enumerate(["x" * 5000, "x" * 5000, "🎺🎷", "🎺🎷"]):
        rows[i]["prompt"] = prompt
    store.create_campaign("c", rows, tmp_path / "clips")
    rater = store.sign_in("ada", store.add_rater("ada"))
    assert store.next_assignment(rater.id).prompt in ("x" * 5000, "🎺🎷")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("duration_s", "six"), ("duration_s", 7200.0), ("duration_s", float("nan")), ("sample_rate", 0), ("sample_rate", "16k"),
        ("prompt", "nul \x00"), ("prompt", "lone \ud800"), ("prompt", {"a": 1}), ("prompt_id", "x" * 129), ("system", "x" * 129),
        ("genre", "x" * 65), ("seed", 2**70), ("seed", "many"), ("tempo_bpm", "fast"), ("file", "../0_base.wav"), ("file", "/etc/passwd"),
    ],
)  # fmt: skip
def test_a_row_with_an_unfit_field_is_named_and_nothing_is_stored(
    store: Store, make_rows: Callable, tmp_path: Path, field: str, value: object
) -> None:
    rows = make_rows(2)
    rows[3] |= {field: value}
    with pytest.raises(StoreError, match="manifest row 4"):
        store.create_campaign("c", rows, tmp_path / "clips")
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Campaign)) == 0


def test_sql_and_html_in_every_text_are_kept_as_they_are(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    text = "'); drop table vote; -- <img src=x onerror=alert(1)> ${1}"
    rows = [row | {"prompt": text, "prompt_id": text, "licence": text} for row in make_rows(1)]
    assert store.create_campaign(text, rows, tmp_path / "clips").n_pairs == 1
    with store.read() as session:
        assert {clip.licence for clip in session.scalars(select(Clip))} == {text}


class TestTheNamesOfAPair:
    """A clip is known by its bytes, and may have been registered under another name before, or be what two systems play."""

    @pytest.fixture
    def known(self, store: Store, make_rows: Callable, tmp_path: Path) -> list[dict]:
        """Rows of two systems whose clips campaign `first` has all under the name `sampled`."""
        rows = make_rows(2)
        store.create_campaign("first", [row | {"system": "sampled"} for row in rows], tmp_path / "clips", min_listen_ms=0)
        return rows

    def names(self, store: Store) -> dict[str, set[tuple[str, str]]]:
        with store.read() as session:
            found = session.execute(select(Campaign.name, Pair.system_x, Pair.system_y).join(Pair, Pair.campaign_id == Campaign.id)).all()
        return {name: {(x, y) for of, x, y in found if of == name} for name, _, _ in found}

    def vote(self, store: Store, rater: int, campaign: str) -> None:
        """For the side that plays the base's clip."""
        while offer := store.next_assignment(rater, campaign):
            key = offer.assignment_id
            side = next(s for s in "ab" if store.audio_file(key, s, rater).uri.endswith("_base.wav"))
            store.submit_vote(rater, key, side, idempotency_key=key)

    def test_are_those_it_was_asked_for(self, store: Store, known: list[dict], tmp_path: Path, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        store.create_campaign("second", known, tmp_path / "clips", min_listen_ms=0)
        for campaign in ("first", "second"):
            self.vote(store, rater, campaign)
        assert self.names(store) == {"first": {("sampled", "sampled")}, "second": {("base", "dpo")}}
        board = leaderboard(store, "second")
        assert [(standing.system, standing.wins) for standing in board.standings] == [("base", 2), ("dpo", 0)]
        assert leaderboard(store, "first").standings == ()

    def test_tell_apart_what_ranked_nothing_when_they_are_given_later(
        self, store: Store, known: list[dict], tmp_path: Path, add_raters: Callable
    ) -> None:
        self.vote(store, add_raters(1)[0], "first")
        named = store.create_campaign("first", known, tmp_path / "clips", min_listen_ms=0)
        assert (named.n_pairs, named.n_new_pairs, named.n_named) == (2, 0, 2)
        assert store.create_campaign("first", known, tmp_path / "clips", min_listen_ms=0).n_named == 0
        assert leaderboard(store, "first").n_votes == 2

    def test_of_gold_pairs_follow_in_silence_and_refuse_nothing(
        self, store: Store, known: list[dict], make_rows: Callable, tmp_path: Path, add_raters: Callable
    ) -> None:
        (bad,) = make_rows(1, systems=(SPOILED,))

        def fill(rows: list[dict]) -> CampaignSummary:
            gold = [(rows[0]["sha256"], bad["sha256"])]
            pairs = [(rows[i]["sha256"], rows[i + 1]["sha256"]) for i in (0, 2)]
            return create(store, "mixed", check_rows([*rows, bad], tmp_path / "clips"), Rules(min_listen_ms=0), pairs=pairs, gold=gold)

        assert fill([row | {"system": "sampled"} for row in known]).n_gold == 1
        (rater,) = add_raters(1)
        with store.write() as session:
            gold = session.scalars(select(Pair).where(Pair.gold.is_not(None))).one()
            lease = {"id": "g", "pair_id": gold.id, "rater_id": rater, "kind": "gold", "swapped": False, "policy": "p", "propensity": 1.0}
            session.add(Assignment(**lease, min_listen_ms=0, aspects=[], expires_at=datetime(2100, 1, 1, tzinfo=UTC)))
        store.submit_vote(rater, "g", "a", idempotency_key="g")
        assert fill(known).n_named == 2
        assert self.names(store)["mixed"] == {("base", "dpo"), ("base", SPOILED)}
        assert fill(known).n_named == 0

    def others(self, known: list[dict]) -> list[dict]:
        return [row | {"system": {"base": "base", "dpo": "ppo"}[row["system"]]} for row in known]

    def test_are_not_changed_once_somebody_voted(self, store: Store, known: list[dict], tmp_path: Path, add_raters: Callable) -> None:
        store.create_campaign("second", known, tmp_path / "clips", min_listen_ms=0)
        self.vote(store, add_raters(1)[0], "second")
        with pytest.raises(ConflictError, match=r"'base' against 'ppo'.* as 'base' against 'dpo'.*another name"):
            store.create_campaign("second", self.others(known), tmp_path / "clips", min_listen_ms=0)
        assert store.create_campaign("third", self.others(known), tmp_path / "clips").n_new_pairs == 2
        assert self.names(store)["second"] == {("base", "dpo")}
        assert self.names(store)["third"] == {("base", "ppo")}

    def test_are_those_of_a_later_call_as_long_as_nobody_voted(
        self, store: Store, known: list[dict], tmp_path: Path, add_raters: Callable
    ) -> None:
        store.create_campaign("second", known, tmp_path / "clips", min_listen_ms=0)
        (rater,) = add_raters(1)
        assert store.next_assignment(rater, "second") is not None  # being heard is no vote
        assert store.create_campaign("second", self.others(known), tmp_path / "clips", min_listen_ms=0).n_named == 2
        assert self.names(store)["second"] == {("base", "ppo")}
        self.vote(store, rater, "second")
        assert [(s.system, s.wins) for s in leaderboard(store, "second").standings] == [("base", 2), ("ppo", 0)]

    def test_are_changed_in_the_order_in_which_others_lock(self, store: Store, known: list[dict], tmp_path: Path) -> None:
        asked: list[str] = []
        listen = (store.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
        event.listen(*listen)
        store.create_campaign("first", known, tmp_path / "clips", min_listen_ms=0)
        event.remove(*listen)
        (looked,) = [statement for statement in asked if statement.startswith("SELECT pair.id") and "pair.system_x" in statement]
        assert looked.endswith("ORDER BY pair.id")

    def test_go_out_with_a_snapshot_and_come_in_again(self, store: Store, known: list[dict], tmp_path: Path, add_raters: Callable) -> None:
        store.create_campaign("second", known, tmp_path / "clips", min_listen_ms=0)
        self.vote(store, add_raters(1)[0], "second")
        export_snapshot(store, "second", tmp_path / "out", "one")
        outcomes = [json.loads(line) for line in (tmp_path / "out/one/votes.jsonl").read_text().splitlines()]
        assert {(vote["system_x"], vote["system_y"], vote["choice"]) for vote in outcomes} == {("base", "dpo", "x")}
        import_votes(store, tmp_path / "out/one", "there")
        assert self.names(store)["there"] == {("base", "dpo")}
        rows = [{k: v for k, v in vote.items() if not k.startswith("system_")} for vote in outcomes]  # as schema 4 had them
        (tmp_path / "out/one/votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = json.loads((tmp_path / "out/one/snapshot.json").read_text())
        about |= {"schema": 4, "sha256": snapshot_sha256(tmp_path / "out/one")}
        (tmp_path / "out/one/snapshot.json").write_text(json.dumps(about))
        assert import_votes(store, tmp_path / "out/one", "there").n_known == 2

    def test_may_differ_between_campaigns_of_imported_votes_but_not_within_one(self, store: Store, tmp_path: Path) -> None:
        row = {"prompt": "a waltz", "audio_a": "a.wav", "audio_b": "b.wav", "choice": "A", "rater": "ann", "time": 1}
        for name, systems in {"one": ("s", "s"), "two": ("s1", "s2"), "three": ("s1", "s3")}.items():
            named = row | {"system_a": systems[0], "system_b": systems[1]}
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(named))
            import_votes(store, tmp_path / f"{name}.jsonl", name)
        assert {name: found.pop() for name, found in self.names(store).items()} == {
            "one": ("s", "s"), "two": ("s1", "s2"), "three": ("s1", "s3"),
        }  # fmt: skip
        (tmp_path / "three.jsonl").write_text(json.dumps(named | {"rater": "bob"}))
        with pytest.raises(StoreError, match=r"line 1: systems 's1' and 's3' of a pair that the campaign has as 's1' and 's2'"):
            import_votes(store, tmp_path / "three.jsonl", "two")

    def test_come_with_imported_rows_for_what_ranked_nothing(self, store: Store, imported: Path) -> None:
        import_votes(store, imported, "one")
        self.rename(store, "s", "s")
        with imported.open("a") as file:
            file.write(imported.read_text().replace("ann", "bob"))
        again = import_votes(store, imported, "one")
        assert (again.n_votes, again.n_known, again.n_pairs, again.n_named) == (1, 1, 0, 1)
        assert import_votes(store, imported, "one").n_named == 0
        assert self.names(store)["one"] == {("s1", "s2")}
        assert leaderboard(store, "one").n_votes == 2

    def test_refuse_no_imported_row_whose_vote_is_known(self, store: Store, imported: Path) -> None:
        import_votes(store, imported, "one")
        self.rename(store, "s1", "as registered elsewhere")
        again = import_votes(store, imported, "one")
        assert (again.n_votes, again.n_known) == (0, 1)
        assert self.names(store)["one"] == {("s1", "as registered elsewhere")}
        first = imported.read_text()
        imported.write_text(first + first.replace("ann", "bob"))
        with pytest.raises(StoreError, match=r"got 1 wrong rows.*line 2: systems 's1' and 's2'.*another campaign"):
            import_votes(store, imported, "one")
        imported.write_text(first + first.replace("ann", "bob") + first.replace("s2", "s3"))  # the last is the first, twice
        twice = import_votes(store, imported, "other")
        assert (twice.n_votes, twice.n_known) == (2, 1)

    def test_of_one_imported_file_are_those_of_its_first_row(self, store: Store, imported: Path) -> None:
        import_votes(store, imported, "one")
        self.rename(store, "s", "s")
        row = imported.read_text()
        imported.write_text(row.replace("ann", "bob") + row.replace("ann", "cat").replace("s2", "s3"))
        with pytest.raises(StoreError, match=r"got 1 wrong rows.*line 2: systems 's1' and 's3' .* as 's1' and 's2'"):
            import_votes(store, imported, "one")
        assert self.names(store)["one"] == {("s", "s")}

    def test_of_pairs_that_an_import_adds_are_not_named_anew(self, store: Store, imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("db.imports.CHUNK", 1)
        row = imported.read_text()
        imported.write_text(row.replace("s1", "s2") + row.replace("ann", "bob"))  # the second row tells its sides apart
        found = import_votes(store, imported, "one")
        assert (found.n_pairs, found.n_named) == (1, 0)
        assert self.names(store)["one"] == {("s1", "s2")}

    def test_given_twice_by_one_import_are_counted_once_and_those_of_gold_pairs_not(
        self, store: Store, imported: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("db.imports.CHUNK", 1)
        row = imported.read_text()
        imported.write_text(row + row.replace("waltz", "march"))
        import_votes(store, imported, "one")
        self.rename(store, "s", "s")
        with store.write() as session:
            session.execute(update(Pair).where(Pair.id == 2).values(gold="x"))
        same, apart = row.replace("s1", "s2").replace("ann", "bob"), row.replace("ann", "cat")
        imported.write_text(same + apart + apart.replace("waltz", "march"))
        assert import_votes(store, imported, "one").n_named == 1
        assert self.names(store)["one"] == {("s1", "s2")}

    @pytest.fixture
    def imported(self, tmp_path: Path) -> Path:
        row = {"prompt": "a waltz", "audio_a": "a.wav", "audio_b": "b.wav", "choice": "A", "rater": "ann", "time": 1}
        path = tmp_path / "votes.jsonl"
        path.write_text(json.dumps(row | {"system_a": "s1", "system_b": "s2"}) + "\n")
        return path

    def rename(self, store: Store, x: str, y: str) -> None:
        """All pairs, as an older version would have named them."""
        with store.write() as session:
            session.execute(update(Pair).values(system_x=x, system_y=y))


class TestTwoFillsAtOnce:
    def test_of_a_campaign_are_one_after_the_other(self, store: Store, make_rows: Callable, tmp_path: Path, meet: Callable) -> None:
        rows = make_rows(3)
        store.create_campaign("known", rows, tmp_path / "clips")
        store.create_campaign("c", rows[:2], tmp_path / "clips")
        meet("UPDATE clip")
        assert self.n_new_pairs(store, tmp_path / "clips", ("c", rows), ("c", rows[::-1])) == [0, 2]

    def test_of_a_new_campaign_make_it_once(self, store: Store, make_rows: Callable, tmp_path: Path, meet: Callable) -> None:
        rows = make_rows(3)
        meet("SELECT campaign")
        assert self.n_new_pairs(store, tmp_path / "clips", ("c", rows), ("c", rows[::-1])) == [0, 3]

    @pytest.mark.parametrize("known", [True, False])
    def test_of_two_campaigns_may_share_clips_in_any_order(
        self, store: Store, make_rows: Callable, tmp_path: Path, meet: Callable, known: bool
    ) -> None:
        rows = make_rows(3)
        if known:
            store.create_campaign("known", rows, tmp_path / "clips")
        meet("UPDATE clip" if known else "INSERT INTO prompt")
        assert self.n_new_pairs(store, tmp_path / "clips", ("c", rows), ("d", rows[::-1])) == [3, 3]
        with store.read() as session:
            assert session.scalar(select(func.count()).select_from(Clip)) == 6

    def test_keep_nobody_from_joining_and_voting(self, postgres: Postgres, migrated: Callable, make_rows: Callable, tmp_path: Path) -> None:
        url = postgres.new_database(str(migrated("postgresql", postgres)))
        with Store(f"{url}&options=-c%20lock_timeout=1s") as store:
            store.create_campaign("c", make_rows(2), tmp_path / "clips", min_listen_ms=0)
            link = owners.invite(store, None, owners.campaign_id_of(store, "c"))
            with store.write() as session:
                claim_campaign(session, "c")
                newcomer = join(store, link, "ada", "1").rater.id
                offer = store.next_assignment(newcomer)
                assert store.submit_vote(newcomer, offer.assignment_id, "a", idempotency_key="k").vote_id is not None
                with pytest.raises(UnavailableError, match="locked"):
                    store.create_campaign("d", make_rows(2), tmp_path / "clips")

    def n_new_pairs(self, store: Store, base_dir: Path, *fills: tuple[str, list[dict]]) -> list[int]:
        with ThreadPoolExecutor(2) as pool:
            made = [pool.submit(store.create_campaign, name, rows, base_dir) for name, rows in fills]
            return sorted(fill.result().n_new_pairs for fill in made)


def test_systems_meet_clip_by_clip(make_rows: Callable, tmp_path: Path) -> None:
    rows = check_rows(make_rows(2, systems=("a", "b", "c")) + make_rows(1, systems=("a", "b"), salt="again"), tmp_path / "clips")
    met = [(rows[x].fields["system"], rows[y].fields["system"]) for x, y in pairs_of_systems(rows)]
    assert sorted(met) == sorted([("a", "b"), ("a", "c"), ("b", "c")] * 2 + [("a", "b")])


def test_a_gold_pair_knows_the_better_clip_and_takes_no_clip_from_the_others(store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = check_rows([*make_rows(2), *make_rows(1, systems=(SPOILED,))], tmp_path / "clips")
    keys = list(rows)
    for better, worse in [(keys[0], keys[4]), (keys[0], keys[4])]:  # twice: nothing new
        made = create(store, "c", rows, Rules(gold_rate=0.1), gold=[(better, worse)])
        assert (made.n_pairs, made.n_gold) == (2, 1)
    with store.read() as session:
        (gold,) = session.scalars(select(Pair).where(Pair.gold.is_not(None)))
        worse = session.get(Clip, gold.clip_y_id if gold.gold == "x" else gold.clip_x_id)
        assert worse.system == SPOILED
    with pytest.raises(ConflictError, match="two answers"):
        create(store, "c", rows, Rules(gold_rate=0.1), gold=[(keys[4], keys[0])])


@pytest.mark.parametrize(
    "rules",
    [
        {"target_votes": 0}, {"min_listen_ms": -1}, {"chooser": "best"}, {"random_floor": 0.0}, {"gold_rate": 0.4, "repeat_rate": 0.2},
        {"gold_rate": float("nan")}, {"aspects": ("beauty",)}, {"aspects": ("musicality", "musicality")},
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(rules: dict) -> None:
    with pytest.raises(StoreError, match="remedy"):
        Rules(**rules)
