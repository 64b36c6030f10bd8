"""Measures a codec on held-out clips beside its rival, Opus at 12 kbit/s.

python base_models/evaluate_codec.py --codec runs/codec/codec --corpus DIR --out figures.json

clips -> codes -> clips;  log-mel L1 to the original, and the same for Opus;  use of each codebook;  bits;  speed on one core
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

import numpy as np
import torch
from tqdm import tqdm

from base_models import settings
from base_models.checkpoint import write_json
from base_models.codec import Codec, load_codec
from base_models.corpus.waves import load_waves
from base_models.measures import log_mel_l1, opus_roundtrip


@dataclass(frozen=True)
class Config:
    """Which codec, judged on what."""

    codec: Path = Path("base_models/pretrained/codec")
    """The codec's folder."""
    corpus: Path = Path(".cache/corpus")
    """Folder with metadata.jsonl."""
    split: str = "test_piece"
    """Clips of this split."""
    n_clips: int = 300
    """At most this many clips for codebook use; the first `n_opus` for log-mel L1 and speed."""
    n_opus: int = 48
    """Clips decoded, and sent through Opus."""
    out: Path | None = None
    """JSON file for the figures."""


def evaluate_codec(codec: Codec, wavs: Sequence[np.ndarray], n_decoded: int = 48) -> dict[str, float | list[float]]:
    """Figures of a codec on clips.

    Args: wavs: mono clips [L] float32 at the codec's rate. n_decoded: how many of them are decoded and compared.
    Returns: log_mel_l1 and opus12k_log_mel_l1 (natural log, 80 bands, means over clips), codebook_use [K] (share of the entries
    that occur), codebook_perplexity [K], bits (kbit/s), decode_realtime_factor (seconds of audio a second of one core's time).
    """
    counts = np.zeros((codec.n_q, codec.card))
    ours, opus, seconds, spent = [], [], 0.0, 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, wav in enumerate(tqdm(wavs, desc="codec", unit="clip")):
            codes = codec.encode(torch.from_numpy(np.ascontiguousarray(wav, np.float32))[None, None], codec.sample_rate)
            for k in range(codec.n_q):
                counts[k] += np.bincount(codes[0, k].numpy(), minlength=codec.card)
            if i >= n_decoded:
                continue
            began = time.process_time()
            decoded = codec.decode(codes)[0].numpy()
            spent += time.process_time() - began
            seconds += decoded.shape[-1] / codec.sample_rate
            ours.append(log_mel_l1(wav, decoded[0, : len(wav)], codec.sample_rate))
            opus.append(log_mel_l1(wav, opus_roundtrip(wav, codec.sample_rate, 12), codec.sample_rate))
    finally:
        torch.set_num_threads(threads)
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(1)
    return {
        "log_mel_l1": float(np.mean(ours)),
        "opus12k_log_mel_l1": float(np.mean(opus)),
        "codebook_use": (counts > 0).mean(1).tolist(),
        "codebook_perplexity": np.exp(entropy).tolist(),
        "bits": codec.frame_rate * codec.n_q * float(np.log2(codec.card)) / 1000,
        "decode_realtime_factor": seconds / spent,
        "n_clips": len(wavs),
    }


def main(cfg: Config) -> dict[str, float | list[float]]:
    """Evaluates, writes the figures where asked, and returns them."""
    codec = load_codec(cfg.codec)
    waves = load_waves(cfg.corpus, [cfg.split], codec.sample_rate)
    figures = evaluate_codec(codec, [waves.clip(i) for i in range(min(cfg.n_clips, len(waves)))], cfg.n_opus)
    if cfg.out is not None:
        write_json(cfg.out, figures)
    return figures


if __name__ == "__main__":
    settings.run(main, Config, show=lambda figures: json.dumps(figures, indent=2))
