import numpy as np
import pytest

from rlhf.preferences import Vote
from rlhf.raters import agreement, ceiling, reliability, weights


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
