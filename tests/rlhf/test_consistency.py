"""Checks of what a prompt states, on real clips: the right prompt against another clip's.

data/real_clips.npz holds the codes [96, 4, 100] (4 s) of held-out clips of the demo corpus by the shipped codec, real_clips.jsonl
their facts: public-domain melodies in arrangements of our own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base_models.corpus.styles import GENRE_NAMES
from base_models.policy import PRETRAINED, load_policy
from rlhf.asked import asked_keys, asked_tempo, instrument_versions
from rlhf.consistency import checks, diversity_heard, slopes
from rlhf.metrics import diversity
from rlhf.reward_features import Heard

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def real():
    """(codes [96, 4, 100], facts) of real clips."""
    codes = np.load(DATA / "real_clips.npz", allow_pickle=False)["codes"].astype(np.int64)
    facts = [json.loads(line) for line in (DATA / "real_clips.jsonl").read_text(encoding="utf-8").splitlines()]
    return torch.from_numpy(codes), facts


@pytest.fixture(scope="module")
def earless(tmp_path_factory):
    """The shipped base as it would be without ears."""
    policy = load_policy(PRETRAINED)
    return SimpleNamespace(codec=policy.codec, contrastive=policy.contrastive, path=tmp_path_factory.mktemp("earless"))


@pytest.fixture(scope="module", params=["ears", "space"])
def judges(request, earless):
    """The checks of a base with ears, and of one that asks its audio-text space."""
    return checks(load_policy(PRETRAINED) if request.param == "ears" else earless)


def auc(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """The probability that a right prompt scores above a wrong one."""
    higher = (right[:, None] > wrong[None]).float().mean() + 0.5 * (right[:, None] == wrong[None]).float().mean()
    return float(higher)


def shuffled(asked: list[str], same) -> list[int]:
    """For each prompt the place of the next one that asks for something else."""
    n = len(asked)
    return [next((i + k) % n for k in range(7, n + 7) if not same(asked[i], asked[(i + k) % n])) for i in range(n)]


def overlap(one: str, other: str) -> bool:
    a, b = asked_tempo(one), asked_tempo(other)
    assert a is not None
    assert b is not None
    return a[0] < b[1] and b[0] < a[1]


def says(facts) -> dict[str, list[str]]:
    """What each clip's facts would have a prompt say, by check."""
    return {
        "similarity": [row["captions"][0] for row in facts],
        "mood": [f"{row['mood']} {row['genre']}" for row in facts],
        "instrument": [f"{row['genre']} with {row['instruments'][0]}" for row in facts],
        "genre": [f"{row['mood']} {GENRE_NAMES[row['genre']][0]}" for row in facts],
        "tempo": [f"{row['genre']}, {row['tempo_bpm']:.0f} BPM" for row in facts],
        "key": [f"{row['genre']} in {row['key']}" for row in facts],
    }


SAME = {
    "similarity": lambda one, other: one == other,
    "mood": lambda one, other: one.split()[0] == other.split()[0],
    "instrument": lambda one, other: (
        instrument_versions(one)[1:] == instrument_versions(other)[1:] and one.split()[-1] == other.split()[-1]
    ),
    "genre": lambda one, other: one.split()[1:] == other.split()[1:],
    "tempo": overlap,
    "key": lambda one, other: asked_keys(one) == asked_keys(other),
}


@pytest.mark.parametrize(
    ("name", "least"), [("similarity", 0.9), ("mood", 0.75), ("instrument", 0.9), ("genre", 0.9), ("tempo", 0.75), ("key", 0.8)]
)
def test_the_right_prompt_scores_above_another_clips(name, least, real, judges):
    """Measured on 320 held-out clips of 6 s; see benchmarks/consistency.py for the figures."""
    codes, facts = real
    asked = says(facts)[name]
    wrong = [asked[i] for i in shuffled(asked, SAME[name])]
    right_scores, wrong_scores = judges[name](codes, asked), judges[name](codes, wrong)
    heard = torch.isfinite(right_scores) & torch.isfinite(wrong_scores)  # ears have no name for a few leads
    assert float(heard.float().mean()) > (0.7 if name == "instrument" else 0.999)
    assert auc(right_scores[heard], wrong_scores[heard]) > least


def test_a_prompt_that_states_nothing_is_judged_by_similarity_alone(real, judges):
    codes, _ = real
    for name, judge in judges.items():
        scores = judge(codes[:2], ["something with a groove", "music"])
        assert bool(torch.isfinite(scores).all()) == (name == "similarity")
        assert scores.shape == (2,)


def test_batch_mates_do_not_matter_and_the_scores_repeat(real, judges):
    codes, _ = real
    prompts = [
        "sad jazz piano, 80 BPM, in C minor",
        "happy rock with electric guitar, fast, in G major",
        "calm folk flute, slow, in D major",
    ]
    for judge in judges.values():
        together = judge(codes[:3], prompts)
        alone = torch.cat([judge(codes[i : i + 1], prompts[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(together, judge(codes[:3], prompts), atol=0, rtol=0, equal_nan=True)


def test_a_base_without_the_shared_space_still_checks_tempo_and_key(real, tmp_path):
    codes, _ = real
    policy = load_policy(PRETRAINED)
    found = checks(SimpleNamespace(codec=policy.codec, contrastive=None, path=tmp_path))
    assert list(found) == ["tempo", "key"]
    assert math.isfinite(float(found["key"](codes[:1], ["in C major"])))


def test_another_codec_is_heard_through_its_waveform(real, tmp_path):
    """The same probabilities from magnitudes and from the decoded wave, near enough to be the same judge."""
    codes, facts = real
    policy = load_policy(PRETRAINED)

    class Foreign:
        sample_rate = policy.codec.sample_rate

        def decode(self, codes):
            return policy.codec.decode(codes)

    prompts = [f"{row['tempo_bpm']:.0f} BPM, in {row['key']}" for row in facts[:8]]
    ours, theirs = (checks(SimpleNamespace(codec=codec, contrastive=None, path=tmp_path)) for codec in (policy.codec, Foreign()))
    for name in ("tempo", "key"):
        assert float((ours[name](codes[:8], prompts) - theirs[name](codes[:8], prompts)).abs().median()) < 0.15


def test_slopes_of_the_audio_text_checks_are_derivatives_along_the_latents(earless) -> None:
    policy = earless
    codes = torch.randint(0, policy.codec.card, (3, 4, 24), generator=torch.Generator().manual_seed(0))
    prompts = ["sad piano, slow", "happy jazz with saxophone", "120 BPM"]
    for name, n_asked in {"similarity": 3, "mood": 2, "instrument": 2, "genre": 1}.items():
        slope, score = slopes(policy)[name](codes, prompts)
        torch.testing.assert_close(score, checks(policy)[name](codes, prompts), equal_nan=True)
        assert int(torch.isfinite(score).sum()) == n_asked
        moved = slope.flatten(1).norm(dim=1) > 0
        assert moved.tolist() == torch.isfinite(score).tolist()  # what is not asked pulls nowhere
        latents = policy.codec.latents(codes)
        step = 0.05 * slope / slope.flatten(1).norm(dim=1).clamp_min(1e-9)[:, None, None]
        rows, judge = moved.nonzero()[:, 0].tolist(), checks(policy)[name]
        sides = [Heard(policy, [prompts[row] for row in rows], latents=(latents + sign * step)[rows]) for sign in (1, -1)]
        at = [judge.opinion(side).detach() for side in sides]
        torch.testing.assert_close(at[0] - at[1], 2 * (slope * step).sum((1, 2))[moved], rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("name", ["tempo", "key"])
@torch.no_grad()
def test_slopes_of_tempo_and_key_are_derivatives_and_a_step_along_them_is_heard(name, real) -> None:
    codes, facts = real
    policy = load_policy(PRETRAINED)
    says = [f"{row['tempo_bpm']:.0f} BPM" if name == "tempo" else f"in {row['key']}" for row in facts]
    prompts = [*says[7:12], "music"]  # of other clips: something is left to be won
    slope, score = slopes(policy)[name](codes[:6], prompts)
    torch.testing.assert_close(score, checks(policy)[name](codes[:6], prompts), equal_nan=True)
    assert torch.isfinite(slope).all()
    length = slope.flatten(1).norm(dim=1)
    assert (length > 0).tolist() == torch.isfinite(score).tolist() == [True] * 5 + [False]
    latents, step = policy.codec.latents(codes[:6]), 0.02 * slope / length.clamp_min(1e-9)[:, None, None]
    judge = checks(policy)[name]
    for row in range(5):
        moved = [latents[row : row + 1] + sign * step[row : row + 1] for sign in (1, -1)]
        up, down = (judge.opinion(Heard(policy, prompts[row : row + 1], latents=latent)) for latent in moved)
        assert float(up - down) == pytest.approx(float(2 * (slope[row] * step[row]).sum()), rel=0.2, abs=1e-5)
        assert up > down


def test_a_foreign_codec_has_no_slope_of_tempo_and_key(tmp_path) -> None:
    assert not slopes(SimpleNamespace(codec=object(), contrastive=None, path=tmp_path))


def test_diversity_is_the_measure_of_the_brake_clip_by_clip_and_a_single_clip_has_none(real):
    policy, (codes, _) = load_policy(PRETRAINED), real
    prompts = ["a", "b", "a", "b", "a", "alone"]
    found = checks(policy)["diversity"](codes[:6], prompts)
    assert math.isnan(float(found[5]))
    points = policy.contrastive.embed_codes(codes[:6]).detach().numpy()
    means = [float(found[[i for i, other in enumerate(prompts) if other == name]].mean()) for name in ("a", "b")]
    assert np.mean(means) == pytest.approx(diversity(points[:5], prompts[:5]), rel=1e-5)
    slope, score = slopes(policy)["diversity"](codes[:6], prompts)
    torch.testing.assert_close(score, found, equal_nan=True)
    assert not slope[5].any()
    assert slope[:5].flatten(1).norm(dim=1).min() > 0


def test_clips_that_follow_the_slope_of_diversity_move_apart_and_clips_that_are_one_have_no_direction(real):
    policy, (codes, _) = load_policy(PRETRAINED), real
    prompts = ["a", "a", "b", "b"]
    slope, before = slopes(policy)["diversity"](codes[:4], prompts)
    latents = policy.codec.latents(codes[:4]).detach()
    step = 0.02 * latents.norm() / slope.norm()
    after = diversity_heard(policy.contrastive.embed_latents(latents + step * slope).float(), prompts).detach()
    assert float(after.mean()) > float(before.mean())
    assert not slopes(policy)["diversity"](codes[:1].expand(2, -1, -1), ["a", "a"])[0].any()
