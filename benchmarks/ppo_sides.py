"""One side of benchmarks/ppo_step.py: a trainer in a process of its own, told over its standard input when to do a step.

    python benchmarks/ppo_sides.py encore --batch 16 --frames 125        # then write "step" to it, and read a line of JSON

    encore        rlhf/train_ppo.py's Run: play, judge, learn, with credit by score
    encore-codes  the same with credit code by code, and so with a reward that has a slope, at its full cost (see `sloped`)
    policy-only   the same without reference and critic: what the policy's memory is compared with
    trl-delay     TRL's PPOTrainer over the same LM under its interface of a causal LM: T + K - 1 decoder steps a pass
    trl-llama     TRL's PPOTrainer over a Llama of as many parameters: K * T tokens, one after another

Every side plays and learns alike: the same clips a step, frames, epochs, minibatches, rank of the adapter, threads and number
format, and, but for encore-codes, a reward that costs nothing (the share of odd codes). TRL demands that reference, value and
reward be models: the reference is the policy with its adapter off (TRL's own way with PEFT), the value model a copy of the policy
with a linear head. Ours are in ppo_ours.py, TRL's in ppo_trl.py, and how a side waits for its turn in ppo_turn.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import functools
import os
from collections.abc import Callable

import torch
from transformers.utils import logging

from base_models.corpus.captions import demo_prompts
from base_models.policy import PRETRAINED, Policy, load_policy
from benchmarks.ppo_ours import encore, policy_only
from benchmarks.ppo_trl import trl_delay, trl_llama
from benchmarks.ppo_turn import Turn

SIDES: dict[str, Callable[[argparse.Namespace, Policy, list[str], Turn], None]] = {
    "encore": encore,
    "encore-codes": functools.partial(encore, credit="codes"),
    "policy-only": policy_only,
    "trl-delay": trl_delay,
    "trl-llama": trl_llama,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=125)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--critic", choices=("trained", "frozen"), default="trained")
    args = parser.parse_args()
    turn = Turn()
    os.environ["ACCELERATE_MIXED_PRECISION"] = (
        "bf16" if args.precision == "bf16" and args.side.startswith("trl") else "no"
    )  # TRL's flag alone does nothing
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    prompts = [row["prompt"] for row in demo_prompts(args.batch, "heldout")]
    SIDES[args.side](args, load_policy(args.policy), prompts, turn)


if __name__ == "__main__":
    main()
