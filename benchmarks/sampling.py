"""Sampling: ours against transformers' MusicgenForCausalLM.generate, the same weights, prompts and machine, in one run.

    python benchmarks/sampling.py            # the shipped base, 16 clips of 6 s

Prints seconds of audio made in a second of each, their ratio, and the share of greedy codes that are equal (the
order of additions differs, so a near-tie may fall the other way, and what follows it then differs too).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import time

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from base_models.corpus.captions import demo_prompts
from base_models.policy import PRETRAINED, load_policy
from base_models.sampling import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--duration", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    policy = load_policy(args.policy)
    lm, T = policy.lm, policy.n_frames(args.duration)
    cond = policy.conditions([row["prompt"] for row in demo_prompts(args.batch, "heldout")])
    seconds_of_audio = args.batch * T / policy.codec.frame_rate

    def ours(greedy: bool) -> torch.Tensor:
        return generate(lm, cond, T, seeds=range(args.batch), greedy=greedy).codes

    memory, mask = lm.memory(cond)
    settings = lm.decoder.generation_config
    settings.pad_token_id = settings.bos_token_id = settings.decoder_start_token_id = lm.special
    settings.guidance_scale, settings.num_return_sequences = 1.0, 1

    @torch.no_grad()
    def theirs(greedy: bool) -> torch.Tensor:
        begin = torch.full((args.batch * lm.n_q, 1), lm.special)
        # Without this, generate() keeps keys of self- and cross-attention in one cache and fails.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        codes = lm.decoder.generate(
            begin,
            encoder_hidden_states=memory,
            encoder_attention_mask=mask.long(),
            past_key_values=cache,
            do_sample=not greedy,
            max_new_tokens=T + lm.n_q - 1,
        )
        return codes.reshape(args.batch, lm.n_q, -1)[..., -T:]

    speeds = {}
    for name, run in (("encore", ours), ("transformers", theirs)):
        run(False)
        began = time.perf_counter()
        run(False)
        speeds[name] = seconds_of_audio / (time.perf_counter() - began)
    equal = (ours(True) == theirs(True)).float().mean().item()
    print(json.dumps({"x_real_time": speeds, "ratio": speeds["encore"] / speeds["transformers"], "greedy_codes_equal": equal}, indent=2))


if __name__ == "__main__":
    main()
