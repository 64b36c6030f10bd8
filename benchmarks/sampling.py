"""Sampling: ours against transformers' MusicgenForCausalLM.generate, the same weights, prompts and machine, in one run.

    python benchmarks/sampling.py                      # the shipped base, 16 clips of 6 s
    python benchmarks/sampling.py --batch 4 --rounds 5

The two take turns, so that a busy neighbour slows both. Prints tokens (codes) a second, times real time and processor seconds of
each (medians), their ratios, and the share of greedy codes that are equal. Prompts are played without their tempo: transformers'
loop does not know the beat clock, and with a tempo it would not play the same model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import statistics
import time

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from base_models.conditions import Conditions
from base_models.corpus.captions import demo_prompts
from base_models.lm import MusicLM
from base_models.policy import PRETRAINED, load_policy
from base_models.sampling import generate


@torch.no_grad()
def transformers_codes(lm: MusicLM, cond: Conditions, n_frames: int, greedy: bool) -> Tensor:
    """codes [B, K, T] by transformers' own loop over the same decoder. `cond` must have no tempo."""
    B = len(cond)
    memory, mask = lm.memory(cond)
    settings = lm.decoder.generation_config
    settings.pad_token_id = settings.bos_token_id = settings.decoder_start_token_id = lm.special
    settings.guidance_scale, settings.num_return_sequences = 1.0, 1
    codes = lm.decoder.generate(
        torch.full((B * lm.n_q, 1), lm.special),
        attention_mask=torch.ones((B, 1), dtype=torch.long),  # the first token is the padding's: unasked, it would be hidden
        encoder_hidden_states=memory,
        encoder_attention_mask=mask.long(),
        # Without this, generate() keeps keys of self- and cross-attention in one cache and fails.
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        do_sample=not greedy,
        max_new_tokens=n_frames + lm.n_q - 1,
    )
    return codes.reshape(B, lm.n_q, -1)[..., -n_frames:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--duration", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    policy = load_policy(args.policy)
    lm, T = policy.lm, policy.n_frames(args.duration)
    cond = policy.conditions([row["prompt"] for row in demo_prompts(args.batch, "heldout")])
    cond = dataclasses.replace(cond, tempo_bpm=torch.full((args.batch,), float("nan")))

    def ours(greedy: bool) -> Tensor:
        return generate(lm, cond, T, seeds=range(args.batch), greedy=greedy).codes

    def theirs(greedy: bool) -> Tensor:
        return transformers_codes(lm, cond, T, greedy)

    sides = {"encore": ours, "transformers": theirs}
    codes = {name: run(True) for name, run in sides.items()}  # warms both up
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            began = time.perf_counter(), time.process_time()
            run(False)
            seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = ({name: statistics.median(s[i] for s in seconds[name]) for name in sides} for i in (0, 1))
    figures = {
        "batch": args.batch,
        "n_frames": T,
        "tokens_per_s": {name: round(args.batch * lm.n_q * T / wall[name]) for name in sides},
        "x_real_time": {name: round(args.batch * T / policy.codec.frame_rate / wall[name], 1) for name in sides},
        "cpu_seconds": {name: round(cpu[name], 3) for name in sides},
        "ratio": round(wall["transformers"] / wall["encore"], 2),
        "ratio_cpu": round(cpu["transformers"] / cpu["encore"], 2),
        "greedy_codes_equal": (codes["encore"] == codes["transformers"]).float().mean().item(),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
