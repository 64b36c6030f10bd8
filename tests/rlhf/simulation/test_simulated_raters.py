from collections import Counter

import numpy as np
import pytest

from rlhf.preferences import Vote
from rlhf.raters import reliability
from rlhf.simulation.raters import CHOICES, Listener, aspects, choose, crew, crowd, marks_it, stream, temperature_after

DEMO_ANSWERS = "aabbbaattabbbabbabbataabbabaaabtbabbaaba"


def answers(listener, gold_a, gold_b, n=4000, seed=0, **heard):
    rng = np.random.default_rng(seed)
    return Counter(choose(listener, gold_a, gold_b, rng, **heard) for _ in range(n))


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


def test_the_demo_crew_answers_as_it_always_did():
    rng = np.random.default_rng(3)
    golds = rng.normal(size=(40, 2))
    said = "".join(choose(crew(12)[i % 12], *golds[i], stream(0, i))[0] for i in range(40))
    assert said == DEMO_ANSWERS


def test_an_adversary_says_the_opposite():
    honest, liar = Listener(temperature=0.3), Listener(temperature=0.3, adversary=True)
    assert answers(honest, 1.0, 0.0)["a"] == answers(liar, 1.0, 0.0)["b"] > 3500
    assert answers(honest, 1.0, 0.0)["tie"] == answers(liar, 1.0, 0.0)["tie"]


def test_the_louder_clip_gains_by_the_decibel():
    listener = Listener(temperature=0.5, loudness_bias=0.1, tie_width=0.0)
    said = answers(listener, 0.0, 0.5, louder_db=5.0)
    assert said["a"] / 4000 == pytest.approx(0.5, abs=0.03)


def test_a_sitting_tires_and_the_next_begins_rested():
    listener = Listener(temperature=0.5, fatigue=1.0, sitting=100)
    assert temperature_after(listener, 0) == temperature_after(listener, 100) == 0.5
    assert temperature_after(listener, 99) == pytest.approx(0.995)
    fresh, tired = answers(listener, 1.0, 0.0), answers(listener, 1.0, 0.0, given=99)
    assert fresh["a"] > tired["a"] + 300


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3])
def test_a_crowd_has_the_careless_and_the_adversary_that_were_asked_for(share):
    many = crowd(20, share)
    assert sum(member.careless for member in many) == round(20 * share)
    assert sum(member.adversary for member in many) == 1
    assert not any(member.careless and member.adversary for member in many)
    assert len({member.temperature for member in many}) == 2
    assert min(member.side_bias for member in many) < 0 < max(member.side_bias for member in many)
    assert all(member.loudness_bias > 0 and member.talkative > 0 for member in many)
    assert crowd(20, share) == many


def test_clusters_share_the_tastes_out_evenly_and_weights_add_up():
    many = crowd(12, clusters=["drive", "space", "warm"])
    assert Counter(max(member.tastes, key=member.tastes.get) for member in many) == {"drive": 4, "space": 4, "warm": 4}
    assert all(sum(member.tastes.values()) == pytest.approx(1) for member in many)
    assert not any(member.tastes for member in crowd(12))


def test_aspects_follow_what_is_liked_the_more_the_nearer_they_are_to_it():
    listener, rng = Listener(temperature=0.5, talkative=1.0), np.random.default_rng(0)
    told = [aspects(listener, 2.0, 0.0, ["musicality", "prompt_fit"], rng) for _ in range(400)]
    musicality, fit = (np.mean([each[name] for each in told]) for name in ("musicality", "prompt_fit"))
    assert musicality < fit - 0.5 < 0
    assert not any(aspects(Listener(temperature=0.5), 2.0, 0.0, ["musicality"], rng) for _ in range(50))


def test_only_bad_clips_are_marked_and_only_by_those_who_listen():
    listener, rng = Listener(temperature=0.5, talkative=0.5), np.random.default_rng(0)
    shares = [np.mean([marks_it(listener, gold, rng) for _ in range(1000)]) for gold in (0.0, -1.5, -3.0)]
    assert shares[0] == 0 < shares[1] < shares[2]
    assert not any(marks_it(Listener(temperature=1.0, talkative=0.5, careless=True), -5.0, rng) for _ in range(100))


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
