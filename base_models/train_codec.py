"""Trains the magnitude codec from a corpus.

    accelerate launch base_models/train_codec.py --corpus DIR --out runs/codec
    python base_models/train_codec.py --preset smoke --out /tmp/codec          # < 1 minute, nothing to download

    clips -> int16 memory map -> 1.6 s crops [B, 1, L] with gain -> |STFT|^0.3 -> codec -> |STFT|^0.3 -> loss

The loss compares magnitudes, so no phase is reconstructed while training. No adversary: at minutes of training it brought nothing.
The learning rate falls to zero at whichever comes first, the last step or the last minute; a stopped run goes on where it was.

Papers: SoundStream (arXiv:2107.03312), EnCodec (arXiv:2210.13438) for gain augmentation and the spectral losses.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank

from base_models import settings
from base_models.checkpoint import (
    append_jsonl,
    file_sha256,
    latest_training_state,
    load_training_state,
    save_training_state,
    write_json,
)
from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.corpus.waves import Waves, load_waves, synthetic_waves
from base_models.errors import UserError
from base_models.launch import agreed, open_accelerator


@dataclass(frozen=True)
class Config:
    """What a codec run may vary."""

    corpus: Path | None = None
    """Folder with metadata.jsonl; none: synthetic chords."""
    out: Path = Path("runs/codec")
    """Run folder: config.json, metrics.jsonl, checkpoints/, codec/."""
    steps: int = 20000
    """Optimiser steps at most."""
    max_minutes: float = 0.0
    """Wall clock for the steps, over all resumptions; 0: no limit."""
    batch_size: int = 8
    """Crops a step and process."""
    crop_s: float = 1.6
    """Length of a crop."""
    gain_db: tuple[float, float] = (-9.0, 3.0)
    """Range of the random gain."""
    lr: float = 8e-4
    """Peak learning rate of AdamW with betas (0.8, 0.99)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    quantizer_dropout: float = 0.3
    """Share of steps that quantise with a random number of the first codebooks only."""
    revive_every: int = 50
    """Steps between two moves of rarely chosen codes."""
    revive_until: float = 0.9
    """No codes are moved after this share of the run."""
    commitment: float = 1.0
    """Weight of the commitment loss."""
    init_crops: int = 1000
    """Crops from which PCA and k-means start."""
    n_q: int = 4
    """Codebooks."""
    card: int = 1024
    """Entries of a codebook."""
    width: int = 256
    """Width of the ConvNeXt blocks."""
    latent_dim: int = 96
    """Width of the quantised latents."""
    mixed_precision: str = "no"
    """no or bf16."""
    half_precision_folder: bool = True
    """Store the finished codec as float16."""
    log_every: int = 50
    """Steps between two rows of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the weights and the crops."""


PRESETS = {
    "smoke": {
        "steps": 20,
        "batch_size": 4,
        "crop_s": 0.8,
        "init_crops": 24,
        "card": 32,
        "width": 64,
        "latent_dim": 32,
        "log_every": 5,
        "checkpoint_every": 10,
    }
}


def mel_matrix(sample_rate: int, n_bins: int, n_mels: int = 80) -> Tensor:
    """Triangular mel filters [n_bins, n_mels] on the Slaney scale, of height one."""
    bank = mel_filter_bank(
        n_bins, n_mels, 0.0, sample_rate / 2, sample_rate, norm=None, mel_scale="slaney", triangularize_in_mel_space=False
    )
    return torch.from_numpy(bank).float()


def codec_loss(predicted: Tensor, target: Tensor, expand, mel: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """2 * L1(|S|^p) + L1(log mel) + 0.5 * spectral convergence.

    Args: predicted, target: |S|^p [B, T, F]. expand: |S|^p -> magnitudes [B, frames, n_bins]. mel: [n_bins, n_mels].
    Returns: loss []; its parts by name, each [].
    """
    assert predicted.shape == target.shape
    magnitude, true = expand(predicted), expand(target)
    parts = {
        "magnitude_l1": (predicted - target).abs().mean(),
        "log_mel_l1": ((magnitude @ mel).clamp_min(1e-2).log() - (true @ mel).clamp_min(1e-2).log()).abs().mean(),
        "spectral_convergence": (magnitude - true).norm() / true.norm().clamp_min(1e-3),
    }
    return 2 * parts["magnitude_l1"] + parts["log_mel_l1"] + 0.5 * parts["spectral_convergence"], parts


def learning_rate(cfg: Config, step: int, elapsed_s: float) -> float:
    """Linear warm-up, then one cosine to zero over the budget."""
    cosine = 0.5 * (1 + math.cos(math.pi * share_done(cfg, step, elapsed_s)))
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps)) * cosine


def share_done(cfg: Config, step: int, elapsed_s: float) -> float:
    """How much of the budget is used up, of steps or of minutes, whichever is more: 0 to 1."""
    share = step / cfg.steps
    if cfg.max_minutes > 0:
        share = max(share, elapsed_s / (60 * cfg.max_minutes))
    return min(1.0, share)


def load_data(cfg: Config, sample_rate: int) -> Waves:
    """The training clips: the corpus's, or synthetic ones when none is named."""
    if cfg.corpus is None:
        return synthetic_waves(16, 2.0, sample_rate, cfg.seed)
    return load_waves(cfg.corpus, ["train"], sample_rate)


def main(cfg: Config) -> Path:
    """Trains, writes `<out>/codec` and returns it."""
    # 1. The codec, its data, and the best linear codec as the start.
    if cfg.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {cfg.mixed_precision}", "no or bf16", "choose one of the two")
    accelerator = open_accelerator(mps=True, mixed_precision=cfg.mixed_precision)
    set_seed(cfg.seed)
    codec = MagnitudeCodec(CodecConfig(n_q=cfg.n_q, card=cfg.card, width=cfg.width, latent_dim=cfg.latent_dim))
    with accelerator.main_process_first():
        waves = load_data(cfg, codec.sample_rate)
    length = round(cfg.crop_s * codec.sample_rate)
    parents = {"corpus_sha256": file_sha256(cfg.corpus / "metadata.jsonl") if cfg.corpus is not None else "synthetic"}
    checkpoint = latest_training_state(cfg.out, parents)  # before anything of another run is written over
    if accelerator.is_main_process:
        cfg.out.mkdir(parents=True, exist_ok=True)
        write_json(cfg.out / "config.json", settings.to_mapping(cfg))
    codec.to(accelerator.device)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=cfg.lr, betas=(0.8, 0.99), weight_decay=0.01)

    # 2. Go on where a stopped run was, or start.
    step, elapsed_s = 0, 0.0
    if checkpoint is not None:
        step, tensors, states, extra = load_training_state(checkpoint)
        try:
            codec.load_state_dict(tensors["codec"])
        except RuntimeError as error:
            raise UserError(
                f"a run of another shape in {cfg.out}", "its own settings", "choose another --out, or remove the folder"
            ) from error
        optimizer.load_state_dict(states["optimizer"])
        elapsed_s = extra["elapsed_s"]
    else:
        crops = waves.crops(cfg.init_crops, length, np.random.default_rng([cfg.seed, 1]), cfg.gain_db)
        codec.initialise(torch.from_numpy(crops).to(accelerator.device))
    model, optimizer = accelerator.prepare(codec, optimizer)
    mel = mel_matrix(codec.sample_rate, codec.config.n_bins).to(accelerator.device)

    # 3. Learn.
    model.train()
    used = torch.zeros(cfg.n_q, cfg.card, dtype=torch.bool)
    started = time.monotonic() - elapsed_s
    bar = tqdm(total=cfg.steps, initial=step, desc="codec", unit="step", disable=not accelerator.is_main_process)
    while step < cfg.steps:
        elapsed_s = agreed(time.monotonic() - started, accelerator)
        if 0 < 60 * cfg.max_minutes <= elapsed_s:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, elapsed_s)
        rng = np.random.default_rng([cfg.seed, 2, step, accelerator.process_index])
        wav = torch.from_numpy(waves.crops(cfg.batch_size, length, rng, cfg.gain_db)).to(accelerator.device)
        # All processes drop together: the quantizer then agrees on how much over the network.
        codec.rvq.quantize_dropout = np.random.default_rng([cfg.seed, 3, step]).random() < cfg.quantizer_dropout
        with accelerator.autocast():
            predicted, target, codes, commitment = model(wav)
        loss, parts = codec_loss(predicted.float(), target.float(), codec.expand, mel)
        accelerator.backward(loss + cfg.commitment * commitment)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % cfg.revive_every == 0 and share_done(cfg, step, elapsed_s) < cfg.revive_until:
            codec.revive()
        for k in range(cfg.n_q):
            used[k, codes[..., k][codes[..., k] >= 0].cpu()] = True

        # 4. Tell.
        if accelerator.is_main_process and step % cfg.log_every == 0:
            row = {name: part.item() for name, part in {"loss": loss, "commitment": commitment, **parts}.items()}
            row |= {"step": step, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item()}
            row |= {"codebook_use": used.float().mean(1).tolist(), "elapsed_s": round(elapsed_s, 2)}
            append_jsonl(cfg.out / "metrics.jsonl", row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", mel=f"{row['log_mel_l1']:.3f}")
        if step % 500 == 0:
            used.zero_()
        if accelerator.is_main_process and step % cfg.checkpoint_every == 0:
            _save_state(cfg, step, codec, optimizer, elapsed_s, parents)
    bar.close()

    # 5. The codec's folder.
    if accelerator.is_main_process:
        _save_state(cfg, step, codec, optimizer, elapsed_s, parents)
        codec.eval().save(cfg.out / "codec", torch.float16 if cfg.half_precision_folder else torch.float32)
    accelerator.end_training()
    return cfg.out / "codec"


def _save_state(cfg: Config, step: int, codec: MagnitudeCodec, optimizer, elapsed_s: float, parents: dict[str, str]) -> None:
    states = {"optimizer": optimizer.state_dict()}
    save_training_state(cfg.out, step, {"codec": codec.state_dict()}, states, {"elapsed_s": elapsed_s, **parents})


if __name__ == "__main__":
    settings.run(main, Config, PRESETS, show=lambda folder: f"codec in {folder}")
