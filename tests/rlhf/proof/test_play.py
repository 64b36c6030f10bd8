"""A best of several of an adapter is played with the adapter, and its KL counts both ways of straying."""

from __future__ import annotations

import json

import pytest
import torch

from adapters.library import save_adapter
from adapters.lora import attach_lora
from base_models.checkpoint import read_jsonl
from base_models.policy import load_policy
from rlhf.best_of_n import kl_bound
from rlhf.proof.play import main
from rlhf.sample_pairs import Prompt, write_prompts


def test_the_kl_of_a_best_of_several_of_an_adapter_is_the_adapters_on_its_clips_and_the_bound(policy_dir, reward_dir, tmp_path):
    policy = load_policy(policy_dir)
    torch.manual_seed(3)
    attach_lora(policy.lm, r=2, alpha=4, init_b=True)
    adapter = save_adapter(tmp_path / "moved", policy.lm, {"base_sha256": policy.sha256, "method": "ppo", "licence": "CC0-1.0"})
    write_prompts(tmp_path / "p.jsonl", [vars(Prompt("sad piano", "p0")), vars(Prompt("calm folk", "p1"))])
    where = ["--policy", str(policy_dir), "--prompts", str(tmp_path / "p.jsonl"), "--duration", "0.6", "--system", "ppo_best"]
    figures = {}
    for name, more in (
        ("plain", ["--adapter", str(tmp_path / "moved")]),
        ("strong", ["--adapter", str(tmp_path / "moved"), "--weight", "3"]),
        ("best", ["--adapter", str(tmp_path / "moved"), "--best-of", "3", "--reward", str(reward_dir)]),
        ("base", ["--best-of", "3", "--reward", str(reward_dir)]),
    ):
        assert main([*where, *more, "--out", str(tmp_path / name)]) == 0
        figures[name] = json.loads((tmp_path / name / "figures.json").read_text())
    clips = json.loads((tmp_path / "best" / "clips.json").read_text())
    assert figures["best"]["kl"] == pytest.approx(kl_bound(3) + sum(clips["kl"]) / len(clips["kl"]), abs=1e-4)
    assert figures["base"]["kl"] == kl_bound(3)
    assert (figures["plain"]["weight"], figures["strong"]["weight"]) == (1.0, 3.0)
    assert figures["strong"]["kl"] > figures["plain"]["kl"]
    assert abs(figures["plain"]["kl"]) > 1e-4  # an estimate from four clips may lie below 0
    rows = read_jsonl(tmp_path / "best" / "samples" / "manifest.jsonl")
    assert {tuple(row["adapters"]) for row in rows} == {(adapter.adapter_sha256,)}
    assert {row["gen"]["best_of"] for row in rows} == {3}
