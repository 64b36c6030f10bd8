"""Judges that share what they hear say what each says by itself, of the clips and prompts of this call and no other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from base_models.policy import PRETRAINED, load_policy
from rlhf.consistency import SOFTENED, Spectrum, diversity_heard, slopes, tempo_distribution
from rlhf.descriptors import describe
from rlhf.ears import ears_of
from rlhf.judges import CLIPS_AT_ONCE, Judge, SlopeOf, scores, weighted_slope
from rlhf.reward_committee import Committee
from rlhf.reward_features import DESCRIPTORS, FIT, features, magnitude_statistics, over_time
from rlhf.reward_heads import Head, expand, make_lens
from rlhf.reward_model import RewardModel
from rlhf.rewards import HUMAN, Mixed, weighted
from tests.rlhf.reward_toys import small_base

WORTH = {HUMAN: 1.3, "similarity": 4.0, "diversity": 0.4, "tempo": 0.7, "genre": 2.0}
PROMPTS = ["happy jazz, 120 BPM", "happy jazz, 120 BPM", "sad techno", "music", "120 BPM", "music", "folk, 100 BPM"]


@dataclass
class World:
    """A base, clips [B, K, T], a reward over it, and the slopes of all that has a weight."""

    base: Any
    codes: Tensor
    reward: RewardModel
    ways: dict[str, Any]

    def latents(self) -> Tensor:
        return self.base.codec.latents(self.codes).detach().requires_grad_(True)


def world_of(base: Any, codes: Tensor, names: tuple[str, ...]) -> World:
    head, generator = Head("relevance", (DESCRIPTORS, FIT), 2.0, 2.0), torch.Generator().manual_seed(0)
    table = features(base, codes, PROMPTS, head.blocks)
    lens = make_lens(head, table, torch.arange(len(codes)) // 3)
    width = expand(lens, head, table).shape[1]
    members = torch.randn(5, width, generator=generator) / width**0.5
    reward = RewardModel(base, Committee((head,)), [lens], members, torch.zeros(5), lam=0.5, temperature=1.3)
    ways = {HUMAN: reward.judge_of_slope} | slopes(base)
    return World(base, codes, reward, {name: ways[name] for name in names})


@pytest.fixture(scope="module", params=["small", "shipped"])
def world(request, tmp_path_factory) -> World:
    n = len(PROMPTS)
    if request.param == "small":  # without ears
        base = SimpleNamespace(**vars(small_base()), path=tmp_path_factory.mktemp("small"))
        codes = torch.randint(0, 16, (n, 2, 60), generator=torch.Generator().manual_seed(1))
        return world_of(base, codes, (HUMAN, "similarity", "diversity", "tempo"))
    codes = np.load(Path(__file__).parent / "data" / "real_clips.npz", allow_pickle=False)["codes"].astype(np.int64)
    return world_of(load_policy(PRETRAINED), torch.from_numpy(codes[:n, :, :60]), tuple(WORTH))


def written_out(world: World, name: str, latents: Tensor) -> tuple[Tensor, list[int]]:
    """A judge's scores in its own words, from latents to the end, and the clips that it is asked about."""
    base, everyone = world.base, list(range(len(PROMPTS)))
    heard = base.contrastive.embed_latents(latents)
    said = base.contrastive.embed_text(PROMPTS).detach()
    rows = latents.split(1)
    magnitude = torch.cat([base.codec.expand(base.codec.from_latents(row.transpose(1, 2))) for row in rows])
    described = describe(magnitude, base.codec.sample_rate, base.codec.config.stft_hop)
    if name == HUMAN:
        return world.reward.score_features({DESCRIPTORS: described, FIT: (heard * said).sum(1, keepdim=True)}), everyone
    if name == "similarity":
        return (heard * said).sum(1), everyone
    if name == "diversity":
        pair = (heard[0] - heard[1]).norm(), (heard[3] - heard[5]).norm()
        return torch.stack([pair[0], pair[0], pair[1], pair[1]]), [0, 1, 3, 5]
    if name == "tempo":
        asked = [(0, 120.0), (1, 120.0), (4, 120.0), (6, 100.0)]
        bpm, share = tempo_distribution(Spectrum(magnitude.square(), base.codec.sample_rate, base.codec.config.stft_hop))
        near = [sum((bpm / wanted / factor - 1).abs() <= 0.08 for factor in (0.5, 1, 2)) for _, wanted in asked]
        return torch.stack([share[row, mask > 0].sum() for (row, _), mask in zip(asked, near)]), [row for row, _ in asked]
    ears = ears_of(base)
    assert ears is not None
    told = ears.log_probabilities_of(torch.cat([over_time(latents), magnitude_statistics(magnitude), described], 1))["genre"]
    told = (told / SOFTENED["genre"]).log_softmax(1)
    asked_of = [(0, "jazz"), (1, "jazz"), (2, "techno"), (6, "folk")]
    return torch.stack([told[row, ears.classes["genre"].index(genre)] for row, genre in asked_of]), [row for row, _ in asked_of]


def test_what_judges_say_together_is_what_each_would_say_in_its_own_words(world: World) -> None:
    slope, told = weighted_slope(world.ways, WORTH, world.codes, PROMPTS)
    total = torch.zeros_like(slope)
    for name in world.ways:
        latents = world.latents()
        score, rows = written_out(world, name, latents)
        (mine,) = torch.autograd.grad(score.sum(), latents)
        total += WORTH[name] * mine
        torch.testing.assert_close(told[name][rows], score.detach(), rtol=1e-5, atol=2e-6)
        assert torch.isnan(told[name]).nonzero()[:, 0].tolist() == [row for row in range(len(PROMPTS)) if row not in rows]
        alone, again = world.ways[name](world.codes, PROMPTS)
        assert_alike(alone, mine)
        torch.testing.assert_close(again, told[name], rtol=1e-5, atol=2e-6, equal_nan=True)
    assert_alike(slope, total)


def test_a_part_may_be_worth_something_else_for_every_clip(world: World) -> None:
    ways = {name: way for name, way in world.ways.items() if not way.judge.compares}  # what hears clips together pulls at all of them
    by_clip = {name: WORTH[name] * (1 + torch.arange(len(PROMPTS)) / 4) for name in ways}
    slope, told = weighted_slope(ways, by_clip, world.codes, PROMPTS)
    total = torch.zeros_like(slope)
    for name, way in ways.items():
        mine, score = way(world.codes, PROMPTS)
        total += by_clip[name][:, None, None] * mine
        torch.testing.assert_close(told[name], score, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert_alike(slope, total)


def assert_alike(slope: Tensor, other: Tensor) -> None:
    """Clip by clip, within 1e-5 of its length."""
    apart, length = (slope - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    assert bool((apart <= 1e-5 * length).all()), (apart / length).tolist()


def test_clips_without_a_prompt_of_their_own_are_refused_and_not_passed_over(world: World) -> None:
    for ask in (world.ways["tempo"], world.ways["tempo"].judge):
        with pytest.raises(ValueError, match="7 clips and 6 prompts"):
            ask(world.codes, PROMPTS[:-1])


def test_scores_are_the_same_together_and_apart(world: World) -> None:
    judges = {name: way.judge for name, way in world.ways.items()}
    together = scores(judges, world.codes, PROMPTS)
    for name, judge in judges.items():
        torch.testing.assert_close(together[name], judge(world.codes, PROMPTS), rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(together[HUMAN], world.reward.score(world.codes, PROMPTS), rtol=1e-5, atol=2e-6)


def test_nothing_is_remembered_of_other_clips_or_of_other_prompts(world: World) -> None:
    other, turned = world.codes.flip(0), [*PROMPTS[1:], PROMPTS[0]]
    fresh = [weighted_slope(world.ways, WORTH, codes, prompts) for codes, prompts in ((world.codes, PROMPTS), (other, PROMPTS))]
    weighted_slope(world.ways, WORTH, other, turned)
    scores({name: way.judge for name, way in world.ways.items()}, world.codes, turned)
    changed = world.codes.clone()
    weighted_slope(world.ways, WORTH, changed, PROMPTS)
    changed.copy_(other)  # the same tensor with other clips in it
    for codes, (slope, told) in zip((world.codes, changed), fresh):
        again, same = weighted_slope(world.ways, WORTH, codes, PROMPTS)
        assert torch.equal(again, slope)
        assert all(torch.equal(torch.nan_to_num(same[name]), torch.nan_to_num(told[name])) for name in told)
    assert not torch.equal(fresh[0][0], fresh[1][0])


def test_every_clip_is_played_once_for_all_judges_and_not_at_all_where_none_wants_to_hear_it(world: World, monkeypatch) -> None:
    played, play = [], world.base.codec.expand
    monkeypatch.setattr(world.base.codec, "expand", lambda compressed: played.append(len(compressed)) or play(compressed))
    weighted_slope(world.ways, WORTH, world.codes, PROMPTS)
    assert sum(played) == len(PROMPTS)
    played.clear()
    weighted_slope({"similarity": world.ways["similarity"], "tempo": world.ways["tempo"]}, WORTH, world.codes, PROMPTS)
    assert sum(played) == 4  # those that state a tempo


def test_clips_of_one_prompt_are_compared_with_all_of_them_however_many_there_are(world: World) -> None:
    n = 2 * CLIPS_AT_ONCE + 1
    codes = world.codes[torch.arange(n) % len(world.codes)]
    slope, told = weighted_slope({"diversity": world.ways["diversity"]}, {"diversity": 1.0}, codes, ["a"] * n)
    latents = world.base.codec.latents(codes).detach().requires_grad_(True)
    score = diversity_heard(world.base.contrastive.embed_latents(latents), ["a"] * n)
    torch.testing.assert_close(told["diversity"], score.detach())
    assert_alike(slope, torch.autograd.grad(score.sum(), latents)[0])


def test_a_part_at_a_cliff_pulls_nowhere_and_takes_no_other_part_along(world: World) -> None:
    cliff = Judge(world.base, lambda heard: (heard.latents - heard.latents.detach()).sum((1, 2)).clamp_min(0).sqrt())  # infinite at 0
    ways = {**world.ways, "cliff": SlopeOf(cliff)}
    slope, told = weighted_slope(ways, {**WORTH, "cliff": 1.0}, world.codes, PROMPTS)
    assert torch.equal(told["cliff"], torch.zeros(len(PROMPTS)))
    assert_alike(slope, weighted_slope(world.ways, WORTH, world.codes, PROMPTS)[0])


def test_judges_of_another_base_and_parts_that_do_not_hear_are_asked_as_well(world: World) -> None:
    elsewhere = SimpleNamespace(codec=world.base.codec, contrastive=world.base.contrastive)
    twin = SlopeOf(replace(world.ways["similarity"].judge, base=elsewhere))
    plain = world.ways["similarity"](world.codes, PROMPTS)
    parts = {"similarity": world.ways["similarity"], "twin": twin, "plain": lambda codes, prompts: plain}
    slope, told = weighted_slope(parts, {"similarity": 1.0, "twin": 2.0, "plain": 3.0}, world.codes, PROMPTS)
    assert_alike(slope, 6 * plain[0])
    assert torch.equal(told["twin"], told["similarity"])


def test_a_mixed_reward_says_by_one_slope_what_it_says_by_its_marks(world: World) -> None:
    judges = {name: way.judge for name, way in world.ways.items()}
    human = judges.pop(HUMAN)
    mixed = Mixed(weighted({name: WORTH[name] for name in world.ways}, human, judges), world.ways, world.base.codec.codebooks)
    mixed.reward.measure(mixed.reward.marks(world.codes, PROMPTS), PROMPTS)
    slope, total = mixed.slope(world.codes, PROMPTS)
    torch.testing.assert_close(total, mixed(world.codes, PROMPTS), rtol=1e-4, atol=1e-5)
    scales = mixed.reward.scales
    parts = [WORTH[name] / scales[name][1] * way(world.codes, PROMPTS)[0] for name, way in world.ways.items()]
    assert_alike(slope, sum(parts[1:], start=parts[0]))
