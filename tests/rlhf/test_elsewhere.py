"""A policy on a GPU hands over clips that lie there; codec, shared space and ears lie where the policy's folder was loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from base_models.policy import PRETRAINED, Policy, load_policy
from rlhf.consistency import checks, slopes
from rlhf.ears import ears_of
from rlhf.journal import sound_of
from rlhf.judges import scores, weighted_slope
from rlhf.ppo_task import embedding
from tests.rlhf.elsewhere import Away

PROMPTS = ["sad jazz piano, 120 BPM"] * 2 + ["calm folk"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PRETRAINED)


@pytest.fixture
def codes(policy: Policy) -> torch.Tensor:
    return torch.randint(0, policy.codec.card, (3, policy.codec.n_q, 50), generator=torch.Generator().manual_seed(0))


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    away = Away(torch.arange(4.0))
    assert away.device.type == "meta"
    with pytest.raises(RuntimeError, match="two devices"):
        away + torch.ones(4)
    torch.testing.assert_close((away[[1, 3]] * 2).to("cpu"), torch.tensor([2.0, 6.0]))


def test_clips_from_another_device_are_heard_and_what_is_said_goes_back_to_it(policy: Policy, codes: torch.Tensor) -> None:
    found = checks(policy, ears_of(policy))
    assert {"similarity", "genre", "diversity"} <= found.keys()
    told = scores(found, Away(codes), PROMPTS)
    assert {name: said.device.type for name, said in told.items()} == dict.fromkeys(found, "meta")
    ways = slopes(policy, found)
    slope, told = weighted_slope(ways, dict.fromkeys(ways, 1.0), Away(codes), PROMPTS)
    assert slope.device.type == "meta"
    assert slope.shape == policy.codec.latents(codes).shape
    assert {said.device.type for said in told.values()} == {"meta"}
    embed = embedding(policy, None)
    assert embed is not None
    assert embed(Away(codes), PROMPTS).device.type == "meta"


def test_clips_from_another_device_are_played(policy: Policy, codes: torch.Tensor) -> None:
    here, rate = sound_of(policy)(codes[0])
    there, _ = sound_of(policy)(Away(codes[0]))
    np.testing.assert_array_equal(here, there)
    assert rate == policy.codec.sample_rate
