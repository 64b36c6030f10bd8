import numpy as np
import pytest

from rlhf.simulation import space
from tests.rlhf.simulation.piece import RATE, music, pad


@pytest.mark.parametrize(
    "worse",
    [{"tones": (0, 1, 2)}, {"moves": False}, {"rest": -0.2}],
    ids=["rough", "standing still", "no rest"],
)
def test_each_trait_can_be_heard(worse):
    told = [space.score(pad(seed), RATE) for seed in range(3)]
    less = [space.score(pad(seed, **worse), RATE) for seed in range(3)]
    assert np.mean(told) > np.mean(less) + 0.1


def test_struck_tones_are_heard_as_such():
    assert space.traits(music(notes_per_s=4, decay=8.0), RATE).strike_db > space.traits(pad(), RATE).strike_db + 3


def test_long_tones_are_liked_more_than_plucked_ones():
    assert space.score(pad(), RATE) > space.score(music(notes_per_s=4, decay=8.0), RATE) + 1


def test_an_end_that_comes_to_rest_is_heard_and_the_same_moments_in_another_order_are_not_the_same():
    wav = pad(rest=0.15)
    turned = np.roll(wav, len(wav) // 2)
    assert space.traits(wav, RATE).settle_db < -1 < space.traits(turned, RATE).settle_db
    assert abs(space.score(wav, RATE) - space.score(turned, RATE)) > 0.5


def test_a_fifth_is_smoother_than_a_second_and_one_tone_is_not_rough():
    frequency = np.fft.rfftfreq(4096, 1 / RATE)
    t = np.arange(4096) / RATE

    def heard(*pitches):
        wav = sum(np.sin(2 * np.pi * pitch * h * t) / h for pitch in pitches for h in range(1, 6))
        return space.roughness(frequency, np.abs(np.fft.rfft(wav * np.hanning(4096))))

    assert heard(440) < heard(440, 660) < heard(440, 466)
