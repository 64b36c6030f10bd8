import math
from types import SimpleNamespace

import pytest
import torch

from rlhf.reward_heads import Pairs
from rlhf.token_fit import Recipe, by_prompt, fit_member, standardise, windows
from rlhf.token_reward import TokenTrunk, TrunkShape
from tests.rlhf.reward_toys import codes_of, speaking

RECIPE = Recipe(epochs=8, batch=8)


def world(n_pairs=48, n_prompts=12):
    """Clips of random codes, and votes for the one with more codes below 8 in the first book."""
    codes = codes_of(2 * n_pairs, frames=12)
    gold, first = (codes[:, 0] < 8).float().mean(1), 2 * torch.arange(n_pairs)
    chosen = torch.where(gold[first] > gold[first + 1], first, first + 1)
    p = torch.where(gold[first] == gold[first + 1], 0.5, 1.0)
    prompt = torch.arange(n_pairs) % n_prompts
    pairs = Pairs(chosen, 2 * first + 1 - chosen, p, torch.ones(n_pairs), prompt)
    return list(codes.split(1)), [f"p{row // 2 % n_prompts}" for row in range(2 * n_pairs)], pairs


def fitted(seed=0, n_members=1, recipe=RECIPE):
    clips, prompts, pairs = world()
    trunk = TokenTrunk(speaking(SimpleNamespace(), n_q=2, card=16), TrunkShape(layers=2, r=4), n_members, seed=0)
    standardise(trunk, clips, prompts)
    inner = pairs.prompt >= 9
    losses = fit_member(trunk, n_members - 1, clips, prompts, pairs.index(~inner), pairs.index(inner), recipe, seed)
    return trunk, losses, pairs.index(inner), clips, prompts


@pytest.fixture(scope="module")
def learnt():
    return fitted()


def test_votes_teach_adapter_and_head(learnt):
    trunk, losses, _, _, _ = learnt
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert min(losses) < losses[0] - 0.05
    assert all(float(tensor.abs().sum()) > 0 for name, tensor in trunk.tensors().items() if name != "offsets")


def test_the_pass_that_foretold_the_inner_prompts_best_is_kept(learnt):
    trunk, losses, inner, clips, prompts = learnt
    score = trunk.member_scores(torch.cat(clips), prompts)[0]
    margin = score[inner.chosen] - score[inner.rejected]
    kept = -(inner.p * margin.sigmoid().log() + (1 - inner.p) * (-margin).sigmoid().log()).mean()
    assert float(kept) == pytest.approx(min(losses), abs=1e-4)


def test_the_same_seed_makes_the_same_trunk_and_another_seed_another(learnt):
    again, other = fitted()[0], fitted(seed=1)[0]
    assert all(torch.equal(tensor, learnt[0].tensors()[name]) for name, tensor in again.tensors().items())
    assert not torch.equal(other.weights, again.weights)


def test_a_member_learns_without_touching_the_others():
    trunk = fitted(n_members=2, recipe=Recipe(epochs=1))[0]
    assert float(trunk.weights[0].abs().sum()) == 0 < float(trunk.weights[1].abs().sum())
    moved = {name: float(tensor.abs().sum()) for name, tensor in trunk.tensors().items() if "lora_B" in name}
    assert all((total > 0) == name.startswith("taste1") for name, total in moved.items())


def test_pairs_of_a_prompt_stand_together_in_an_order_of_chance():
    prompt = torch.arange(30) % 5
    one, other = (by_prompt(prompt, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert sorted(one.tolist()) == list(range(30))
    assert int((prompt[one][1:] != prompt[one][:-1]).sum()) == 4
    assert one.tolist() != other.tolist()


def test_windows_are_cut_from_their_clips():
    clips = list(codes_of(4, frames=20).split(1))
    cut = windows(clips, 7, torch.Generator().manual_seed(0))
    assert cut.shape == (4, 2, 7)
    assert all(any(torch.equal(clip[0, :, a : a + 7], part) for a in range(14)) for clip, part in zip(clips, cut))
    assert torch.equal(windows(clips, 50, torch.Generator()), torch.cat(clips))
