"""The brake: each sign alone, no false alarm from noise, and a memory that survives a checkpoint."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rlhf.brake import Brake, Look, paired_gain

PROMPTS = [0, 0, 1, 1, 2, 2, 3, 3]
EASE = torch.tensor([0.0, 0.2, 3.0, 3.1, -2.0, -2.2, 1.0, 1.3])


def look(gain: float = 0.0, noise: float = 0.1, spread: float = 1.0, diversity: float = 1.0, seed: int = 0) -> Look:
    jitter = noise * torch.randn(8, generator=torch.Generator().manual_seed(seed))
    return Look(EASE + gain + jitter, PROMPTS, 1.0, spread, diversity)


def brake(patience: int = 1) -> Brake:
    return Brake(max_disagreement=2.0, min_diversity=0.8, patience=patience)


def test_the_base_and_a_policy_that_gains_raise_no_sign() -> None:
    guard = brake()
    assert guard(0, look()) is None
    assert guard(10, look(0.5, spread=1.9, diversity=0.85, seed=1)) is None
    assert guard.best_step == 10


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        (look(1.0, spread=2.5), "disagree 2.50 times"),
        (look(1.0, diversity=0.5), "0.50 of the base's diversity"),
        (look(-1.0), "below that of step 0"),
        (Look(torch.full((8,), float("nan")), PROMPTS, 1.0, 1.0, 1.0), "finite score"),
    ],
)
def test_each_sign_alone_is_a_reason_and_never_the_best(sign: Look, words: str) -> None:
    guard = brake()
    guard(0, look())
    reason = guard(10, sign)
    assert reason is not None
    assert words in reason
    assert guard.best_step == 0


def test_a_fall_is_measured_against_the_best_look_and_not_against_the_base() -> None:
    guard = brake()
    guard(0, look())
    assert guard(10, look(2.0, seed=1)) is None
    reason = guard(20, look(1.0, seed=2))
    assert reason is not None
    assert "below that of step 10" in reason


def test_noise_that_is_paired_away_or_stays_within_its_error_stops_nothing() -> None:
    guard = brake()
    guard(0, look(noise=1.0))
    assert [guard(step, look(noise=1.0, seed=step)) for step in range(1, 4)] == [None] * 3


def test_one_bad_look_is_forgiven_and_two_in_a_row_are_not() -> None:
    guard = brake(patience=2)
    guard(0, look())
    bad = look(1.0, diversity=0.1)
    assert guard(1, bad) is None
    assert guard(2, look(1.0)) is None
    assert guard(3, bad) is None
    reason = guard(4, bad)
    assert reason is not None
    assert "in 2 looks in a row" in reason
    assert guard.best_step == 2


def test_gain_is_the_mean_of_the_prompts_and_its_error_knows_their_number() -> None:
    now = dataclasses.replace(look(noise=0), scores=EASE + torch.tensor([1.0, 3, 2, 2, 0, 0, 4, 4]))
    gain = paired_gain(now, look(noise=0))
    assert gain.mean == pytest.approx(2.0)  # of 2, 2, 0, 4
    assert gain.error == pytest.approx(math.sqrt(8 / 3) / 2)
    assert math.isnan(paired_gain(Look(EASE[:2], [0, 0]), Look(EASE[:2], [0, 0])).mean)


def test_noise_alone_is_taken_for_a_fall_as_seldom_with_few_prompts_as_with_many() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (4, 40):
        prompts = list(range(n))
        looks = [Look(torch.randn(n, generator=generator), prompts) for _ in range(2000)]
        falls = sum(paired_gain(a, b).is_a_fall for a, b in zip(looks[::2], looks[1::2]))
        assert 10 <= falls <= 40  # of 1000, 23 are expected


def test_a_reward_without_heads_to_compare_and_clips_without_features_are_no_sign() -> None:
    guard = brake()
    guard(0, Look(EASE, PROMPTS))
    assert guard(1, Look(EASE + 1, PROMPTS)) is None
    assert set(guard.figures(Look(EASE + 1, PROMPTS))) == {"heldout_score", "heldout_gain", "heldout_gain_error"}


def test_a_resumed_brake_says_what_the_unbroken_one_says() -> None:
    guard = brake(patience=2)
    for step, seen in enumerate((look(), look(0.5, seed=1), look(0.4, diversity=0.1))):
        guard(step, seen)
    again = brake(patience=2)
    again.load_state_dict(guard.state_dict())
    last = look(0.6, diversity=0.1, seed=3)
    assert again.figures(last) == guard.figures(last)
    said = guard(3, last)
    assert again(3, last) == said
    assert said is not None
    assert again.state_dict()["best_step"] == 1
