"""Measure a base on held-out prompts and clips: does it play the genre and the tempo that it was asked for, and is it its own?

    python base_models/evaluate_base.py --policy base_models/pretrained --corpus .cache/corpus --tokens .cache/codes/NAME \
        --figures base_models/pretrained/figures.json

    held-out prompts -> codes -> wav -> genre by a probe that was trained on real clips only; tempo by autocorrelation
    test_piece clips -> bits per code, beside a unigram and a bigram model of the same codes
    generated codes  -> the nearest training clip

The probe hears real held-out clips and their codec round trip too: the round trip is the ceiling, 1/12 is chance.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_models.audio import read_audio
from base_models.checkpoint import read_json, write_json
from base_models.codec import Codec
from base_models.conditions import Conditions
from base_models.corpus.captions import demo_prompts
from base_models.corpus.tokens import TokenisedCorpus, load_tokens
from base_models.corpus.waves import read_rows
from base_models.lm import MusicLM
from base_models.measures import GenreProbe, estimate_tempo, tempo_matches
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.sampling import generate
from base_models.settings import run
from base_models.train_lm import evaluate as bits_per_code
from base_models.train_lm import load_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    policy: Path = PRETRAINED
    """Policy folder to measure."""
    corpus: Path = Path(".cache/corpus")
    """Corpus whose real clips train and check the probe."""
    tokens: Path = Path(".cache/codes")
    """The same corpus, tokenised with the policy's codec."""
    figures: Path = Path("runs/base_figures.json")
    """Where the figures go; those that stand there already and are not measured here are kept."""
    prompts: int = 240
    """Held-out prompts, evenly over the genres."""
    probe_clips: int = 1500
    """Real training clips that the probe learns from."""
    held_clips: int = 300
    """Real held-out clips that check the probe, before and after the codec."""
    cfg_coef: float = 1.0
    """Guidance while sampling; 1 is what users hear."""
    temperature: float = 1.0
    """Temperature while sampling."""
    top_k: int = 0
    """Top-k while sampling; 0 keeps all."""
    batch_size: int = 16
    """Clips sampled at once."""
    seed: int = 1234
    """Seed of prompts and samples."""
    name: str = "base"
    """The key under which the figures are written."""
    cache: Path = Path(".cache/captions")
    """Where encoded captions are kept."""


def real_clips(corpus: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Waveforms [L] of corpus rows."""
    return [read_audio(corpus / row["file_name"])[0][0] for row in rows]


def ngram_bits(train: Tensor, test: Tensor, card: int) -> tuple[float, float]:
    """Bits per code of a unigram and of a bigram model of each codebook (add-one smoothing), fitted on `train` [N, K, T].

    The bigram is interpolated half and half with the unigram, which is kinder to it than smoothing alone.
    """
    unigram_bits, bigram_bits = [], []
    for k in range(train.shape[1]):
        a, b = train[:, k].long(), test[:, k].long()
        unigram = torch.bincount(a.flatten(), minlength=card).double() + 1
        unigram /= unigram.sum()
        pairs = torch.bincount((a[:, :-1] * card + a[:, 1:]).flatten(), minlength=card * card).double().view(card, card)
        bigram = (pairs + 0.1 * unigram * card) / (pairs.sum(1, keepdim=True) + 0.1 * card)
        unigram_bits.append(-unigram[b].log2().mean().item())
        mixed = 0.5 * bigram[b[:, :-1], b[:, 1:]] + 0.5 * unigram[b[:, 1:]]
        first = unigram[b[:, :1]].log2().sum()
        bigram_bits.append(-((mixed.log2().sum() + first) / b.numel()).item())
    return float(np.mean(unigram_bits)), float(np.mean(bigram_bits))


def nearest_training_clip(codes: Tensor, train: Tensor, max_shift: int = 12) -> Tensor:
    """For each clip the largest share of coarsest codes [G] that it has in common with one training clip, at any shift.

    Args: codes [G, K, T], train [N, K, T]. A clip that copies a training clip, also from a little before or after, is near 1.
    """
    own, known = codes[:, 0].to(torch.int16), train[:, 0].to(torch.int16)
    T = min(own.shape[1], known.shape[1])
    own, known = own[:, :T], known[:, :T]
    best = torch.zeros(len(own))
    for shift in range(-max_shift, max_shift + 1):
        a = own[:, max(0, shift) : T + min(0, shift)]
        b = known[:, max(0, -shift) : T - max(0, shift)]
        for g in range(len(a)):
            best[g] = max(best[g].item(), (b == a[g]).float().mean(1).max().item())
    return best


def sample(policy: Policy, cond: Conditions, n_frames: int, cfg: Config) -> tuple[Tensor, float]:
    """Codes [N, K, T] for all conditions, and how many seconds of audio were made in one second."""
    parts, began = [], time.monotonic()
    for start in tqdm(range(0, len(cond), cfg.batch_size), desc="sampling", unit="batch"):
        rows = range(start, min(start + cfg.batch_size, len(cond)))
        seeds = [cfg.seed * 100_003 + row for row in rows]
        part = cond.index(list(rows))
        made = generate(policy.lm, part, n_frames, seeds=seeds, cfg_coef=cfg.cfg_coef, temperature=cfg.temperature, top_k=cfg.top_k)
        parts.append(made.codes)
    codes = torch.cat(parts)
    return codes, codes.shape[0] * n_frames / policy.codec.frame_rate / (time.monotonic() - began)


def waves(codec: Codec, codes: Tensor) -> list[np.ndarray]:
    return [codec.decode(row[None])[0, 0].numpy() for row in tqdm(codes, desc="decoding", unit="clip")]


def bits(lm: MusicLM, corpus: TokenisedCorpus, policy: Policy, cfg: Config) -> dict[str, float]:
    """Bits per code of the model and of the n-grams on the test_piece split."""
    split = np.array([row["split"] for row in corpus.rows])
    train, test = (torch.as_tensor(corpus.codes[split == name]) for name in ("train", "test_piece"))
    unigram, bigram = ngram_bits(train, test, corpus.card)
    as_val = [{**row, "split": "val" if row["split"] == "test_piece" else "train"} for row in corpus.rows]
    renamed = TokenisedCorpus(**{**corpus.__dict__, "rows": as_val})
    data = load_data(renamed, policy.text_encoder, cfg.cache)["val"]
    lm.fast_training()
    own = bits_per_code(lm, data, torch.device("cpu"), limit=10**6)
    return {"bits_per_code": own.mean().item(), "unigram_bits": unigram, "bigram_bits": bigram}


def main(cfg: Config) -> dict[str, Any]:
    policy = load_policy(cfg.policy)
    corpus = load_tokens(cfg.tokens)
    rows = read_rows(cfg.corpus)
    sample_rate = policy.codec.sample_rate

    # 1. A probe that has heard real music only.
    train_rows = [row for row in rows if row["split"] == "train"][: cfg.probe_clips]
    held_rows = [row for row in rows if row["split"] == "test_piece"][: cfg.held_clips]
    probe = GenreProbe.fit(real_clips(cfg.corpus, train_rows), sample_rate, [row["genre"] for row in train_rows])
    held = real_clips(cfg.corpus, held_rows)
    genres = [row["genre"] for row in held_rows]
    by_name = {(row["split"], row["file_name"]): i for i, row in enumerate(corpus.rows)}
    held_codes = torch.as_tensor(corpus.codes[[by_name[row["split"], row["file_name"]] for row in held_rows]]).long()
    round_trip = waves(policy.codec, held_codes)

    # 2. The base plays held-out prompts.
    prompts = demo_prompts(cfg.prompts, "heldout", seed=cfg.seed)
    cond = policy.conditions([row["prompt"] for row in prompts])
    n_frames = held_codes.shape[-1]
    codes, speed = sample(policy, cond, n_frames, cfg)
    played = waves(policy.codec, codes)
    asked = [row["genre"] for row in prompts]
    heard = probe.predict(played, sample_rate)

    # 3. Tempo, where the prompt states one.
    stated = [i for i, row in enumerate(prompts) if row["tempo_bpm"]]
    tempo_right = [tempo_matches(estimate_tempo(played[i], sample_rate), prompts[i]["tempo_bpm"]) for i in stated]
    tempo_real = [tempo_matches(estimate_tempo(wav, sample_rate), row["tempo_bpm"]) for wav, row in zip(held, held_rows)]
    # What an unlistening base would score: the stated tempi dealt out to the wrong clips.
    dealt = [prompts[stated[(i + 7) % len(stated)]]["tempo_bpm"] for i in range(len(stated))]
    tempo_chance = [tempo_matches(estimate_tempo(played[i], sample_rate), tempo) for i, tempo in zip(stated, dealt)]

    # 4. Nearest training clip, beside that of real held-out clips.
    split = np.array([row["split"] for row in corpus.rows])
    train_codes = torch.as_tensor(corpus.codes[split == "train"])
    near, near_real = nearest_training_clip(codes, train_codes), nearest_training_clip(held_codes[:100], train_codes)

    figures: dict[str, Any] = {
        "genre_accuracy": float(np.mean([a == b for a, b in zip(asked, heard)])),
        "genre_ceiling": probe.accuracy(round_trip, sample_rate, genres),
        "genre_real": probe.accuracy(held, sample_rate, genres),
        "genre_chance": 1 / len(set(genres)),
        "genre_by_genre": {g: float(np.mean([h == g for a, h in zip(asked, heard) if a == g])) for g in sorted(set(asked))},
        "tempo_accuracy": float(np.mean(tempo_right)),
        "tempo_real": float(np.mean(tempo_real)),
        "tempo_shuffled": float(np.mean(tempo_chance)),
        "memorised": float((near > 0.5).float().mean()),
        "nearest_median": near.median().item(),
        "nearest_max": near.max().item(),
        "memorised_real_heldout": float((near_real > 0.5).float().mean()),
        "nearest_median_real_heldout": near_real.median().item(),
        "sampling_x_real_time": speed,
        "prompts": len(prompts),
        "tempo_prompts": len(stated),
        "cfg_coef": cfg.cfg_coef,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "policy_sha256": policy.sha256,
        **bits(policy.lm, corpus, policy, cfg),
    }
    assert all(math.isfinite(v) for v in figures.values() if isinstance(v, float))
    known = read_json(cfg.figures) if cfg.figures.is_file() else {}
    write_json(cfg.figures, {**known, cfg.name: figures})
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    return figures


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(main, Config)
