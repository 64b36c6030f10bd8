"""Leases, slots and votes that count once, also when everything happens at the same time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, func, select, text, update

from db import owners
from db.choice import Draw, draw, refresh_priorities
from db.errors import ConflictError, NotFoundError, RefusedError, ScreenDueError
from db.people import record_screen
from db.schema import Assignment, Campaign, Pair, SpanMark, Vote, VoteAspect, utc_now
from db.store import Store
from db.voting import Mark, Receipt, expire_leases


@pytest.fixture
def campaign(store: Store, make_rows: Callable, tmp_path: Path) -> str:
    store.create_campaign("c", make_rows(4), tmp_path / "clips", target_votes=3, min_listen_ms=0)
    return "c"


def count_votes(store: Store) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(Vote)) or 0


def together(n: int, act: Callable[[int], object]) -> list[object]:
    """Runs act(0..n-1) in n threads that start at once."""
    gate = threading.Barrier(n)

    def run(i: int) -> object:
        gate.wait()
        return act(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


@pytest.mark.usefixtures("campaign")
class TestAVote:
    def test_sent_twice_under_one_key_is_one_row(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        first = store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001")
        again = store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001")
        assert (first.duplicate, again.duplicate) == (False, True)
        assert first.vote_id == again.vote_id
        assert count_votes(store) == 1

    def test_sent_under_two_keys_lets_the_first_one_stand(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001")
        second = store.submit_vote(rater, offer.assignment_id, "b", idempotency_key="key-0002")
        assert (second.duplicate, second.choice, count_votes(store)) == (True, "a", 1)

    def test_from_16_threads_at_once_is_one_row(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        receipts = together(16, lambda i: store.submit_vote(rater, offer.assignment_id, "ab"[i % 2], idempotency_key=f"key-{i:04}"))
        assert sum(not receipt.duplicate for receipt in receipts) == 1
        assert len({(receipt.vote_id, receipt.choice) for receipt in receipts}) == 1
        assert count_votes(store) == 1

    def test_with_the_key_of_another_pair_is_a_conflict(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        store.submit_vote(rater, store.next_assignment(rater).assignment_id, "a", idempotency_key="key-0001")
        other = store.next_assignment(rater)
        with pytest.raises(ConflictError):
            store.submit_vote(rater, other.assignment_id, "a", idempotency_key="key-0001")
        assert store.next_assignment(rater).assignment_id == other.assignment_id
        assert count_votes(store) == 1

    def test_on_another_raters_pair_is_unknown(self, store: Store, add_raters: Callable) -> None:
        one, two = add_raters(2)
        offer = store.next_assignment(one)
        with pytest.raises(NotFoundError):
            store.submit_vote(two, offer.assignment_id, "a", idempotency_key="key-0001")
        assert count_votes(store) == 0

    def test_of_unknown_choice_is_refused(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        with pytest.raises(RefusedError):
            store.submit_vote(rater, store.next_assignment(rater).assignment_id, "c", idempotency_key="key-0001")


class TestAVoteMaySay:
    @pytest.fixture
    def held(self, store: Store, campaign: str, add_raters: Callable) -> tuple[int, str]:
        with store.write() as session:
            session.execute(update(Campaign).values(aspects=["musicality", "prompt_fit"], practice=True))
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        assert (offer.aspects, offer.practice) == (("musicality", "prompt_fit"), True)
        return rater, offer.assignment_id

    def test_aspects_marks_and_coverage_beside_its_choice(self, store: Store, held: tuple[int, str]) -> None:
        said = {"aspects": {"musicality": -2, "prompt_fit": 1}, "marks": [Mark("b", 0, 1500, "noise"), Mark("a", 5900, 6080, "cut")]}
        more = {"coverage_a": 0.5, "coverage_b": 1.0, "client_ms": 1_800_000_000_000, "ui_version": "7"}
        for _ in range(2):  # the second time it stands already
            store.submit_vote(*held, "a", idempotency_key="key-0001", **said, **more)
        with store.read() as session:
            vote = session.scalars(select(Vote)).one()
            assert {name: getattr(vote, name) for name in more} == more
            aspects = session.execute(select(VoteAspect.aspect, VoteAspect.score).order_by(VoteAspect.score)).all()
            assert aspects == [("musicality", -2), ("prompt_fit", 1)]
            marks = session.execute(select(SpanMark.side, SpanMark.t0_ms, SpanMark.t1_ms, SpanMark.tag).order_by(SpanMark.id)).all()
            assert marks == [("b", 0, 1500, "noise"), ("a", 5900, 6000, "cut")]  # a decoder's padding is no part of the clip

    @pytest.mark.parametrize(
        ("said", "names"),
        [
            ({"aspects": {"sound_quality": 1}}, "sound_quality"),
            ({"aspects": {"musicality": 3}}, "-2"),
            ({"marks": [Mark("c", 0, 10, "noise")]}, "side"),
            ({"marks": [Mark("a", 0, 10, "")]}, "tag"),
            ({"marks": [Mark("a", 10, 10, "noise")]}, "6000 ms"),
            ({"marks": [Mark("a", -1, 10, "noise")]}, "6000 ms"),
            ({"marks": [Mark("a", 0, 6101, "noise")]}, "6000 ms"),
            ({"coverage_a": 1.01}, "coverage"),
            ({"coverage_b": float("nan")}, "coverage"),
        ],
    )
    def test_nothing_that_cannot_be(self, store: Store, held: tuple[int, str], said: dict, names: str) -> None:
        with pytest.raises(RefusedError, match=names):
            store.submit_vote(*held, "a", idempotency_key="key-0001", **said)
        assert count_votes(store) == 0

    def test_where_in_a_clip_by_the_side_as_shown(self, store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> None:
        rows = make_rows(1)
        rows[0]["duration_s"] = 1.5
        store.create_campaign("short", rows, tmp_path / "clips", target_votes=12, min_listen_ms=0)
        for rater in add_raters(12):
            offer = store.next_assignment(rater)
            short = next(s for s in "ab" if store.audio_file(offer.assignment_id, s, rater).uri.endswith("_base.wav"))
            mark = Mark(short, 1600, 3000, "noise")
            with pytest.raises(RefusedError, match="1500 ms"):
                store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001", marks=[mark])
            mark = Mark("ab"[short == "a"], 1600, 3000, "noise")
            store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0001", marks=[mark])


@pytest.mark.usefixtures("campaign")
class TestALease:
    def test_is_the_same_until_it_is_answered(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        offers = together(8, lambda _: store.next_assignment(rater))
        assert len({offer.assignment_id for offer in offers}) == 1

    def test_never_comes_for_a_pair_that_was_answered_or_skipped(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        seen = []
        while offer := store.next_assignment(rater):
            choice = "skip" if len(seen) % 2 else "tie"
            store.submit_vote(rater, offer.assignment_id, choice, idempotency_key=offer.assignment_id)
            seen.append(offer.prompt)
        assert sorted(seen) == [f"prompt {i}" for i in range(4)]
        assert offer is None

    def test_that_is_skipped_frees_the_slot_and_stores_no_vote(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        first = store.submit_vote(rater, offer.assignment_id, "skip", idempotency_key="key-0001")
        late = store.submit_vote(rater, offer.assignment_id, "a", idempotency_key="key-0002")
        assert (first.vote_id, first.duplicate) == (None, False)
        assert (late.choice, late.duplicate) == ("skip", True)
        with store.read() as session:
            assert session.scalar(select(func.sum(Pair.n_open))) == 0
        assert count_votes(store) == 0

    def test_that_ran_out_frees_the_slot_for_others(self, store: Store, add_raters: Callable) -> None:
        raters = add_raters(13)
        for rater in raters[:12]:  # 4 pairs x 3 slots
            assert store.next_assignment(rater, lease_s=60) is not None
        assert store.next_assignment(raters[12]) is None
        later = utc_now() + timedelta(seconds=61)
        assert store.next_assignment(raters[12], clock=lambda: later) is not None

    def test_that_ran_out_comes_again_to_its_own_rater(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        mine = {store.next_assignment(rater, lease_s=60).prompt}
        later = utc_now() + timedelta(seconds=61)
        while offer := store.next_assignment(rater, clock=lambda: later):
            mine.add(offer.prompt)
            store.submit_vote(rater, offer.assignment_id, "tie", idempotency_key=offer.assignment_id, clock=lambda: later)
        assert len(mine) == 4
        assert count_votes(store) == 4

    def test_that_was_voted_for_in_another_tab_meanwhile_is_not_renewed(
        self, store: Store, campaign: str, add_raters: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (rater,) = add_raters(1)
        first = store.next_assignment(rater, lease_s=60).assignment_id
        later = utc_now() + timedelta(seconds=61)

        def drawn_while_a_vote_comes(connection: Connection, *given: object) -> Draw | None:
            found = draw(connection, *given)
            if found is not None and found.own_id == first:
                connection.execute(update(Assignment).where(Assignment.id == first).values(status="voted"))
            return found

        monkeypatch.setattr("db.voting.draw", drawn_while_a_vote_comes)
        offers = []
        while (offer := store.next_assignment(rater, clock=lambda: later)) is not None and len(offers) < 9:
            offers.append(offer.assignment_id)
            store.submit_vote(rater, offer.assignment_id, "tie", idempotency_key=offer.assignment_id, clock=lambda: later)
        assert len(offers) == 3  # of four pairs
        assert first not in offers
        with store.read() as session:
            assert session.scalar(select(Assignment.status).where(Assignment.id == first)) == "voted"
            assert session.scalar(select(func.sum(Pair.n_open))) == 3  # nothing was taken for it a second time

    def test_votes_after_it_ran_out_take_a_free_slot_or_are_kept_as_late(self, store: Store, add_raters: Callable) -> None:
        slow, slower, *others = add_raters(2 + 12)
        held = [(rater, store.next_assignment(rater, lease_s=60)) for rater in (slow, slower)]
        later = utc_now() + timedelta(seconds=61)
        for rater in others[:-1]:  # 11 of the 12 slots go to others
            while (offer := store.next_assignment(rater, clock=lambda: later)) is not None:
                store.submit_vote(rater, offer.assignment_id, "tie", idempotency_key=offer.assignment_id, clock=lambda: later)
        receipts = [store.submit_vote(r, o.assignment_id, "a", idempotency_key="key-late") for r, o in held]
        assert [receipt.duplicate for receipt in receipts] == [False, False]
        reasons = [receipt.excluded_reason for receipt in receipts]
        assert set(reasons) <= {None, "late"}
        assert store.stats().campaigns[0].excluded.get("late", 0) == reasons.count("late") > 0
        assert count_votes(store) == 12 + reasons.count("late")

    def test_of_32_raters_at_once_never_passes_a_target(self, store: Store, add_raters: Callable) -> None:
        raters = add_raters(32)

        def rate(i: int) -> int:
            n, rng = 0, random.Random(i)
            while (offer := store.next_assignment(raters[i], rng=rng)) is not None:
                choice = rng.choice(["a", "b", "tie", "both_bad", "skip"])
                store.submit_vote(raters[i], offer.assignment_id, choice, idempotency_key=offer.assignment_id)
                n += choice != "skip"
            return n

        voted = together(32, rate)
        voted += [rate(i) for i in range(32)]  # slots that were skipped after the others had gone
        with store.read() as session:
            held = Counter(session.scalars(select(Assignment.pair_id).where(Assignment.status.in_(("leased", "voted")))))
            open_by_pair = dict(session.execute(select(Pair.id, Pair.n_open)).all())
        assert max(held.values()) <= 3
        assert open_by_pair == {pair: held[pair] for pair in open_by_pair}
        assert sum(voted) == count_votes(store) == 12


class TestListening:
    @pytest.fixture
    def offer_of(self, store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> tuple:
        store.create_campaign("c", make_rows(2), tmp_path / "clips", min_listen_ms=3000)
        (rater,) = add_raters(1)
        return rater, store.next_assignment(rater)

    def submit(self, store: Store, offer_of: tuple, a: int, b: int, after_s: float, choice: str = "a") -> object:
        rater, offer = offer_of
        then = utc_now() + timedelta(seconds=after_s)
        return store.submit_vote(
            rater,
            offer.assignment_id,
            choice,
            listen_a_ms=a,
            listen_b_ms=b,
            idempotency_key="key-0001",
            clock=lambda: then,
        )

    @pytest.mark.parametrize(("a", "b"), [(0, 0), (2999, 6000), (6000, 2999)])
    def test_too_little_of_either_side_is_refused(self, store: Store, offer_of: tuple, a: int, b: int) -> None:
        with pytest.raises(RefusedError, match="3000 ms"):
            self.submit(store, offer_of, a, b, after_s=60)
        assert count_votes(store) == 0

    def test_more_than_the_clock_allows_is_refused(self, store: Store, offer_of: tuple) -> None:
        with pytest.raises(RefusedError, match="handed out"):
            self.submit(store, offer_of, 3000, 3000, after_s=1)
        assert count_votes(store) == 0

    def test_enough_within_the_clock_is_taken_after_a_refusal(self, store: Store, offer_of: tuple) -> None:
        with pytest.raises(RefusedError):
            self.submit(store, offer_of, 100, 100, after_s=1)
        assert self.submit(store, offer_of, 3000, 3000, after_s=6).duplicate is False

    def test_is_not_asked_of_a_skip(self, store: Store, offer_of: tuple) -> None:
        assert self.submit(store, offer_of, 0, 0, after_s=0, choice="skip").choice == "skip"

    def test_asks_no_more_than_the_clip_is_long(self, store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> None:
        rows = make_rows(1)
        rows[0]["duration_s"] = 1.5
        store.create_campaign("short", rows, tmp_path / "clips", min_listen_ms=3000)
        (rater,) = add_raters(1)
        offer = store.next_assignment(rater)
        assert (offer.min_listen_ms, offer.duration_ms) == (1500, 6000)


class TestRulesThatChangeMeanwhile:
    @pytest.fixture
    def rater(self, store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> int:
        """One rater of a campaign that asks for 3 s and for musicality."""
        store.create_campaign("c", make_rows(2), tmp_path / "clips", min_listen_ms=3000)
        owners.change_rules(store, None, 1, aspects=("musicality",))
        return add_raters(1)[0]

    def vote(self, store: Store, rater: int, assignment_id: str, heard_ms: int, **said: object) -> Receipt:
        then = utc_now() + timedelta(hours=1)
        heard = {"listen_a_ms": heard_ms, "listen_b_ms": heard_ms}
        return store.submit_vote(rater, assignment_id, "a", idempotency_key=assignment_id, clock=lambda: then, **heard, **said)

    def test_ask_no_more_of_a_pair_that_was_handed_out_before(self, store: Store, rater: int) -> None:
        offer = store.next_assignment(rater)
        owners.change_rules(store, None, 1, min_listen_ms=5000, aspects=())
        assert store.next_assignment(rater) == offer
        assert self.vote(store, rater, offer.assignment_id, 3000, aspects={"musicality": 1}).excluded_reason is None
        after = store.next_assignment(rater)
        assert (after.min_listen_ms, after.aspects) == (5000, ())
        with pytest.raises(RefusedError, match="5000 ms"):
            self.vote(store, rater, after.assignment_id, 3000)
        with pytest.raises(RefusedError, match="none with this pair"):
            self.vote(store, rater, after.assignment_id, 5000, aspects={"musicality": 1})

    def test_ask_no_less_of_it_either(self, store: Store, rater: int) -> None:
        offer = store.next_assignment(rater)
        owners.change_rules(store, None, 1, min_listen_ms=0)
        with pytest.raises(RefusedError, match="3000 ms"):
            self.vote(store, rater, offer.assignment_id, 0)

    def test_leave_a_late_vote_to_the_rule_it_was_handed_out_under(self, store: Store, rater: int) -> None:
        offer = store.next_assignment(rater, lease_s=60)
        owners.change_rules(store, None, 1, min_listen_ms=5000)
        store._expire(utc_now() + timedelta(minutes=2))
        assert self.vote(store, rater, offer.assignment_id, 3000).excluded_reason is None

    def test_hold_for_a_pair_that_is_handed_out_again(self, store: Store, rater: int) -> None:
        held = {store.next_assignment(rater, lease_s=60, rng=random.Random(0)).assignment_id}
        owners.change_rules(store, None, 1, min_listen_ms=5000)
        again = store.next_assignment(rater, clock=lambda: utc_now() + timedelta(minutes=2), rng=random.Random(0))
        with store.read() as session:
            asked = dict(session.execute(select(Assignment.id, Assignment.min_listen_ms)).all())
        assert again.min_listen_ms == asked[again.assignment_id] == 5000
        assert held == asked.keys()  # the same assignment, leased anew


@pytest.mark.usefixtures("campaign")
class TestAnOffer:
    def test_shows_both_orders_of_the_sides(self, store: Store, add_raters: Callable) -> None:
        for rater in add_raters(12):
            store.next_assignment(rater)
        with store.read() as session:
            swapped = list(session.scalars(select(Assignment.swapped)))
        assert len(swapped) == 12
        assert len(set(swapped)) == 2

    def test_gives_each_side_the_gain_and_file_of_its_clip(self, store: Store, add_raters: Callable) -> None:
        for rater in add_raters(12):
            offer = store.next_assignment(rater)
            louder, quieter = sorted(["a", "b"], key=lambda side: getattr(offer, f"gain_{side}_db"))
            assert store.audio_file(offer.assignment_id, louder, rater).uri.endswith("_base.wav")  # -20 LUFS
            assert store.audio_file(offer.assignment_id, quieter, rater).uri.endswith("_dpo.wav")  # -24 LUFS
            with pytest.raises(NotFoundError):
                store.audio_file(offer.assignment_id, "a", rater + 1)

    def test_spreads_raters_over_pairs_before_it_doubles_up(self, store: Store, add_raters: Callable) -> None:
        for rater in add_raters(4):
            store.next_assignment(rater, rng=random.Random(0))
        with store.read() as session:
            assert sum(n > 0 for n in session.scalars(select(Pair.n_open))) >= 2

    def test_counts_what_is_done_and_what_is_open(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        counted = []
        while offer := store.next_assignment(rater):
            counted.append((offer.progress.done, offer.progress.open))
            store.submit_vote(rater, offer.assignment_id, "a", idempotency_key=offer.assignment_id)
        assert counted == [(0, 4), (1, 3), (2, 2), (3, 1)]

    def test_of_an_unknown_campaign_is_an_error(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        with pytest.raises(NotFoundError, match="nowhere"):
            store.next_assignment(rater, "nowhere")

    def test_of_a_campaign_name_no_database_can_hold_is_an_error(self, store: Store, add_raters: Callable) -> None:
        (rater,) = add_raters(1)
        with pytest.raises((NotFoundError, RefusedError)):
            store.next_assignment(rater, "now\x00here")


def test_pairs_behind_the_headphone_check_wait_for_those_who_pass_it(
    store: Store, campaign: str, make_rows: Callable, tmp_path: Path, add_raters: Callable
) -> None:
    store.create_campaign("strict", make_rows(1, salt="s"), tmp_path / "clips", target_votes=3, min_listen_ms=0)
    ada, eve = add_raters(2)
    held = store.next_assignment(eve, "strict")
    with store.write() as session:
        session.execute(update(Campaign).where(Campaign.name == "strict").values(require_screen=True))
    assert store.next_assignment(eve, "strict") == held  # what was handed out may be finished
    seen = []
    while len(seen) < 4:  # other campaigns come first, whether or not the check was passed
        offer = store.next_assignment(ada)
        seen.append(offer.campaign)
        store.submit_vote(ada, offer.assignment_id, "a", idempotency_key=f"key-000{len(seen)}")
    assert seen == ["c"] * 4
    for right in (None, 4):
        if right is not None:
            record_screen(store, ada, right, 6)
        for name in (None, "strict"):
            with pytest.raises(ScreenDueError, match="headphone"):
                store.next_assignment(ada, name)
    record_screen(store, ada, 6, 6)
    offer = store.next_assignment(ada)
    assert offer.campaign == "strict"
    store.submit_vote(ada, offer.assignment_id, "a", idempotency_key="key-0005")
    record_screen(store, ada, 0, 0)  # the newest check counts, but nothing waits behind it
    assert store.next_assignment(ada) is None
    assert store.next_assignment(ada, "strict") is None


MANY_PAIRS: dict[str, Callable[[Store, int], object]] = {
    "changed rules": lambda store, _: owners.change_rules(store, None, 1, target_votes=7),
    "new priorities": lambda store, _: refresh_priorities(store, "c"),
    "an erased rater": lambda store, rater_id: owners.erase_rater(store, None, rater_id, "remove"),
}


@pytest.mark.parametrize("what", MANY_PAIRS)
def test_what_writes_to_many_pairs_does_so_in_one_order(
    store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable, what: str
) -> None:
    """Leases run out for pair 1, then 2 and so on; whoever else writes to them begins when pair 1 is taken."""
    store.create_campaign("c", make_rows(12), tmp_path / "clips", target_votes=3, min_listen_ms=0)
    gone, away = add_raters(2)
    with store.write() as session:
        session.execute(update(Pair).values(n_open=2, priority=0.5))
        for pair_id in range(12, 0, -1):
            for rater_id, lasts in ((gone, 10), (away, -10)):
                lease = {
                    "id": f"{rater_id}-{pair_id}",
                    "pair_id": pair_id,
                    "rater_id": rater_id,
                    "expires_at": utc_now() + timedelta(lasts),
                }
                session.add(Assignment(**lease, swapped=False, policy="p", propensity=1.0, min_listen_ms=0, aspects=[]))
    with store.write() as session:
        session.execute(update(Pair).where(Pair.id == 1).values(priority=0.4))  # PostgreSQL finds it last from now on
        session.execute(text("analyze"))  # as both do for themselves once a table has grown
    with ThreadPoolExecutor(1) as pool:
        other: list[Future] = []

        def begin(*told: Any) -> None:
            if told[2].startswith("UPDATE pair") and not other:
                other.append(pool.submit(MANY_PAIRS[what], store, gone))
                time.sleep(0.5)

        event.listen(store.engine, "after_cursor_execute", begin)
        with store.write_core() as connection:
            assert expire_leases(connection, utc_now()) == 12
        other[0].result()
    with store.read() as session:
        assert set(session.scalars(select(Pair.n_open))) == {0 if what == "an erased rater" else 1}
