"""Teach a language model to sound guided without guidance: one pass a step instead of two, and one distribution for RL.

    accelerate launch base_models/distil_guidance.py --lm runs/lm/lm --tokens .cache/codes/NAME --out runs/lm_distilled

    captions -> teacher's guided samples (cached)  +  real codes
             -> KL( top-k softmax((null + cfg (cond - null)) / temperature)  ||  student's softmax(cond) )  at every code

A small base sounds like little without guidance, and a policy that is trained on unguided samples is one that nobody hears.
So the guided distribution, its temperature and its top-k included, is distilled into the weights; afterwards plain sampling at
temperature 1 is what users hear and what DPO and PPO score. It deliberately learns no unconditional model.

Papers: Ho and Salimans 2022 (arXiv:2207.12598, guidance), Meng et al. 2023 (arXiv:2210.03142, distilling it), Hinton et al. 2015
(arXiv:1503.02531).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import copy
import hashlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import append_jsonl, load_tensors, save_tensors, write_json
from base_models.conditions import Conditions
from base_models.corpus.tokens import load_tokens
from base_models.errors import UserError
from base_models.launch import agreed, open_accelerator
from base_models.lm import MusicLM, disable_functional_dropout, load_lm
from base_models.sampling import filtered_log_probs, generate
from base_models.settings import run, to_mapping
from base_models.text_encoder import load_text_encoder
from base_models.train_lm import Data, load_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    lm: Path = Path("runs/lm/lm")
    """Folder of the teacher, which is also where the student starts."""
    tokens: Path = Path(".cache/codes")
    """Folder of the tokenised corpus that the teacher was trained on."""
    out: Path = Path("runs/lm_distilled")
    """Run folder: config.json, metrics.jsonl, guided.safetensors (the teacher's samples), lm/."""
    cfg_coef: float = 3.0
    """Guidance of the teacher."""
    temperature: float = 0.9
    """Temperature of the teacher."""
    top_k: int = 60
    """Top-k of the teacher; 0 keeps all."""
    clips: int = 1024
    """Guided samples to learn from."""
    sample_batch: int = 32
    """Clips sampled at once."""
    real: float = 0.3
    """Share of each batch that is real codes instead of the teacher's samples."""
    steps: int = 600
    """Updates."""
    max_minutes: float | None = None
    """Finish the cosine after so many minutes of updates, if that comes first."""
    batch_size: int = 16
    """Clips a process and update."""
    lr: float = 3e-4
    """Peak learning rate."""
    warmup: int = 20
    """Updates of linear warm-up."""
    dtype: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    cache: Path = Path(".cache/captions")
    """Where encoded captions are kept."""
    seed: int = 0
    """Seed of samples and batches."""


@torch.no_grad()
def guided_target(teacher: MusicLM, codes: Tensor, cond: Conditions, cfg: Config) -> Tensor:
    """The teacher's guided log-probs [B, K, T, V], filtered as it samples."""
    given, null = teacher(codes, cond).float(), teacher(codes, cond.null()).float()
    return filtered_log_probs(null + cfg.cfg_coef * (given - null), cfg.temperature, cfg.top_k)


def distillation_loss(student_logits: Tensor, target_logps: Tensor) -> Tensor:
    """KL(target || student) in nats, a mean over codes: sum_v p(v) (log p(v) - log q(v)), 0 log 0 = 0. Both [B, K, T, V]."""
    p = target_logps.exp()
    q = student_logits.float().log_softmax(-1)
    return (p * (target_logps.masked_fill(p == 0, 0.0) - q)).sum(-1).mean()


def guided_samples(teacher: MusicLM, data: Data, cfg: Config, accelerator: Accelerator, tokens_sha256: str = "") -> tuple[Tensor, Tensor]:
    """The teacher's own codes [N, K, T] for captions of the train split, and the rows whose captions they follow; kept for a call with the
    same teacher, tokens and settings."""
    how = (cfg.cfg_coef, cfg.temperature, cfg.top_k, cfg.clips, cfg.seed, accelerator.num_processes)
    made_by = hashlib.sha256(repr((teacher.sha256(), tokens_sha256, how)).encode()).hexdigest()[:12]
    path = cfg.out / f"guided-{made_by}-{accelerator.process_index}.safetensors"
    if path.is_file():
        tensors = load_tensors(path)
        return tensors["codes"], tensors["rows"]
    share = math.ceil(cfg.clips / accelerator.num_processes)
    source = torch.Generator().manual_seed(cfg.seed * 7919 + accelerator.process_index)
    rows = torch.randint(len(data.codes), (share,), generator=source)
    parts = []
    for part in tqdm(rows.split(cfg.sample_batch), desc="guided samples", unit="batch", disable=not accelerator.is_main_process):
        cond = caption_of(data, part).to(accelerator.device)
        seeds = [int(s) for s in torch.randint(2**62, (len(part),), generator=source)]
        made = generate(
            teacher, cond, data.codes.shape[-1], seeds=seeds, temperature=cfg.temperature, top_k=cfg.top_k, cfg_coef=cfg.cfg_coef
        )
        parts.append(made.codes.to(torch.int16).cpu())
    codes = torch.cat(parts)
    save_tensors(path, {"codes": codes, "rows": rows})
    return codes, rows


def caption_of(data: Data, rows: Tensor) -> Conditions:
    """One fixed caption a row (chosen by the row's number), its tempo where the caption states it or the row is even."""
    chosen = [data.captions[r][(r * 7) % len(data.captions[r])] for r in rows.tolist()]
    text, mask = data.bank.batch(chosen)
    return Conditions(text, mask, data.tempo_of(rows, chosen, rows % 2 == 0))


def main(cfg: Config) -> float:
    accelerator = open_accelerator(mps=True, mixed_precision=cfg.dtype)
    device = accelerator.device
    set_seed(cfg.seed)

    # 1. Teacher, student, and what they read.
    teacher = load_lm(cfg.lm).to(device).requires_grad_(False)
    teacher.fast_training()
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    disable_functional_dropout(student)
    encoder = load_text_encoder(teacher.config.text_encoder).to(device)
    corpus = load_tokens(cfg.tokens)
    if teacher.config.codec_sha256 and corpus.codec_sha256 != teacher.config.codec_sha256:
        got, expected = f"tokens of codec {corpus.codec_sha256[:12]}", f"codec {teacher.config.codec_sha256[:12]}, the teacher's"
        raise UserError(got, expected, "tokenise the corpus with that codec")
    data = load_data(corpus, encoder, cfg.cache)["train"]
    if accelerator.is_main_process:
        cfg.out.mkdir(parents=True, exist_ok=True)
        write_json(cfg.out / "config.json", to_mapping(cfg))
    accelerator.wait_for_everyone()

    # 2. The teacher plays.
    guided, guided_rows = guided_samples(teacher, data, cfg, accelerator, corpus.sha256)

    # 3. The student learns the teacher's distribution along these and along real codes.
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(student, optimizer)
    n_real = round(cfg.real * cfg.batch_size)
    began, recent = time.monotonic(), None
    bar = tqdm(total=cfg.steps, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    for step in range(cfg.steps):
        progress = step / cfg.steps
        if cfg.max_minutes is not None:
            progress = max(progress, agreed(time.monotonic() - began, accelerator) / (60 * cfg.max_minutes))
            if progress >= 1:
                break
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.51 + 0.49 * math.cos(math.pi * min(progress, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        source = torch.Generator().manual_seed((cfg.seed * 1_000_003 + step) * 1024 + accelerator.process_index)
        own = torch.randint(len(guided), (cfg.batch_size - n_real,), generator=source)
        real = torch.randint(len(data.codes), (n_real,), generator=source)
        codes = torch.cat([guided[own].long(), data.codes[real].long()]).to(device)
        cond = Conditions.cat([caption_of(data, guided_rows[own]), caption_of(data, real)]).to(device)
        with accelerator.autocast():
            target = guided_target(teacher, codes, cond, cfg)
            loss = distillation_loss(model(codes, cond), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
        bar.update()
        bar.set_postfix(kl=f"{recent:.4f}")
        if accelerator.is_main_process and (step % 20 == 0 or step == cfg.steps - 1):
            append_jsonl(cfg.out / "metrics.jsonl", {"step": step, "kl": loss.item(), "kl_recent": recent, "lr": lr})
    bar.close()

    # 4. The student is the new base.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student.save(cfg.out / "lm")
        print(f"{cfg.out / 'lm'}: KL to the guided teacher {recent:.4f} nats a code")
    accelerator.end_training()
    return float(recent or 0.0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(main, Config)
