from collections import Counter

import numpy as np
import pytest

from rlhf.preferences import Vote
from rlhf.raters import reliability
from rlhf.simulation.raters import CHOICES, Listener, choose, crew, stream


def answers(listener, gold_a, gold_b, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    return Counter(choose(listener, gold_a, gold_b, rng) for _ in range(n))


def test_without_ties_a_listener_is_bradley_terry():
    said = answers(Listener(temperature=0.5, tie_width=0.0), 1.0, 0.4)
    assert said["a"] / 4000 == pytest.approx(1 / (1 + np.exp(-0.6 / 0.5)), abs=0.025)
    assert said["tie"] == said["both_bad"] == 0


def test_close_clips_are_ties_more_often():
    listener = Listener(temperature=0.3, tie_width=0.3)
    assert answers(listener, 0.0, 0.0)["tie"] > 3 * answers(listener, 1.5, 0.0)["tie"] > 0


def test_two_bad_clips_are_both_bad_and_one_is_not():
    listener = Listener(temperature=0.3, bad_below=-2)
    assert answers(listener, -3.0, -2.5, n=50) == {"both_bad": 50}
    assert "both_bad" not in answers(listener, -3.0, 0.0, n=50)


def test_side_bias_leans_to_the_left():
    said = answers(Listener(temperature=0.5, side_bias=0.4, tie_width=0.0), 0.0, 0.0)
    assert said["a"] > 1.5 * said["b"]


def test_a_careless_listener_does_not_listen():
    listener = Listener(temperature=1.0, careless=True)
    loves, hates = answers(listener, 5.0, -5.0), answers(listener, -5.0, 5.0)
    assert set(loves) == set(CHOICES)
    assert loves == hates


def test_a_crew_of_twelve_has_two_temperatures_and_one_careless_member():
    twelve = crew(12)
    assert [member.careless for member in twelve] == [False] * 11 + [True]
    assert len({member.temperature for member in twelve[:11]}) == 2
    assert min(member.side_bias for member in twelve) < 0 < max(member.side_bias for member in twelve)
    assert crew(12) == twelve
    assert not crew(1)[0].careless


def test_streams_belong_to_their_words():
    assert stream(0, "a", "b").random() == stream(0, "a", "b").random()
    assert stream(0, "a", "b").random() != stream(0, "b", "a").random()


def test_the_careless_one_is_found_by_reliability():
    rng = np.random.default_rng(5)
    listeners, votes = crew(12), []
    for pair in range(300):
        gold = rng.normal(size=2)
        for rater in rng.choice(12, 3, replace=False):
            said = choose(listeners[rater], gold[0], gold[1], rng)
            choice = {"a": "x", "b": "y"}.get(said, said)
            votes.append(Vote(f"{pair}-{rater}", str(pair), "p", "", "train", f"r{rater}", choice, f"{pair}x", f"{pair}y"))
    found = reliability(votes)
    weights = sorted(found, key=lambda rater: found[rater].weight)
    assert weights[0] == "r11"
    assert found["r11"].weight < 0.5
