"""Boards and raters' quality from real votes in a real database."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from sqlalchemy import select, update

from db.errors import NotFoundError, StoreError
from db.leaderboard import leaderboard, tags
from db.quality import EVERYTHING, Quality, Rules, alpha, of_rater, qualities, wilson
from db.schema import Assignment, Campaign, Pair, Vote
from db.store import Store

SYSTEMS = ("good", "fair", "poor")


@pytest.fixture
def campaign(store: Store, make_rows: Callable, tmp_path: Path) -> str:
    rows = make_rows(12, SYSTEMS)
    by_prompt = [rows[i : i + 3] for i in range(0, 36, 3)]
    pairs = [(one["sha256"], other["sha256"]) for clips in by_prompt for one, other in combinations(clips, 2)]
    store.create_campaign("c", rows, tmp_path / "clips", target_votes=20, min_listen_ms=0, pairs=pairs)
    with store.write() as session:
        session.execute(update(Campaign).values(aspects=["prompt_fit", "musicality"]))
    return "c"


def vote(store: Store, rater: int, rng: random.Random, errs: float = 0.2, side: str | None = None, n: int = 99) -> None:
    """Prefers the earlier system in SYSTEMS but for a share of errors; musicality always says the opposite."""
    rank = {system: i for i, system in enumerate(SYSTEMS)}
    for _ in range(n):
        offer = store.next_assignment(rater, rng=rng)
        if offer is None:
            return
        place = {}
        for s in "ab":
            name = Path(store.audio_file(offer.assignment_id, s, rater).uri).stem
            place[s] = rank[name.split("_")[1]]
        best = min(place, key=lambda s: place[s])
        if rng.random() < errs:
            best = "b" if best == "a" else "a"
        choice = side or best
        aspects = {"musicality": 1 if choice == "a" else -1}
        key = offer.assignment_id
        store.submit_vote(
            rater, key, choice, idempotency_key=key, aspects=aspects, coverage_a=0.5, coverage_b=1.0, listen_a_ms=0, listen_b_ms=0
        )


def make_gold(store: Store, rater: int, n: int, right: int) -> None:
    """Turns the rater's first n votes into gold answers, `right` of them found."""
    with store.write() as session:
        rows = session.execute(
            select(Assignment, Pair, Vote).join(Pair, Pair.id == Assignment.pair_id).join(Vote, Vote.assignment_id == Assignment.id)
            .where(Assignment.rater_id == rater).order_by(Vote.id).limit(n)
        ).all()  # fmt: skip
        for i, (assignment, pair, said) in enumerate(rows):
            answer = "x" if (said.choice == "a") != assignment.swapped else "y"
            pair.gold = answer if i < right else {"x": "y", "y": "x"}[answer]
            assignment.kind = "gold"


def quality(**known: int) -> Quality:
    zeros = dict.fromkeys(("n_votes", "n_gold", "n_gold_right", "n_repeat", "n_repeat_same", "n_decided", "n_left"), 0)
    return Quality(rater_id=1, handle="r", status="active", coverage=None, reliability=1.0, **(zeros | known))


def test_the_board_orders_systems_and_counts_each_vote_once(store: Store, campaign: str, add_raters: Callable) -> None:
    rng = random.Random(0)
    for rater in add_raters(6):
        vote(store, rater, rng)
    board = leaderboard(store, campaign)
    assert [standing.system for standing in board.standings] == list(SYSTEMS)
    assert board.n_votes == 6 * 36 == sum(map(sum, board.wins))
    assert sum(standing.wins for standing in board.standings) == sum(standing.losses for standing in board.standings) == board.n_votes
    assert board.n_raters == 6
    assert board.connected
    assert sum(n for _, n in board.votes_by_day) == board.n_votes
    for standing in board.standings:
        assert standing.ci is not None
        assert standing.ci[0] < standing.strength < standing.ci[1]
    first = board.standings[0]
    assert (first.separate, board.standings[-1].votes_needed) == (first.votes_needed == 0, None)
    assert board.agreement is not None
    assert 0.5 < board.agreement.rate < 0.9
    assert board.alpha is not None
    assert 0 < board.alpha < 1


def test_systems_that_never_met_are_not_told_apart(store: Store, make_rows: Callable, tmp_path: Path, add_raters: Callable) -> None:
    rows = make_rows(12, SYSTEMS) + make_rows(12, ("w", "z"), salt="2")
    by_prompt = {i: [row["sha256"] for row in rows if row["prompt_id"] == f"p{i}"] for i in range(12)}
    pairs = [pair for shas in by_prompt.values() for pair in (shas[:2], shas[3:])]
    store.create_campaign("c", rows, tmp_path / "clips", target_votes=20, min_listen_ms=0, pairs=pairs)
    rng = random.Random(0)
    for rater in add_raters(6):
        while (offer := store.next_assignment(rater, rng=rng)) is not None:
            key = offer.assignment_id
            name = Path(store.audio_file(key, "a", rater).uri).stem.split("_")[1]
            first = name.startswith((SYSTEMS[0], "w"))
            choice = "a" if first == (rng.random() < 0.9) else "b"
            store.submit_vote(rater, key, choice, idempotency_key=key, listen_a_ms=0, listen_b_ms=0)
    board = leaderboard(store, "c")
    assert not board.connected
    group = {SYSTEMS[0]: 0, SYSTEMS[1]: 0, "w": 1, "z": 1}
    for row, after in zip(board.standings, board.standings[1:]):
        met = group[row.system] == group[after.system]
        assert (row.separate, row.votes_needed) == ((True, 0) if met else (False, None))


def test_an_aspect_and_a_tag_have_boards_of_their_own(store: Store, campaign: str, add_raters: Callable) -> None:
    rng = random.Random(1)
    for rater in add_raters(4):
        vote(store, rater, rng)
    turned = leaderboard(store, campaign, aspect="musicality")
    assert [standing.system for standing in turned.standings] == list(SYSTEMS[::-1])
    assert leaderboard(store, campaign, aspect="prompt_fit").standings == ()
    assert tags(store, campaign) == ["genre:jazz", "split:heldout", "split:train"]
    parts = [leaderboard(store, campaign, tag=f"split:{split}").n_votes for split in ("train", "heldout")]
    assert parts == [72, 72]
    assert leaderboard(store, campaign, tag="genre:polka").n_votes == 0
    with pytest.raises(StoreError, match="aspect 'loudness'"):
        leaderboard(store, campaign, aspect="loudness")
    with pytest.raises(StoreError, match="tag 'jazz'"):
        leaderboard(store, campaign, tag="jazz")
    with pytest.raises(NotFoundError, match="nowhere"):
        leaderboard(store, "nowhere")


def test_a_campaign_without_votes_has_an_empty_board(store: Store, campaign: str) -> None:
    board = leaderboard(store, campaign)
    assert (board.standings, board.n_votes, board.agreement, board.alpha, board.tie) == ((), 0, None, None, None)


def test_both_bad_is_counted_apart(store: Store, campaign: str, add_raters: Callable) -> None:
    one, two = add_raters(2)
    vote(store, one, random.Random(2))
    for _ in range(5):
        key = store.next_assignment(two).assignment_id
        store.submit_vote(two, key, "both_bad", idempotency_key=key, listen_a_ms=0, listen_b_ms=0)
    board = leaderboard(store, campaign)
    assert (board.n_votes, board.n_both_bad) == (36, 5)
    assert sum(standing.both_bad for standing in board.standings) == 10
    assert board.standings[0].ci is None  # one rater's votes rank: nobody to tell how far raters differ


def test_doubted_raters_leave_the_board_and_are_counted_by_reason(store: Store, campaign: str, add_raters: Callable) -> None:
    rng = random.Random(3)
    good, one_sided, careless, blocked = add_raters(4)
    vote(store, good, rng)
    vote(store, one_sided, rng, side="a")
    vote(store, careless, rng)
    vote(store, blocked, rng, n=7)
    store.block_rater("rater 3")
    make_gold(store, careless, 6, 1)
    board = leaderboard(store, campaign)
    with store.read() as session:
        votes = len(session.scalars(select(Vote.id)).all())
        gold_pairs = set(session.scalars(select(Pair.id).where(Pair.gold.is_not(None))))
    assert board.excluded == {"gold_missed": 36, "one_sided": 36, "rater_blocked": 7}
    assert board.n_raters == 1
    assert votes == 36 * 3 + 7  # nothing was deleted
    assert gold_pairs
    everything = leaderboard(store, campaign, rules=EVERYTHING)
    assert everything.excluded == {"rater_blocked": 7}
    assert everything.n_raters == 3


def test_votes_that_heard_too_little_are_counted(store: Store, campaign: str, add_raters: Callable) -> None:
    vote(store, add_raters(1)[0], random.Random(4))
    assert leaderboard(store, campaign, rules=Rules(min_coverage=0.6)).excluded == {"heard_too_little": 36}


def test_quality_is_measured_by_whoever_asks(store: Store, campaign: str, add_raters: Callable) -> None:
    rng = random.Random(5)
    careful, careless = add_raters(2)
    vote(store, careful, rng, errs=0.0)
    vote(store, careless, rng, errs=0.5)
    make_gold(store, careful, 4, 3)
    found = qualities(store, campaign)
    assert qualities(store, campaign) == found
    assert (found[careful].n_gold, found[careful].gold_accuracy) == (4, 0.75)
    assert found[careless].reliability < found[careful].reliability
    assert found[careful].coverage == pytest.approx(0.75)
    assert found[careless].n_votes == 36
    assert found[careless].repeat_agreement is None
    assert of_rater(store, careful) == [(1, found[careful])]


def test_a_repeat_agrees_when_the_same_clip_won(store: Store, campaign: str, add_raters: Callable) -> None:
    (rater,) = add_raters(1)
    vote(store, rater, random.Random(6), n=6)
    with store.write() as session:
        firsts = session.execute(select(Assignment, Vote).join(Vote, Vote.assignment_id == Assignment.id).order_by(Vote.id)).all()
        for i, (first, said) in enumerate(firsts[:4]):
            again = Assignment(
                id=f"again{i}", pair_id=first.pair_id, rater_id=rater, rep=1, kind="repeat", swapped=not first.swapped, policy="repeat",
                propensity=0.1, min_listen_ms=0, aspects=[], status="voted", expires_at=first.expires_at,
            )  # fmt: skip
            session.add(again)
            session.flush()
            turned = {"a": "b", "b": "a"}[said.choice]
            choice = turned if i < 3 else said.choice
            session.add(
                Vote(
                    assignment_id=again.id, rater_id=rater, idempotency_key=again.id, choice=choice, listen_a_ms=0, listen_b_ms=0, events=[]
                )
            )
    found = qualities(store, campaign)[rater]
    assert (found.n_repeat, found.repeat_agreement) == (4, 0.75)
    assert leaderboard(store, campaign).n_votes == 6  # repeats rank nothing


def test_nobody_falls_on_two_unlucky_golds() -> None:
    strict = Rules(min_gold_accuracy=0.95)
    assert strict.reason(quality(n_gold=2, n_gold_right=0)) is None
    assert Rules().reason(quality(n_gold=3, n_gold_right=1)) is None
    assert Rules().reason(quality(n_gold=8, n_gold_right=2)) == "gold_missed"
    assert Rules().reason(quality(n_repeat=2)) is None
    assert Rules().reason(quality(n_repeat=10, n_repeat_same=0)) == "inconsistent"
    assert Rules().reason(quality(n_decided=10, n_left=10)) is None
    assert Rules().reason(quality(n_decided=40, n_left=0)) == "one_sided"


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(StoreError, match=r"min_gold_accuracy=1\.5"):
        Rules(min_gold_accuracy=1.5)


def test_wilson_holds_at_the_ends() -> None:
    assert wilson(0, 2)[0] == 0
    assert wilson(5, 5)[1] == 1
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_alpha_of_agreement_is_one_and_of_chance_about_none() -> None:
    assert alpha([[3, 0, 0, 0], [0, 3, 0, 0]]) == pytest.approx(1)
    rng = random.Random(0)
    said = []
    for _ in range(800):
        x = sum(rng.random() < 0.5 for _ in range(3))
        said.append([x, 3 - x, 0, 0])
    assert alpha(said) == pytest.approx(0, abs=0.06)
    assert alpha([[1, 0, 0, 0]]) is None
