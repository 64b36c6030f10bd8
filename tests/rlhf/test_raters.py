import numpy as np
import pytest
from scipy.optimize import approx_fprime

from rlhf import raters
from rlhf.preferences import Vote
from rlhf.raters import agreement, ceiling, habits, reliability, weights


def vote(pair, rater, choice, **extra):
    return Vote(f"{pair}-{rater}", str(pair), "p", "prompt", "train", rater, choice, f"{pair}x", f"{pair}y", **extra)


def crowd(accuracies, n_pairs=300, per_pair=3, seed=0):
    """Every pair is judged by `per_pair` of the raters; rater r names the better clip with probability accuracies[r]."""
    rng = np.random.default_rng(seed)
    votes = []
    for pair in range(n_pairs):
        better = rng.choice(["x", "y"])
        for rater in rng.choice(len(accuracies), per_pair, replace=False):
            right = rng.random() < accuracies[rater]
            votes.append(vote(pair, f"r{rater}", better if right else {"x": "y", "y": "x"}[better]))
    return votes


@pytest.mark.parametrize("q", [0.6, 0.75, 0.9])
def test_ceiling_recovers_the_accuracy_of_equal_raters(q):
    assert ceiling(q**2 + (1 - q) ** 2) == pytest.approx(q)


def test_ceiling_of_coin_flips_is_one_half():
    assert ceiling(0.5) == 0.5
    assert ceiling(0.4) == 0.5


def test_agreement_estimates_the_ceiling_with_an_interval_around_it():
    found = agreement(crowd([0.8] * 6, n_pairs=1500))
    assert found.rate == pytest.approx(0.68, abs=0.03)
    assert found.ci[0] < 0.8 < found.ci[1]
    assert found.n == 4500


def test_agreement_needs_two_raters_on_a_pair():
    assert agreement([vote(0, "a", "x"), vote(1, "b", "y")]) is None
    assert agreement([vote(0, "a", "x"), vote(0, "b", "tie")]) is None


def test_reliability_recovers_the_accuracies_of_raters():
    accuracies = [0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6]
    found = reliability(crowd(accuracies, n_pairs=3000), prior_votes=1)
    for index, accuracy in enumerate(accuracies):
        assert found[f"r{index}"].accuracy == pytest.approx(accuracy, abs=0.04)


def test_a_careless_rater_among_twelve_weighs_least():
    for seed in range(3):
        found = weights(reliability(crowd([0.75] * 11 + [0.5], n_pairs=300, seed=seed)))
        others = [weight for rater, weight in found.items() if rater != "r11"]
        assert found["r11"] < min(others)
        assert found["r11"] < 0.7 * np.mean(others)


def test_an_adversary_weighs_nothing():
    found = reliability(crowd([0.85] * 6 + [0.15], n_pairs=600))
    assert found["r6"].weight == 0
    assert found["r6"].accuracy < 0.3


def test_a_rater_with_few_votes_stays_near_the_prior():
    votes = [*crowd([0.9] * 5, n_pairs=200), vote(0, "new", "x")]
    assert reliability(votes, prior=0.7)["new"].accuracy == pytest.approx(0.7, abs=0.1)


def test_raters_who_never_met_count_alike():
    found = reliability([vote(0, "a", "x"), vote(1, "b", "y")])
    assert found["a"].weight == found["b"].weight == 1


def test_gold_questions_settle_who_is_right():
    votes = [vote(pair, rater, choice, gold="x") for pair in range(30) for rater, choice in (("good", "x"), ("bad", "y"))]
    found = reliability(votes)
    assert found["good"].accuracy > 0.85 > 0.4 > found["bad"].accuracy


def test_weights_have_mean_one():
    found = weights(reliability(crowd([0.9, 0.8, 0.7, 0.6], n_pairs=400)))
    assert np.mean(list(found.values())) == pytest.approx(1)


def test_an_adversary_may_be_turned_round_and_a_careless_rater_not():
    found = reliability(crowd([0.85] * 6 + [0.15, 0.5], n_pairs=600))
    assert [rater for rater, quality in found.items() if quality.adversary] == ["r6"]
    silenced, inverted = weights(found), weights(found, "invert")
    assert silenced["r6"] == 0
    assert inverted["r6"] == pytest.approx(-inverted["r0"], rel=0.5)
    assert inverted["r0"] == pytest.approx(silenced["r0"])
    assert abs(inverted["r7"]) < 0.3


# ---- habits ----------------------------------------------------------------------------------------------------------


def answers(slopes, leans, n, tie=0.5, seed=0):
    """Votes of raters with these slopes and leans on margins from a standard normal: (votes, margins)."""
    rng = np.random.default_rng(seed)
    margins, votes = rng.normal(size=n), []
    for number, d in enumerate(margins):
        rater = int(rng.integers(len(slopes)))
        left = rng.choice(["x", "y"])
        half = (slopes[rater] * d + leans[rater] * (1 if left == "x" else -1)) / 2
        odds = np.array([np.exp(half), np.exp(-half), tie])
        said = str(rng.choice(["x", "y", "tie"], p=odds / odds.sum()))
        votes.append(Vote(str(number), str(number), "p", "", "train", f"r{rater}", said, "x", "y", shown_first=str(left)))
    return votes, margins


def test_slopes_leans_and_ties_are_recovered():
    slopes, leans = np.array([2.0, 1.5, 1.2, 1.0, 0.7, 0.2]), np.array([0.5, -0.4, 0.0, 0.3, 0.1, -0.2])
    found = habits(*answers(slopes, leans, 20_000))
    np.testing.assert_allclose([found.raters[f"r{i}"].slope * found.scale for i in range(6)], slopes, atol=0.15)
    np.testing.assert_allclose([found.raters[f"r{i}"].lean for i in range(6)], leans, atol=0.12)
    assert found.tie == pytest.approx(0.5, abs=0.03)
    assert np.mean([habit.slope for habit in found.raters.values()]) == pytest.approx(1, abs=0.2)


def test_standard_errors_of_slopes_hold():
    """Over many crews the truth lies within two standard errors about 95 times in 100."""
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(12):
        slopes = 1 + 0.4 * rng.normal(size=8)
        found = habits(*answers(slopes, np.zeros(8), 1200, seed=seed))
        got = np.array([found.raters[f"r{i}"].slope * found.scale for i in range(8)])
        inside += list(np.abs(got - slopes) < 2 * np.array([found.raters[f"r{i}"].slope_se * found.scale for i in range(8)]))
    assert 0.85 < np.mean(inside) <= 1


def test_an_adversary_has_a_slope_below_zero_and_the_careless_one_has_none():
    found = habits(*answers([1.5] * 6 + [-1.2, 0.0], [0.0] * 8, 2400)).raters
    assert [rater for rater, habit in found.items() if habit.adversary] == ["r6"]
    assert found["r6"].used() == 0 > found["r6"].used("invert")
    assert abs(found["r7"].slope) < 0.3
    assert found["r7"].used("invert") == max(0.0, found["r7"].slope)


def test_a_rater_of_few_votes_is_taken_for_the_mean_one():
    votes, margins = answers([1.5] * 5, [0.0] * 5, 1500)
    new = Vote("new", "new", "p", "", "train", "new", "y", "x", "y")
    assert habits([*votes, new], np.append(margins, 1.0)).raters["new"].slope == pytest.approx(1, abs=0.2)


def test_margins_that_tell_nothing_make_no_habits():
    votes, margins = answers([1.0] * 4, [0.0] * 4, 400)
    assert habits(votes, np.random.default_rng(1).permutation(margins)) is None
    assert habits(votes, np.zeros(400)) is None


def test_slope_and_curvature_of_the_posterior_are_its_derivatives():
    rng = np.random.default_rng(0)
    said, d, o, who = np.eye(3)[rng.integers(0, 3, 40)], rng.normal(size=40), rng.choice([-1.0, 0.0, 1.0], 40), rng.integers(0, 3, 40)
    at = rng.normal(size=9)
    rest = (d, o, who, 0.6, 0.4)
    numeric = approx_fprime(at, lambda x: raters._habits_loss(x, said, *rest)[0], 1e-6)
    np.testing.assert_allclose(raters._habits_loss(at, said, *rest)[1], numeric, atol=1e-4)
    numeric = approx_fprime(at, lambda x: raters._habits_loss(x, said, *rest)[1], 1e-6)
    np.testing.assert_allclose(raters._habits_information(at, *rest), numeric, atol=1e-4)
