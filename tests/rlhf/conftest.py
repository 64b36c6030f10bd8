"""A policy small enough for any test, and what the loop makes of it: clips, votes, a reward model."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from base_models.checkpoint import read_jsonl, tensors_sha256, write_json
from base_models.codec import load_codec
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import PRETRAINED, load_policy
from db.export import export_snapshot
from db.store import open_store
from feedback_app.campaigns import register_campaign
from rlhf import reward_committee, reward_features, reward_heads, reward_model
from rlhf.evaluate_models import read_codes
from rlhf.sample_pairs import Prompt, Settings, sample
from rlhf.train_ppo import main as train_ppo
from tests.rlhf.ppo_toys import config

PROMPTS = ["sad piano", "fast techno, 130 BPM", "calm folk", "dark rock", "happy jazz in C major", "slow ambient"]


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory) -> Path:
    """The shipped codec and embedding with a tiny untrained language model."""
    folder = tmp_path_factory.mktemp("policy")
    for part in ("codec", "contrastive"):
        shutil.copytree(PRETRAINED / part, folder / part)
    torch.manual_seed(0)
    codec_sha256 = tensors_sha256(load_codec(folder / "codec").state_dict())
    MusicLM(MusicLMConfig(d_model=32, n_layers=1, n_heads=2, d_ff=64, codec_sha256=codec_sha256)).save(folder / "lm")
    write_json(folder / "policy.json", {"text_encoder": "minilm"})
    return folder


@pytest.fixture(scope="session")
def other_policy_dir(policy_dir, tmp_path_factory) -> Path:
    """The same with another language model: a base that adapters and rewards of the first do not fit."""
    folder = tmp_path_factory.mktemp("other") / "policy"
    shutil.copytree(policy_dir, folder)
    torch.manual_seed(1)
    MusicLM(load_policy(policy_dir).lm.config).save(folder / "lm")
    return folder


@pytest.fixture(scope="session")
def clips(policy_dir, tmp_path_factory) -> Path:
    """The manifest of two clips of a second for each of PROMPTS."""
    prompts = [Prompt(text, f"p{i}") for i, text in enumerate(PROMPTS)]
    return sample(load_policy(policy_dir), prompts, tmp_path_factory.mktemp("clips"), Settings(n=2, duration_s=1.0), "base")


@pytest.fixture(scope="session")
def snapshot_dir(clips, tmp_path_factory) -> Path:
    """Two listeners' votes on `clips`, who agree but for one pair: it is a tie."""
    folder = tmp_path_factory.mktemp("votes")
    with open_store(f"sqlite:///{folder / 'e.db'}") as store:
        register_campaign(store, "votes", clips, target_votes=2, min_listen_ms=0)
        for name in ("ada", "bo"):
            rater = store.sign_in(name, store.add_rater(name))
            assert rater is not None
            for number in range(len(PROMPTS)):
                offer = store.next_assignment(rater.id)
                assert offer is not None
                key = f"{name}-{number}"
                shown = store.audio_file(offer.assignment_id, "a", rater.id)
                first = shown.uri.endswith("_0.wav")
                choice = "tie" if offer.prompt == PROMPTS[0] else "a" if first else "b"
                store.submit_vote(rater.id, offer.assignment_id, choice, idempotency_key=f"{key}-{'k' * 8}")
        export_snapshot(store, "votes", folder / "snapshots", "votes")
    return folder / "snapshots" / "votes"


@pytest.fixture(scope="session")
def reward_dir(policy_dir, clips, tmp_path_factory) -> Path:
    """A reward model of the tiny policy, fitted on a taste for the first latent."""
    policy, rows = load_policy(policy_dir), read_jsonl(clips)
    codes = read_codes(clips, rows)
    table = reward_features.features(policy, codes, [row["prompt"] for row in rows], (reward_features.LATENTS,))
    gold, first = table[reward_features.LATENTS][:, 0], torch.arange(0, len(codes), 2)
    chosen = torch.where(gold[first] > gold[first + 1], first, first + 1)
    ones = torch.ones(len(first))
    pairs = reward_heads.Pairs(chosen, 2 * first + 1 - chosen, ones, ones, first // 2)
    head = reward_heads.Head("linear", (reward_features.LATENTS,), 1.0)
    lens = reward_heads.make_lens(head, table, torch.arange(len(codes)) // 2)
    members, offsets = reward_heads.fit_ensemble(head, reward_heads.expand(lens, head, table), pairs, 2, 0)
    folder = tmp_path_factory.mktemp("reward")
    reward_model.RewardModel(policy, reward_committee.Committee((head,)), [lens], members, offsets, 0.0, 1.0).save(folder)
    write_json(folder / "figures.json", {"ci": [0.6, 0.9]})  # what train_reward.py leaves beside it
    return folder


@pytest.fixture(scope="session")
def learned_toy(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """PPO's smoke preset, uninterrupted; with its seconds of computing, which a busy machine does not change."""
    out, began = tmp_path_factory.mktemp("learned"), time.process_time()
    figures = train_ppo(config(out, steps=30, batch_size=64))
    return out, {**figures, "cpu_seconds": time.process_time() - began}
