import numpy as np
import pytest

from rlhf.simulation import warm
from tests.rlhf.simulation.piece import RATE, music


def test_scores_are_those_that_the_demo_figures_rest_on():
    assert [warm.score(music(seed), RATE) for seed in range(3)] == pytest.approx([5.388663407192834, 5.2728183367652095, 5.442270006140219])
    assert warm.score(music(1, bright=1.0), RATE) == pytest.approx(3.4808868105296176)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"bright": 1.6}),
        ({}, {"noise": 0.05}),
        ({"notes_per_s": 1.5}, {"notes_per_s": 6.0}),
        ({}, {"bass": 0.0, "bright": 0.5}),
    ],
    ids=["warm over bright", "tonal over noisy", "unhurried over hectic", "with bass over thin"],
)
def test_each_trait_can_be_heard(better, worse):
    gains = [warm.score(music(seed, **better), RATE) - warm.score(music(seed, **worse), RATE) for seed in range(4)]
    assert np.mean(gains) > 0.2


def test_a_kept_beat_is_heard_as_such():
    steady = [warm.traits(music(seed, notes_per_s=3), RATE).beat for seed in range(4)]
    loose = [warm.traits(music(seed, notes_per_s=3, jitter_s=0.15), RATE).beat for seed in range(4)]
    assert np.mean(steady) > np.mean(loose) + 0.1
