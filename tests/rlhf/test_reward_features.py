from types import SimpleNamespace

import pytest
import torch

from rlhf import reward_features as rf
from tests.rlhf.reward_toys import codes_of, small_base


@pytest.fixture(scope="module")
def base():
    return small_base()


def test_features_of_a_clip_do_not_depend_on_its_batch(base):
    codes, prompts = codes_of(5), ["a", "bb", "ccc", "dddd", "e"]
    together, alone = rf.features(base, codes, prompts), rf.features(base, codes[2:3], prompts[2:3])
    assert tuple(together) == rf.blocks_of(base) == (rf.LATENTS, rf.MAGNITUDES, rf.DESCRIPTORS, rf.DETAILS, rf.SHARED, rf.FIT)
    for block, rows in together.items():
        torch.testing.assert_close(alone[block][0], rows[2], atol=1e-5, rtol=1e-4)
        assert torch.isfinite(rows).all()


def test_only_the_blocks_asked_for_are_computed(base):
    codes = codes_of(2)
    some = rf.features(base, codes, ["a", "b"], (rf.LATENTS,))
    assert list(some) == [rf.LATENTS]
    torch.testing.assert_close(some[rf.LATENTS], rf.features(base, codes, ["a", "b"])[rf.LATENTS])
    deaf = SimpleNamespace(codec=base.codec, contrastive=None, sha256="c")
    assert rf.blocks_of(deaf) == (rf.LATENTS, rf.MAGNITUDES, rf.DESCRIPTORS, rf.DETAILS)


def test_features_include_the_match_of_prompt_and_sound(base):
    codes = codes_of(1)
    one, other = (rf.features(base, codes, [prompt])[rf.SHARED] for prompt in ("x", "a much longer prompt"))
    assert (one != other).sum() == 1


def test_a_single_frame_has_finite_features(base):
    assert all(torch.isfinite(rows).all() for rows in rf.features(base, codes_of(2, frames=1), ["a", "b"]).values())
