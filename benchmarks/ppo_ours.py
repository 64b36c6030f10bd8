"""Our sides of benchmarks/ppo_step.py: a whole step by either kind of credit, and the policy alone."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from base_models.policy import Policy
from base_models.sampling import generate
from benchmarks.ppo_turn import Turn, held, without_tempo
from rlhf.losses import masked_whiten, ppo_policy_loss
from rlhf.ppo_run import Run
from rlhf.reward_committee import committees
from rlhf.reward_features import LATENTS, blocks_of, features
from rlhf.reward_heads import make_lens
from rlhf.reward_model import RewardModel
from rlhf.rewards import HUMAN
from rlhf.rollout import prompt_of, sample_seed, score_steps
from rlhf.train_ppo import Config, Task


def share_of_odd_codes(codes: Tensor, prompts: list[str]) -> Tensor:
    """The toy reward: codes [B, K, T] -> [B]."""
    return (codes % 2).float().mean((1, 2))


def sloped(policy: Policy, prompts: list[str]) -> RewardModel:
    """Five committees of the heads that hear descriptors and details, the dearest that the proof's votes chose, with random weights:
    untrained, and as dear as a trained one to ask for its slope."""
    generator = torch.Generator().manual_seed(0)
    committee = max((found for found in committees(blocks_of(policy)) if LATENTS not in found.blocks), key=lambda found: len(found.heads))
    codes = torch.randint(0, policy.lm.card, (16, policy.lm.n_q, 50), generator=generator)
    table = features(policy, codes, [prompts[row % len(prompts)] for row in range(16)], committee.blocks)
    lenses = [make_lens(head, table, torch.arange(16) // 2) for head in committee.heads]
    width = committee.expand(lenses, table).shape[1]
    return RewardModel(policy, committee, lenses, torch.randn(5, width, generator=generator), torch.zeros(5), lam=0.5, temperature=1.0)


def our_run(args: argparse.Namespace, policy: Policy, prompts: list[str], credit: Literal["score", "codes"] = "score") -> Run:
    cfg = Config(
        n_frames=args.frames,
        batch_size=args.batch,
        epochs=args.epochs,
        minibatches=args.minibatches,
        precision=args.precision,
        steps=1000,
        credit=credit,
    )
    task = Task(policy.lm, prompts, without_tempo(policy, prompts), share_of_odd_codes, policy.sha256)
    if credit == "codes":
        reward = sloped(policy, prompts)
        task = dataclasses.replace(task, score=reward.score, slopes={HUMAN: reward.slope}, codebooks=policy.codec.codebooks)
    return Run(cfg, task, Accelerator(cpu=True))


def encore(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn, credit: Literal["score", "codes"] = "score") -> None:
    run = our_run(args, policy, prompts, credit)
    turn()
    while True:
        began = time.perf_counter()
        rollout = run.play()
        played = time.perf_counter()
        rollout, _ = run.judge(rollout)
        run.learn(rollout)
        del rollout  # as train_ppo.py does
        run.step += 1
        turn(play=played - began, **held(run.lm, run.critic, optimizer=run.optimizer))


def policy_only(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    """Sampling and clipped updates of the policy alone: no reference, no critic, so the whitened score is the advantage."""
    run = our_run(args, policy, prompts)
    run.groups = run.groups[:1]
    optimizer = torch.optim.Adam(run.groups[0], lr=run.cfg.lr, eps=1e-5)
    turn()
    while True:
        began = time.perf_counter()
        indices = range(run.clips, run.clips + args.batch)
        rows = prompt_of(indices, len(prompts), 1, 0)
        made = generate(run.lm, run.table.index(rows), args.frames, seeds=[sample_seed(0, i) for i in indices])
        played = time.perf_counter()
        run.clips += args.batch
        mask = torch.ones_like(made.logps, dtype=torch.bool)
        score = share_of_odd_codes(made.codes, prompts)[:, None].expand_as(made.logps)
        advantages = masked_whiten(score.contiguous(), mask)
        for rows_of_update in run._minibatches(args.batch):
            optimizer.zero_grad()
            for part in rows_of_update.split(run.cfg.microbatch):
                cond = run.table.index(torch.tensor(rows)[part])
                scored = score_steps(run.lm, made.codes[part], cond, bf16=run.bf16)
                count = float(rows_of_update.numel() * mask.shape[1])
                loss, _ = ppo_policy_loss(scored.logps, made.logps[part], advantages[part], mask[part], 0.2, count)
                loss.backward()
            optimizer.step()
        run.step += 1
        turn(play=played - began, **held(run.lm, optimizer=optimizer))
