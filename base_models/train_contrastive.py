"""Trains the audio-text embedding on a tokenised corpus.

    accelerate launch base_models/train_contrastive.py --tokens .cache/codes --codec runs/codec/codec --out runs/contrastive
    python base_models/train_contrastive.py --preset smoke --out /tmp/contrastive        # < 1 minute, no corpus needed

    codes [B, K, T] (random excerpt) -> audio tower ┐
                                                    ├ symmetric InfoNCE, identical captions are right answers too
    one of a clip's captions -> frozen text encoder ┘

The text encoder stays frozen and each caption is pooled once. Recall is told on clips of held-out pieces.

Papers: CLIP (arXiv:2103.00020), MuLan (arXiv:2208.12415).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import math

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from base_models import settings
from base_models.checkpoint import (
    append_jsonl,
    latest_training_state,
    load_training_state,
    save_training_state,
    write_json,
)
from base_models.contrastive import AudioTextModel, ContrastiveConfig, contrastive_loss, recall_at
from base_models.corpus.tokens import TokenisedCorpus, codec_of, load_tokens, synthetic_tokens
from base_models.errors import UserError
from base_models.launch import agreed, open_accelerator
from base_models.text_encoder import load_text_encoder


@dataclass(frozen=True)
class Config:
    """What a contrastive run may vary."""

    tokens: Path | None = None
    """Folder of a tokenised corpus; none: a tiny synthetic one."""
    codec: Path | None = None
    """The codec that made the tokens; its codebooks are copied. Needed with --tokens."""
    out: Path = Path("runs/contrastive")
    """Run folder: config.json, metrics.jsonl, figures.json, checkpoints/, contrastive/."""
    steps: int = 1500
    """Optimiser steps at most."""
    max_minutes: float = 0.0
    """Wall clock for the steps, over all resumptions; 0: no limit."""
    batch_size: int = 192
    """Clips a step and process."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    warmup_steps: int = 50
    """Steps of linear warm-up, then one cosine to zero."""
    excerpt: tuple[float, float] = (0.5, 1.0)
    """Shortest and longest excerpt, as a share of the clip."""
    noise: float = 0.05
    """Share of codes replaced by random ones, so that sampled, imperfect codes are heard fairly too."""
    width: int = 160
    """Width of the audio tower."""
    embed_dim: int = 128
    """Width of the common space."""
    text_encoder: str = "minilm"
    """Frozen text encoder: the packaged one, a folder or a hub name."""
    heldout_split: str = "test_piece"
    """Split on which recall is told."""
    mixed_precision: str = "no"
    """no or bf16."""
    half_precision_folder: bool = True
    """Store the finished model as float16."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of weights, excerpts and captions."""


PRESETS = {
    "smoke": {
        "steps": 20,
        "batch_size": 12,
        "width": 32,
        "embed_dim": 16,
        "warmup_steps": 2,
        "log_every": 5,
        "checkpoint_every": 10,
    }
}


@dataclass(frozen=True)
class Split:
    """codes [N, K, T] int16; captions[i]: the clip's distinct captions as rows of `pooled` [n_captions, D]."""

    codes: Tensor
    captions: list[list[int]]
    texts: list[str]
    pooled: Tensor


def load_split(corpus: TokenisedCorpus, name: str, encoder) -> Split:
    """A split with every distinct caption pooled once. Raises: UserError when the corpus has no such split."""
    rows = corpus.split(name)
    if not len(rows):
        raise UserError(f"tokens without a {name} split", "at least one row of it", "name another split")
    texts = sorted({caption for i in rows for caption in corpus.rows[i]["captions"]}, key=lambda text: (len(text), text))
    index = {text: i for i, text in enumerate(texts)}
    captions = [sorted({index[caption] for caption in corpus.rows[i]["captions"]}) for i in rows]
    parts = [encoder.pooled(texts[i : i + 256]) for i in tqdm(range(0, len(texts), 256), desc=f"captions {name}", unit="batch")]
    return Split(torch.from_numpy(corpus.codes[rows]), captions, texts, torch.cat(parts).cpu())


def draw(split: Split, cfg: Config, card: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A training batch: codes [B, K, T'] of random excerpts, pooled captions [B, D], same [B, B] (see contrastive_loss)."""
    N, _, T = split.codes.shape
    rows = rng.choice(N, min(cfg.batch_size, N), replace=False)
    length = min(T, max(4, round(T * rng.uniform(*cfg.excerpt))))
    starts = rng.integers(T - length + 1, size=len(rows))
    codes = torch.stack([split.codes[row, :, start : start + length] for row, start in zip(rows, starts)]).long()
    noisy = torch.from_numpy(rng.random(codes.shape) < cfg.noise)
    codes = torch.where(noisy, torch.from_numpy(rng.integers(card, size=codes.shape)), codes)
    chosen = [int(rng.choice(split.captions[row])) for row in rows]
    same = torch.tensor([[caption in split.captions[row] for caption in chosen] for row in rows])
    return codes, split.pooled[chosen], same


@torch.no_grad()
def evaluate(model: AudioTextModel, split: Split) -> dict[str, float]:
    """Text-to-audio R@10 and its ratio to chance: each distinct caption asks once; every clip that bears it is a right answer.

    `full` asks only with the longest caption of each clip, `all` with all of them, short ones such as "jazz" included.
    """
    model.eval()
    audio = torch.cat([model.embed_codes(part.long()) for part in split.codes.split(64)])
    text = model.embed_pooled(split.pooled.to(audio.device))
    full = sorted({max(captions, key=lambda i: len(split.texts[i])) for captions in split.captions})
    figures: dict[str, float] = {"clips": len(audio)}
    for name, queries in (("full", full), ("all", list(range(len(text))))):
        right = torch.tensor([[query in captions for captions in split.captions] for query in queries])
        recall, chance = recall_at((text[queries] @ audio.T).cpu(), right, 10)
        figures |= {f"r10_{name}": recall, f"chance_{name}": chance, f"r10_over_chance_{name}": recall / chance}
    return figures


def main(cfg: Config) -> dict[str, float]:
    """Trains, writes `<out>/contrastive` and `<out>/figures.json`, and returns the figures."""
    # 1. Tokens, captions, model.
    if cfg.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {cfg.mixed_precision}", "no or bf16", "choose one of the two")
    accelerator = open_accelerator(mps=True, mixed_precision=cfg.mixed_precision)
    set_seed(cfg.seed)
    corpus = load_tokens(cfg.tokens) if cfg.tokens is not None else synthetic_tokens()
    codebooks = torch.randn(corpus.n_q, corpus.card, 16)
    if cfg.tokens is not None:
        if cfg.codec is None:
            raise UserError("--tokens without --codec", "the codec that made the tokens", "add --codec DIR")
        codebooks = codec_of(corpus, cfg.codec).codebooks
    encoder = load_text_encoder(cfg.text_encoder).to(accelerator.device)
    train, heldout = load_split(corpus, "train", encoder), load_split(corpus, cfg.heldout_split, encoder)
    shape = ContrastiveConfig(
        n_q=corpus.n_q,
        card=corpus.card,
        latent_dim=codebooks.shape[-1],
        width=cfg.width,
        embed_dim=cfg.embed_dim,
        text_encoder=cfg.text_encoder,
        text_dim=encoder.dim,
        codec_sha256=corpus.codec_sha256,
    )
    tower = AudioTextModel(shape, encoder)
    tower.set_codebooks(codebooks)
    tower.to(accelerator.device)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    parents = {"tokens_sha256": corpus.sha256, "codec_sha256": corpus.codec_sha256}
    checkpoint = latest_training_state(cfg.out, parents)  # before anything of another run is written over
    if accelerator.is_main_process:
        cfg.out.mkdir(parents=True, exist_ok=True)
        write_json(cfg.out / "config.json", {**settings.to_mapping(cfg), "tokens_sha256": corpus.sha256})

    # 2. Go on where a stopped run was.
    step, elapsed_s = 0, 0.0
    if checkpoint is not None:
        step, tensors, states, extra = load_training_state(checkpoint)
        try:
            tower.load_state_dict(tensors["model"])
        except RuntimeError as error:
            raise UserError(
                f"a run of another shape in {cfg.out}", "its own settings", "choose another --out, or remove the folder"
            ) from error
        optimizer.load_state_dict(states["optimizer"])
        elapsed_s = extra["elapsed_s"]
    model, optimizer = accelerator.prepare(tower, optimizer)

    # 3. Learn.
    started = time.monotonic() - elapsed_s
    bar = tqdm(total=cfg.steps, initial=step, desc="contrastive", unit="step", disable=not accelerator.is_main_process)
    model.train()
    while step < cfg.steps:
        elapsed_s = agreed(time.monotonic() - started, accelerator)
        share = max(step / cfg.steps, elapsed_s / (60 * cfg.max_minutes) if cfg.max_minutes > 0 else 0)
        if share >= 1:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps)) * cosine
        rng = np.random.default_rng([cfg.seed, step, accelerator.process_index])
        codes, pooled, same = (part.to(accelerator.device) for part in draw(train, cfg, corpus.card, rng))
        with accelerator.autocast():
            audio, text, scale = model(codes, pooled)
        loss = contrastive_loss(audio.float(), text.float(), scale, same)
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()

        # 4. Tell.
        if accelerator.is_main_process and step % cfg.log_every == 0:
            row = {"step": step, "loss": loss.item(), "scale": scale.item(), "grad_norm": grad_norm.item()}
            row |= {"lr": optimizer.param_groups[0]["lr"], "elapsed_s": round(elapsed_s, 2)}
            append_jsonl(cfg.out / "metrics.jsonl", row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
        if accelerator.is_main_process and step % cfg.checkpoint_every == 0:
            _save_state(cfg, step, tower, optimizer, elapsed_s, parents)
    bar.close()

    # 5. The model's folder and its recall.
    if accelerator.is_main_process:
        _save_state(cfg, step, tower, optimizer, elapsed_s, parents)
        tower.save(cfg.out / "contrastive", torch.float16 if cfg.half_precision_folder else torch.float32)
    figures = evaluate(tower, heldout)
    if accelerator.is_main_process:
        write_json(cfg.out / "figures.json", figures)
    accelerator.end_training()
    return figures


def _save_state(cfg: Config, step: int, model: AudioTextModel, optimizer, elapsed_s: float, parents: dict[str, str]) -> None:
    states = {"optimizer": optimizer.state_dict()}
    save_training_state(cfg.out, step, {"model": model.state_dict()}, states, {"elapsed_s": elapsed_s, **parents})


if __name__ == "__main__":
    settings.run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2))
