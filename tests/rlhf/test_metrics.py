import numpy as np
import pytest

from rlhf import metrics


def test_win_rate_counts_ties_out_and_half():
    rate = metrics.win_rate([1, 1, 1, 0, 0.5, 0.5], list("aabbcc"))
    assert rate.decided.value == pytest.approx(0.75)
    assert rate.with_ties.value == pytest.approx(4 / 6)
    assert (rate.decided.n, rate.with_ties.n, rate.n_ties) == (4, 6, 2)


def test_win_rate_refuses_what_it_cannot_tell():
    with pytest.raises(ValueError, match="decided"):
        metrics.win_rate([0.5, 0.5], ["a", "b"])
    with pytest.raises(ValueError, match="outcomes"):
        metrics.win_rate([0.7], ["a"])


def test_paired_outcomes_need_more_than_the_tie_width():
    found = metrics.paired_outcomes([1.0, 0.0, 0.05], [0.0, 1.0, 0.0], tie_width=0.1)
    np.testing.assert_array_equal(found, [1, 0, 0.5])


def test_interval_by_prompt_covers_the_truth_where_an_interval_by_pair_does_not():
    rng = np.random.default_rng(0)
    by_prompt = by_pair = 0
    rounds = 200
    for round_number in range(rounds):
        chance = rng.beta(2, 2, size=40)  # prompts differ much, pairs of one prompt are alike; the mean chance is 1/2
        wins = (rng.random((40, 10)) < chance[:, None]).ravel().astype(float)
        prompts = np.repeat(np.arange(40), 10)
        low, high = metrics.mean_ci(wins, prompts, n_boot=300, seed=round_number).ci
        by_prompt += low <= 0.5 <= high
        low, high = metrics.mean_ci(wins, np.arange(400), n_boot=300, seed=round_number).ci
        by_pair += low <= 0.5 <= high
    assert by_prompt / rounds > 0.88
    assert by_pair / rounds < 0.8


def test_closed_form_interval_of_a_mean_is_the_general_one():
    rng = np.random.default_rng(1)
    values, clusters = rng.normal(size=90), np.repeat(np.arange(30), 3)
    general = metrics.cluster_bootstrap(lambda rows: float(values[rows].mean()), clusters, n_boot=500, seed=4)
    np.testing.assert_allclose(metrics.mean_ci(values, clusters, n_boot=500, seed=4).ci, general, atol=0.08)


def test_bootstrap_moves_whole_clusters():
    clusters = [0, 0, 1, 1, 1]
    seen = []
    metrics.cluster_bootstrap(lambda rows: seen.append(np.bincount(rows, minlength=5)) or 0.0, clusters, n_boot=20)
    for counts in seen:
        assert counts[0] == counts[1]
        assert counts[2] == counts[3] == counts[4]


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20) % 3
    assert metrics.mean_ci(values, np.arange(20), seed=1) == metrics.mean_ci(values, np.arange(20), seed=1)


def test_accuracy_leaves_ties_out_and_halves_blank_margins():
    found = metrics.accuracy([1.0, -1.0, 0.0, 5.0], ["a", "b", "c", "d"], p=[1.0, 0.7, 1.0, 0.5])
    assert found.value == pytest.approx(0.5)
    assert found.n == 3


def test_calibration_error_is_small_for_the_truth_and_large_for_overconfidence():
    rng = np.random.default_rng(2)
    margin = rng.normal(0, 1.5, 8000)
    won = (rng.random(8000) < 1 / (1 + np.exp(-margin))).astype(float)
    honest = metrics.pair_calibration_error(margin, won)
    boastful = metrics.pair_calibration_error(4 * margin, won)
    assert honest < 0.02
    assert boastful > 0.1


def test_calibration_error_of_a_constant_is_its_distance_from_the_mean():
    assert metrics.expected_calibration_error(np.full(100, 0.9), np.r_[np.ones(60), np.zeros(40)], n_bins=1) == pytest.approx(0.3)


def test_diversity_is_the_mean_distance_within_a_prompt():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [7.0, 7.0]])
    assert metrics.diversity(points, ["a", "a", "b", "b", "alone"]) == pytest.approx((5 + 1) / 2)


def test_a_policy_that_plays_one_song_has_no_diversity():
    assert metrics.diversity(np.ones((6, 3)), [0, 0, 0, 1, 1, 1]) == 0
    with pytest.raises(ValueError, match="two clips"):
        metrics.diversity(np.ones((2, 3)), [0, 1])


def test_sequence_kl_estimates_the_kl_of_independent_steps():
    rng = np.random.default_rng(3)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    drawn = rng.choice(3, p=p, size=(4000, 5))
    found = metrics.sequence_kl(np.log(p)[drawn], np.log(q)[drawn], np.ones((4000, 5), bool), np.arange(4000))
    truth = 5 * float((p * np.log(p / q)).sum())
    assert found.ci[0] < truth < found.ci[1]
    assert found.value == pytest.approx(truth, rel=0.05)


def test_masked_steps_add_nothing_to_the_kl():
    logps, ref = np.array([[1.0, np.nan]]), np.array([[0.5, 2.0]])
    assert metrics.sequence_kl(logps, ref, [[True, False]], ["a"]).value == pytest.approx(0.5)


def test_figures_are_plain_json():
    figure = metrics.mean_ci([1.0, 0.0], ["a", "b"]).as_json()
    assert set(figure) == {"value", "ci", "n", "n_clusters"}
    assert isinstance(figure["ci"], list)


@pytest.mark.parametrize(
    ("value", "limit", "told"),
    [(0.61, 0.5, "0.610"), (0.5, 0.5, "0.500"), (0.4999, 0.5, "0.4999"), (-2e-5, 0, "-0.00002"), (0.1 + 0.2, 0.3, "0.30000000000000004")],
)
def test_a_number_reads_otherwise_than_a_limit_that_it_is_not(value, limit, told):
    assert f"{value:.{metrics.decimals(value, limit)}f}" == told
    assert metrics.decimals(None, limit) == metrics.decimals(float("nan"), limit) == 3
