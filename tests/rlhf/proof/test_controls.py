import numpy as np
import pytest

from rlhf.proof.controls import DRIFT, judge_controls, over_draws
from rlhf.proof.figures import Pairs, Told, won


def told(share, experiment="shuffled", method="ppo", taste="warm", seed=3, draw=0, kl=50.0, prompts=100):
    """A system that wins `share` of its pairs, spread over all prompts."""
    pairs = Pairs(
        np.where(np.arange(2 * prompts) % 100 < 100 * share, 1.0, -1.0), np.zeros(2 * prompts), [str(i // 2) for i in range(2 * prompts)]
    )
    row = {"experiment": experiment, "method": method, "taste": taste, "seed": seed, "votes": None, "draw": draw, "kl": kl}
    return Told({**row, **won(pairs), "diversity_ratio": 1.0, "fit": {}, "copies": {}, "beyond": {}}, pairs)


def held(found, main=()):
    return [(row["control"], row["held"]) for row in judge_controls(found, main)]


def test_the_interval_over_draws_is_students():
    low, high = over_draws([0.4, 0.5, 0.6])
    assert (low, high) == pytest.approx((0.5 - 4.303 * 0.1 / 3**0.5, 0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert over_draws([0.8]) is None


def test_shuffled_votes_are_judged_over_draws_and_not_by_prompts():
    """By prompt these draws win .60 with an interval above .5; over draws .60 may be chance."""
    draws = [told(share, draw=draw) for draw, share in enumerate((0.35, 0.75, 0.7))]
    row = judge_controls({"shuffled": draws}, [])[0]
    assert row["prompt_ci"][0] > 0.5
    assert row["ci"][0] < 0.5 < row["ci"][1]
    assert (row["judged_by"], row["runs"], row["held"]) == ("draw", 3, True)
    assert held({"shuffled": [told(0.8 + d / 100, draw=d) for d in range(3)]}) == [("shuffled", False)]
    assert held({"shuffled": draws[:1]}) == [("shuffled", None)]


def test_shuffled_votes_without_checks_are_judged_likewise_and_apart():
    draws = [told(share, "listeners", draw=draw) for draw, share in enumerate((0.45, 0.5, 0.55))]
    assert held({"listeners": draws}) == [("listeners", True)]
    rows = judge_controls({"shuffled": [told(0.8, draw=0), told(0.8, draw=1)], "listeners": draws}, [])
    assert [(row["control"], row["win_rate"], row["held"]) for row in rows] == [
        ("shuffled", 0.8, False),
        ("listeners", pytest.approx(0.5, abs=0.01), True),
    ]


def test_methods_are_judged_apart_and_tastes_are_draws_too():
    found = [told(0.4, taste="warm"), told(0.6, taste="drive"), told(0.9, method="dpo"), told(0.9, method="dpo", taste="drive")]
    rows = judge_controls({"shuffled": found}, [])
    assert [(row["method"], row["runs"]) for row in rows] == [("ppo", 2), ("dpo", 2)]


def test_reversed_votes_must_lose_and_a_constant_reward_must_not_move():
    assert held({"reversed": [told(0.2)]}) == [("reversed", True)]
    assert held({"reversed": [told(0.5)]}) == [("reversed", False)]
    assert held({"constant": [told(0.5, kl=DRIFT / 2)]}) == [("constant", True)]
    assert held({"constant": [told(0.5, kl=2 * DRIFT)]}) == [("constant", False)]
    assert held({"constant": [told(0.7, kl=0.1)]}) == [("constant", False)]


def test_gold_is_compared_with_votes_of_the_same_taste_and_seed_by_clip():
    found = {"gold": [told(0.9, "gold")]}
    assert held(found) == [("gold", None)]
    assert held(found, [told(0.8, "main")]) == [("gold", True)]
    assert held(found, [told(0.8, "main", taste="drive")]) == [("gold", None)]
    assert held({"gold": [told(0.6, "gold")]}, [told(0.9, "main")]) == [("gold", False)]
    few, many = told(0.5, "curve"), told(0.9, "curve")
    assert held({"gold": [told(0.6, "gold")]}, [few, many]) == [("gold", False)]  # the most votes count
    assert held({"gold": [told(0.6, "gold")]}, [few, told(0.9, "curve", method="best_of_n")]) == [("gold", True)]
