"""Which pair comes next: the stated probability is the true one, and controls look like any other pair."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, select, update

from db.choice import REPEAT_GAP, beta_variance, draw, refresh_priorities, renewed_priorities, strengths
from db.errors import NotFoundError
from db.schema import Assignment, Campaign, Membership, Pair, Vote, utc_now
from db.store import Store


@pytest.fixture
def make_campaign(store: Store, make_rows: Callable, tmp_path: Path) -> Callable[..., None]:
    """make_campaign(n_pairs, n_gold=0, **columns of Campaign): the first `n_gold` pairs are gold."""

    def make(n_pairs: int, n_gold: int = 0, target_votes: int = 3, **rules: object) -> None:
        store.create_campaign("c", make_rows(n_pairs), tmp_path / "clips", target_votes=target_votes, min_listen_ms=0)
        with store.write() as session:
            if rules:
                session.execute(update(Campaign).values(**rules))
            if n_gold:
                session.execute(update(Pair).where(Pair.id <= n_gold).values(gold="x"))

    return make


def vote(store: Store, rater: int, choice: str = "a") -> str | None:
    """Answers the rater's next pair; its assignment."""
    offer = store.next_assignment(rater)
    if offer is None:
        return None
    store.submit_vote(rater, offer.assignment_id, choice, idempotency_key=offer.assignment_id)
    return offer.assignment_id


def assignments(store: Store, rater: int) -> list[Assignment]:
    with store.read() as session:
        return list(session.scalars(select(Assignment).where(Assignment.rater_id == rater).order_by(Assignment.issued_at)))


def draws(store: Store, rater: int, n: int) -> tuple[Counter, dict]:
    """How often each (kind, pair) was drawn from the same state, and the probability it was given."""
    drawn, said = Counter(), {}
    rng = random.Random(7)
    with store.read_core() as connection:
        campaign = connection.execute(select(Campaign.__table__)).one()
        for _ in range(n):
            one = draw(connection, campaign, rater, rng)
            drawn[one.kind, one.pair_id] += 1
            said[one.kind, one.pair_id] = one.propensity
    return drawn, said


@pytest.mark.parametrize("chooser", ["least_voted", "random", "informative"])
def test_the_stated_propensity_is_how_often_a_pair_is_drawn(
    store: Store, make_campaign: Callable, add_raters: Callable, chooser: str
) -> None:
    make_campaign(12, n_gold=2, chooser=chooser, random_floor=0.3, gold_rate=0.2, repeat_rate=0.1, target_votes=2)
    one, two = add_raters(2)
    for _ in range(8):
        vote(store, one)
    vote(store, two)
    with store.write() as session:
        for pair in session.scalars(select(Pair)):
            pair.priority = pair.id / 5
    n = 1500
    drawn, said = draws(store, one, n)
    assert sum(said.values()) == pytest.approx(1.0)  # every pair that could come has come
    for key, p in said.items():
        assert abs(drawn[key] / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5, key
    assert {kind for kind, _ in drawn} >= {"normal", "repeat"}


@pytest.mark.parametrize("chooser", ["random", "informative"])
def test_the_stated_propensity_holds_where_more_wait_than_are_looked_at(
    store: Store, make_campaign: Callable, add_raters: Callable, monkeypatch: pytest.MonkeyPatch, chooser: str
) -> None:
    monkeypatch.setattr("db.choice.SPREAD", 3)
    monkeypatch.setattr("db.choice.POOL", 4)
    make_campaign(14, chooser=chooser, random_floor=0.5)
    one, _ = add_raters(2)
    with store.write() as session:
        for pair in session.scalars(select(Pair)):
            pair.priority = pair.id % 5 + 1
            pair.n_open = 3 * (pair.id in (2, 3, 4, 9, 14))  # gaps: what follows them comes more often
    for _ in range(2):
        vote(store, one)
    n = 2500
    drawn, said = draws(store, one, n)
    assert len(said) == 7
    assert sum(said.values()) == pytest.approx(1.0)
    assert len({round(p, 9) for p in said.values()}) > 1
    for key, p in said.items():
        assert abs(drawn[key] / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5, key


@pytest.mark.parametrize("chooser", ["least_voted", "random", "informative"])
def test_a_draw_asks_a_bounded_number_of_questions_answered_from_an_index(
    store: Store, make_campaign: Callable, add_raters: Callable, monkeypatch: pytest.MonkeyPatch, chooser: str
) -> None:
    monkeypatch.setattr("db.choice.SPREAD", 8)
    monkeypatch.setattr("db.choice.POOL", 8)
    make_campaign(40, n_gold=2, chooser=chooser, gold_rate=0.2, repeat_rate=0.2)
    (rater,) = add_raters(1)
    for _ in range(12):
        vote(store, rater)
    rng, asked = random.Random(0), []
    with store.read_core() as connection:
        campaign = connection.execute(select(Campaign.__table__)).one()
        event.listen(connection, "before_cursor_execute", lambda _c, _cursor, sql, *_: asked.append(sql))
        for _ in range(30):
            assert draw(connection, campaign, rater, rng)
        assert len(asked) <= 30 * 8
        if connection.dialect.name == "sqlite":
            for sql in set(asked):
                plan = [row[3] for row in connection.exec_driver_sql("explain query plan " + sql, (1,) * sql.count("?"))]
                assert not [step for step in plan if step.startswith(("SCAN pair", "SCAN vote", "SCAN assignment"))], (sql, plan)


def test_sides_are_even_over_5000_draws(store: Store, make_campaign: Callable, add_raters: Callable) -> None:
    make_campaign(4)
    (rater,) = add_raters(1)
    rng = random.Random(3)
    with store.read_core() as connection:
        campaign = connection.execute(select(Campaign.__table__)).one()
        swapped = sum(draw(connection, campaign, rater, rng).swapped for _ in range(5000))
    assert abs(swapped / 5000 - 0.5) < 0.03


def test_an_informative_draw_keeps_to_high_priority_but_for_its_floor(store: Store, make_campaign: Callable, add_raters: Callable) -> None:
    make_campaign(10, chooser="informative", random_floor=0.2)
    (rater,) = add_raters(1)
    with store.write() as session:
        session.execute(update(Pair).values(priority=1e-9))
        session.execute(update(Pair).where(Pair.id == 4).values(priority=1.0))
    _, said = draws(store, rater, 400)
    assert said["normal", 4] == pytest.approx(0.8 + 0.2 / 10)
    assert said["normal", 5] == pytest.approx(0.2 / 10)


def test_a_uniform_draw_finds_the_last_pair_a_rater_has_not_answered(store: Store, make_campaign: Callable, add_raters: Callable) -> None:
    make_campaign(60, chooser="random")
    (rater,) = add_raters(1)
    seen = [vote(store, rater, "tie") for _ in range(60)]
    assert None not in seen
    assert [round(1 / row.propensity) for row in assignments(store, rater)] == list(range(60, 0, -1))
    assert store.next_assignment(rater) is None


class TestControls:
    def test_take_no_slot_and_never_prolong_the_work(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(40, n_gold=6, gold_rate=0.25, repeat_rate=0.25)
        for rater in add_raters(2):
            while vote(store, rater):
                pass
            kinds = Counter(row.kind for row in assignments(store, rater))
            assert kinds["normal"] == 34
            assert 1 <= kinds["gold"] <= 6
            assert kinds["repeat"] > 1
        with store.read() as session:
            assert set(session.scalars(select(Pair.n_open).where(Pair.gold.is_(None)))) == {2}
            assert set(session.scalars(select(Pair.n_open).where(Pair.gold.is_not(None)))) == {0}
            assert set(session.scalars(select(Vote.excluded_reason))) == {None}

    def test_repeats_come_late_once_and_with_their_sides_turned(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(30, repeat_rate=0.5)
        (rater,) = add_raters(1)
        order = []
        while assignment_id := vote(store, rater):
            order.append(assignment_id)
        by_id = {row.id: row for row in assignments(store, rater)}
        first = {row.pair_id: row for row in by_id.values() if row.kind == "normal"}
        repeats = [row for row in by_id.values() if row.kind == "repeat"]
        assert len(repeats) == len({row.pair_id for row in repeats}) > 5
        for row in repeats:
            assert (row.rep, row.swapped) == (1, not first[row.pair_id].swapped)
            assert order.index(row.id) - order.index(first[row.pair_id].id) > REPEAT_GAP

    def test_count_down_like_any_other_pair(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(44, n_gold=12, gold_rate=0.2, repeat_rate=0.2)
        (rater,) = add_raters(1)
        counted = []
        while offer := store.next_assignment(rater):
            counted.append((offer.progress.done, offer.progress.open))
            store.submit_vote(rater, offer.assignment_id, "b", idempotency_key=offer.assignment_id)
        kinds = [row.kind for row in assignments(store, rater)]
        steps = {kind: Counter() for kind in ("normal", "gold", "repeat")}
        for kind, before, after in zip(kinds[:25], counted, counted[1:]):
            steps[kind][after[0] - before[0], before[1] - after[1]] += 1
        assert all(set(seen) == {(1, 1)} for seen in steps.values() if seen)
        assert len([kind for kind in kinds[:25] if kind != "normal"]) > 2

    def test_that_are_skipped_or_run_out_free_no_slot(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(30, n_gold=10, gold_rate=0.5)
        (rater,) = add_raters(1)
        now, shown = utc_now(), []
        for i in range(20):
            now += timedelta(seconds=61)
            then = now
            offer = store.next_assignment(rater, lease_s=60, clock=lambda t=then: t)
            shown.append(offer.assignment_id)
            if i % 2:
                store.submit_vote(rater, offer.assignment_id, "skip", idempotency_key=offer.assignment_id)
        with store.read() as session:
            n_open = sum(session.scalars(select(Pair.n_open)))
            held = session.scalars(select(Assignment.kind).where(Assignment.status == "leased")).all()
        assert n_open == held.count("normal")
        kinds = {row.id: row.kind for row in assignments(store, rater)}
        assert "gold" in {kinds[shown_id] for shown_id in shown}

    def test_late_gold_is_no_late_vote(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(30, n_gold=10, gold_rate=0.5)
        for rater in add_raters(8):
            offer = store.next_assignment(rater, lease_s=0)
            store.next_assignment(rater)  # ends the lease that ran out
            receipt = store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001")
            assert (receipt.duplicate, receipt.excluded_reason) == (False, None)


@pytest.mark.parametrize("status", ["paused", "closed"])
def test_a_campaign_at_rest_hands_out_nothing_and_takes_votes_for_open_leases(
    store: Store, make_campaign: Callable, add_raters: Callable, status: str
) -> None:
    make_campaign(4)
    (rater,) = add_raters(1)
    offer = store.next_assignment(rater)
    with store.write() as session:
        session.execute(update(Campaign).values(status=status))
    assert store.next_assignment(rater) is None
    assert store.next_assignment(rater, "c") is None
    assert store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001").duplicate is False


def test_an_invited_only_campaign_is_for_its_members(store: Store, make_campaign: Callable, add_raters: Callable) -> None:
    make_campaign(4, invited_only=True)
    member, stranger = add_raters(2)
    with store.write() as session:
        session.add(Membership(campaign_id=1, rater_id=member))
    assert store.next_assignment(member, "c").campaign == "c"
    assert store.next_assignment(member) is not None
    assert store.next_assignment(stranger) is None
    with pytest.raises(NotFoundError):
        store.next_assignment(stranger, "c")


class TestPriorities:
    def test_fall_with_votes_agreement_and_distance(self, store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> None:
        rows = make_rows(12, systems=("good", "good2", "bad"))
        pairs = [(rows[3 * i + a]["sha256"], rows[3 * i + b]["sha256"]) for i in range(12) for a, b in ((0, 1), (0, 2))]
        store.create_campaign("c", rows, tmp_path / "clips", target_votes=9, min_listen_ms=0, pairs=pairs)
        for rater in add_raters(2):
            for i in range(16):
                offer = store.next_assignment(rater, rng=random.Random(i))
                uris = {side: store.audio_file(offer.assignment_id, side, rater).uri for side in "ab"}
                worse = [side for side in "ab" if uris[side].endswith("_bad.wav")]
                choice = "ab"[worse[0] == "a"] if worse else "tie"
                store.submit_vote(rater, offer.assignment_id, choice, idempotency_key=offer.assignment_id)
        assert refresh_priorities(store, "c") > 0
        assert refresh_priorities(store, "c") == 0  # nothing new to tell
        with store.read() as session:
            clips = {pair.id: (pair.clip_x_id, pair.clip_y_id) for pair in session.scalars(select(Pair))}
            priority = {pair.id: pair.priority for pair in session.scalars(select(Pair))}
            n_open = {pair.id: pair.n_open for pair in session.scalars(select(Pair))}
        near = {pair for pair, (x, y) in clips.items() if y - x == 1}
        by = {(n, is_near): [priority[p] for p in clips if n_open[p] == n and (p in near) == is_near] for n in (1, 2) for is_near in (0, 1)}
        assert all(by.values())
        assert min(by[1, 1]) > max(by[1, 0])  # systems near each other
        assert min(by[2, 1]) > max(by[2, 0])
        assert min(by[1, 1]) > max(by[2, 1])  # fewer votes

    def test_are_renewed_while_a_server_runs(self, store: Store, make_campaign: Callable, add_raters: Callable) -> None:
        make_campaign(6, chooser="informative")
        (rater,) = add_raters(1)
        vote(store, rater)
        deadline = time.monotonic() + 30
        with renewed_priorities(store, every_s=0.05):
            while time.monotonic() < deadline:
                with store.read() as session:
                    changed = set(session.scalars(select(Pair.priority))) != {1.0}
                if changed:
                    break
                time.sleep(0.05)
        assert changed

    def test_of_an_unknown_campaign_are_an_error(self, store: Store) -> None:
        with pytest.raises(NotFoundError):
            refresh_priorities(store, "nowhere")


def test_strengths_are_those_of_the_odds_of_winning() -> None:
    found = strengths({("a", "b"): (7500.0, 2500.0), ("b", "c"): (5000.0, 5000.0)})
    assert found["a"] / found["b"] == pytest.approx(3, rel=0.02)
    assert found["b"] / found["c"] == pytest.approx(1, rel=0.02)


def test_an_even_unvoted_pair_has_the_variance_of_a_uniform_chance() -> None:
    assert beta_variance(1, 1) == pytest.approx(1 / 12)
