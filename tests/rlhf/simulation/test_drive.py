import numpy as np
import pytest

from rlhf.simulation import drive
from tests.rlhf.simulation.piece import RATE, music

MOVING = {"notes_per_s": 4, "bright": 0.8, "decay": 8.0, "swell": 0.0, "duration_s": 4.0}


@pytest.mark.parametrize(
    "worse",
    [{"notes_per_s": 1}, {"bright": 0.0}, {"jitter_s": 0.1}, {"decay": 1.0}, {"grow": -0.3}],
    ids=["few events", "a dull top", "off the grid", "no punch", "fading"],
)
def test_each_trait_can_be_heard(worse):
    told = [drive.score(music(seed, **MOVING, grow=0.1), RATE) for seed in range(3)]
    less = [drive.score(music(seed, **{**MOVING, "grow": 0.1, **worse}), RATE) for seed in range(3)]
    assert np.mean(told) > np.mean(less) + 0.3


def test_the_same_moments_in_another_order_are_told_apart():
    wav = music(**MOVING, grow=0.25)
    half = len(wav) // 2
    turned = np.concatenate([wav[half:], wav[:half]])
    assert drive.traits(wav, RATE).lift_db > 1 > -1 > drive.traits(turned, RATE).lift_db
    assert drive.score(wav, RATE) > drive.score(turned, RATE) + 0.3


def test_attacks_on_a_grid_are_steady_and_scattered_ones_are_not():
    rng = np.random.default_rng(0)
    grid = np.arange(16) * 0.25
    ones = np.ones(16)
    assert drive.grid_strength(grid, ones) == pytest.approx(1, abs=0.02)
    assert drive.grid_strength(grid + 3.3, ones) == pytest.approx(1, abs=0.02)
    scattered = [drive.grid_strength(np.sort(rng.uniform(0, 4, 16)), ones) for _ in range(50)]
    assert np.mean(scattered) < 0.6
    assert drive.grid_strength(grid[:4], ones[:4]) == 0
