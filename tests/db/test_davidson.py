"""Davidson's model: what it recovers, what it equals, and how often its intervals hold."""

from __future__ import annotations

import choix
import numpy as np
import pytest

from db.davidson import Counts, fit, fit_davidson, fit_with_covariance, half_widths, votes_needed
from db.errors import StoreError

NU, BIAS = 0.5, 0.3


def simulate(rng, n_votes, n_raters=40, size=10, taste=0.0):
    """Votes of raters who differ in how many they give, how well they hear and what they like -> strengths, scales, Counts."""
    strengths = np.linspace(-1, 1, size)
    scales = np.exp(rng.normal(0, 0.5, n_raters))
    scales /= np.exp(np.log(scales).mean())
    tastes = strengths + rng.normal(0, taste, (n_raters, size))
    share = rng.lognormal(0, 0.8, n_raters)
    rater = rng.choice(n_raters, n_votes, p=share / share.sum())
    a = rng.integers(0, size, n_votes)
    b = (a + rng.integers(1, size, n_votes)) % size
    lean = scales[rater] * (tastes[rater, a] - tastes[rater, b]) + BIAS
    odds = np.stack([np.exp(lean / 2), np.exp(-lean / 2), np.full(n_votes, NU)], axis=1)
    choice = (rng.random(n_votes)[:, None] > (odds / odds.sum(1, keepdims=True)).cumsum(1)).sum(1)
    cells, of = np.unique((rater * size + a) * size + b, return_inverse=True)
    n = np.zeros((len(cells), 3))
    np.add.at(n, (of, choice), 1)
    raters, seat = np.unique(cells // size**2, return_inverse=True)
    names = tuple(f"s{i}" for i in range(size))
    return strengths, scales, Counts(names, tuple(raters.tolist()), cells // size % size, cells % size, seat, n)


def test_strengths_ties_side_and_scales_are_recovered():
    strengths, scales, counts = simulate(np.random.default_rng(0), 60_000)
    found = fit(counts)
    np.testing.assert_allclose(list(found.strengths.values()), strengths, atol=0.07)
    assert found.tie == pytest.approx(NU, abs=0.02)
    assert found.side_bias == pytest.approx(BIAS, abs=0.05)
    log_scales = np.log(list(found.scales.values()))
    assert np.corrcoef(log_scales, np.log(scales[list(found.scales)]))[0, 1] > 0.95
    assert log_scales.mean() == pytest.approx(0, abs=0.05)


def test_without_ties_or_bias_it_equals_choix():
    rng = np.random.default_rng(1)
    games, wins = [], []
    for _ in range(800):
        i, j = rng.choice(4, 2, replace=False)
        first = rng.random() < 1 / (1 + np.exp(-(i - j) / 2))
        # Each game in both orders: no side has an advantage.
        games += [(f"s{i}", f"s{j}", "a" if first else "b"), (f"s{j}", f"s{i}", "b" if first else "a")]
        wins += [(i, j) if first else (j, i)] * 2
    oracle = choix.ilsr_pairwise(4, wins)
    found = fit_davidson(games, shrinkage=1e-6)
    np.testing.assert_allclose([found.strengths[f"s{i}"] for i in range(4)], oracle - oracle.mean(), atol=1e-3)


def test_a_rater_who_presses_keys_gets_a_small_scale():
    rng = np.random.default_rng(2)
    votes = []
    for rater in range(8):
        for _ in range(200):
            a, b = map(int, rng.choice(5, 2, replace=False))
            hears = 0.0 if rater == 7 else 1.0
            votes.append((rater, f"s{a}", f"s{b}", "a" if rng.random() < 1 / (1 + np.exp(-hears * (a - b))) else "b", 1))
    scales = fit(Counts.of(votes)).scales
    assert scales[7] < 0.5 * min(scale for rater, scale in scales.items() if rater != 7)


def test_one_vote_hardly_moves_a_raters_scale():
    votes = [(0, "p", "q", "a", 60), (0, "p", "q", "b", 30), (1, "p", "q", "b", 1)]
    assert fit(Counts.of(votes)).scales[1] == pytest.approx(1, abs=0.3)


def test_sides_may_change_places_throughout():
    _, _, counts = simulate(np.random.default_rng(3), 4000)
    turned = Counts(counts.systems, counts.raters, counts.b, counts.a, counts.rater, counts.n[:, [1, 0, 2]])
    one, other = fit(counts), fit(turned)
    np.testing.assert_allclose(list(one.strengths.values()), list(other.strengths.values()), atol=1e-3)
    assert one.side_bias == pytest.approx(-other.side_bias, abs=1e-3)


def test_a_system_that_always_wins_stays_finite():
    found = fit_davidson([("p", "q", "a")] * 50)
    assert np.isfinite(list(found.strengths.values())).all()
    assert found.strengths["p"] > found.strengths["q"]


def test_intervals_hold_for_uneven_raters_with_tastes_of_their_own():
    rng = np.random.default_rng(4)
    hits, naive_hits = [], []
    for _ in range(100):
        strengths, _, counts = simulate(rng, 1200, taste=0.5)
        found, covariance = fit_with_covariance(counts)
        assert covariance is not None
        error = np.abs(np.array(list(found.strengths.values())) - strengths)
        hits.append(error <= half_widths(covariance, len(counts.raters)))
        # As if every cell were somebody else's: what an interval that knows no raters says.
        strangers = Counts(counts.systems, tuple(range(len(counts.a))), counts.a, counts.b, np.arange(len(counts.a)), counts.n)
        found, covariance = fit_with_covariance(strangers, scales=False)
        assert covariance is not None
        error = np.abs(np.array(list(found.strengths.values())) - strengths)
        naive_hits.append(error <= half_widths(covariance, len(strangers.raters)))
    assert 0.88 <= np.mean(hits) <= 0.985
    assert np.mean(naive_hits) < np.mean(hits)


def test_one_raters_votes_have_no_interval():
    _, covariance = fit_with_covariance(Counts.of([("r", "p", "q", "a", 10), ("r", "p", "q", "b", 5)]))
    assert covariance is None


def test_votes_needed_fall_to_none_as_the_gap_grows():
    covariance = np.diag([0.02, 0.02])
    needed = [votes_needed(gap, covariance, 0, 1, 1000, 40) for gap in (0.1, 0.2, 1.0)]
    assert needed[0] > needed[1] > needed[2] == 0
    assert votes_needed(0.0, covariance, 0, 1, 1000, 40) is None
    # Four times the votes halve the standard error: half the gap then is as plain as the whole one is now.
    edge = float(np.sqrt(0.04) * 2.0226909)
    assert votes_needed(edge / 2, covariance, 0, 1, 1000, 40) == pytest.approx(3000, abs=2)


def test_systems_that_never_met_are_told():
    assert Counts.of([("r", "p", "q", "a", 1), ("r", "q", "z", "a", 1)]).connected()
    assert not Counts.of([("r", "p", "q", "a", 1), ("r", "y", "z", "a", 1)]).connected()


def test_no_vote_that_orders_is_refused():
    with pytest.raises(StoreError, match="no vote that orders"):
        fit(Counts.of([("r", "p", "q", "both_bad", 3), ("r", "p", "p", "a", 2)]))
