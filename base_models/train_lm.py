"""Train the token language model on a tokenised corpus.

    accelerate launch base_models/train_lm.py --tokens .cache/codes/NAME --out runs/lm --max-minutes 60
    accelerate launch base_models/train_lm.py --preset smoke --out runs/lm_smoke
    accelerate launch --config_file configs/accelerate/fsdp2.yaml base_models/train_lm.py ...      # weights in shards

    captions -> frozen text encoder -> Conditions;  codes [B, K, T] -> delay -> logits [B, K, T, V] -> cross-entropy

Every process draws its rows from (seed, step, rank), so a run that was killed and resumed sees the same batches. Conditions are
dropped at random, so that the model can be guided. It deliberately does not train the codec or the text encoder.

Papers: Copet et al. 2023 (arXiv:2306.05284, the model), Ho and Salimans 2022 (arXiv:2207.12598, dropped conditions).
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
from typing import Literal

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from base_models.audio import write_audio
from base_models.caption_bank import CaptionBank, build_caption_bank
from base_models.checkpoint import (
    append_jsonl,
    latest_training_state,
    load_training_state,
    refuse_another_run,
    save_training_state,
    write_json,
)
from base_models.codec import Codec, load_codec
from base_models.conditions import Conditions, encode_prompts, parse_tempo
from base_models.corpus.tokens import TokenisedCorpus, codec_of, load_tokens, synthetic_tokens
from base_models.errors import UserError
from base_models.launch import WHOLE, agreed, check_sharding, open_accelerator
from base_models.lm import MusicLM, MusicLMConfig
from base_models.sampling import generate
from base_models.settings import run, to_mapping
from base_models.sharding import free, local, shard, share_held, spread_moments, whole, whole_copy
from base_models.text_encoder import TextEncoder, load_text_encoder

logger = logging.getLogger(__name__)
SAMPLE_PROMPTS = (
    "happy jazz with piano and upright bass, 140 BPM",
    "fast techno, 130 BPM",
    "sad slow piano, ambient",
    "rock, guitar",
)


@dataclass(frozen=True)
class Config:
    tokens: Path | None = None
    """Folder of a tokenised corpus (base_models/corpus/tokens.py); none: a tiny synthetic one."""
    out: Path = Path("runs/lm")
    """Run folder: config.json, metrics.jsonl, checkpoints/, lm/."""
    d_model: int = 256
    """Width of the decoder."""
    n_layers: int = 7
    """Decoder layers."""
    n_heads: int = 4
    """Attention heads."""
    d_ff: int = 1024
    """Width of the feed-forward layers."""
    dropout: float = 0.1
    """Dropout in the decoder while training."""
    beat_clock: bool = False
    """Tell every step its place in the beat where the tempo is known. For corpora whose clips begin on a bar, as the demo's do."""
    steps: int = 12000
    """Updates of the weights; the learning rate falls along a cosine to a fiftieth by then."""
    max_minutes: float | None = None
    """Stop (and finish the cosine) after so many minutes of training, if that comes before `steps`."""
    batch_size: int = 16
    """Clips a process and a micro-batch."""
    grad_accumulation: int = 1
    """Micro-batches an update."""
    lr: float = 1e-3
    """Peak learning rate (AdamW, betas .9 and .95)."""
    warmup: int = 200
    """Updates of linear warm-up."""
    weight_decay: float = 0.05
    """Decay of the matrices."""
    max_norm: float = 1.0
    """Gradient clipping."""
    drop_conditions: float = 0.12
    """Probability that a row is trained unconditionally."""
    tempo_given: float = 0.4
    """Probability that the tempo is told when the caption does not state it."""
    ema: float = 0.999
    """Decay of the averaged weights, which are what is evaluated and saved."""
    dtype: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward and backward pass; in shards (fsdp2.yaml) no fp16."""
    eval_every: int = 500
    """Updates between evaluations on the val split."""
    save_every: int = 500
    """Updates between checkpoints."""
    sample_every: int = 0
    """Updates between sample clips (0: none); needs --codec."""
    codec: Path | None = None
    """Codec folder that decodes the sample clips."""
    text_encoder: str = "minilm"
    """Frozen text encoder: minilm, a folder or a hub name."""
    cache: Path = Path(".cache/captions")
    """Where encoded captions are kept."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; with as many processes as you like, sharded or not."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    tensorboard: bool = True
    """Write TensorBoard event files into `out`."""
    seed: int = 0
    """Seed of weights, batches and dropout."""


PRESETS = {
    "smoke": {
        "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "steps": 30, "batch_size": 4, "warmup": 5, "lr": 3e-3,
        "eval_every": 15, "save_every": 10, "ema": 0.9, "beat_clock": True, "out": Path("runs/lm_smoke"),
    }
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Codes [N, K, T] with each clip's captions (rows of the bank) and tempo."""

    codes: Tensor
    captions: list[list[int]]
    stated: list[float]
    """BPM that each caption of the bank states; NaN where it states none."""
    tempo_bpm: Tensor
    bank: CaptionBank

    def batch(self, rows: Tensor, generator: torch.Generator, cfg: Config | None) -> tuple[Tensor, Conditions]:
        """Codes and conditions of some rows, a random caption each; with a config, conditions are dropped as it says."""
        pick = torch.rand(len(rows), generator=generator)
        chosen = [self.captions[r][int(p * len(self.captions[r]))] for r, p in zip(rows.tolist(), pick.tolist())]
        text, mask = self.bank.batch(chosen)
        told = torch.zeros(len(rows), dtype=torch.bool)
        if cfg is not None:
            told = torch.rand(len(rows), generator=generator) < cfg.tempo_given
        cond = Conditions(text, mask, self.tempo_of(rows, chosen, told))
        if cfg is not None:
            cond = cond.drop(torch.rand(len(rows), generator=generator) < cfg.drop_conditions)
        return self.codes[rows].long(), cond

    def tempo_of(self, rows: Tensor, captions: list[int], told: Tensor) -> Tensor:
        """[B] BPM: the row's where its caption states one or it is told all the same, the caption's own where the row has none (as prompts
        are read); else NaN."""
        stated, own = torch.tensor([self.stated[c] for c in captions]), self.tempo_bpm[rows]
        return torch.where(told | ~stated.isnan(), torch.where(own.isnan(), stated, own), torch.full_like(own, float("nan")))


def load_data(corpus: TokenisedCorpus, encoder: TextEncoder, cache: Path) -> dict[str, Data]:
    """The train and val splits; all captions share one bank."""
    texts: dict[str, int] = {}
    for row in corpus.rows:
        for caption in row["captions"]:
            texts.setdefault(caption, len(texts))
    bank = build_caption_bank(list(texts), encoder, cache)
    stated = [math.nan if (bpm := parse_tempo(text)) is None else bpm for text in texts]
    splits = {}
    for split in ("train", "val"):
        rows = [i for i, row in enumerate(corpus.rows) if row["split"] == split]
        if not rows:
            raise UserError(f"tokens without a {split} split", "rows of both train and val", "tokenise a corpus with both splits")
        tempo = torch.tensor([float(corpus.rows[i].get("tempo_bpm") or "nan") for i in rows])
        captions = [[texts[c] for c in corpus.rows[i]["captions"]] for i in rows]
        splits[split] = Data(torch.as_tensor(corpus.codes)[rows], captions, stated, tempo, bank)
    return splits


def nll(model: nn.Module, codes: Tensor, cond: Conditions) -> Tensor:
    """Cross-entropy of each codebook, [K], nats a code."""
    logits = model(codes, cond)
    losses = [F.cross_entropy(logits[:, k].reshape(-1, logits.shape[-1]).float(), codes[:, k].reshape(-1)) for k in range(codes.shape[1])]
    return torch.stack(losses)


@torch.no_grad()
def evaluate(lm: MusicLM, data: Data, device: torch.device, batch_size: int = 32, limit: int = 256) -> Tensor:
    """Bits per code of each codebook, [K], on the first `limit` rows with a fixed choice of captions."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(min(limit, len(data.codes)))
    total = torch.zeros(lm.n_q)
    for part in rows.split(batch_size):
        codes, cond = data.batch(part, generator, None)
        total += nll(lm, codes.to(device), cond.to(device)).cpu() * len(part)
    return total / len(rows) / math.log(2)


def learning_rate(cfg: Config, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak at progress 1."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.02 + 0.98 * cosine)


def main(cfg: Config) -> dict[str, float]:
    sharded = check_sharding(("fsdp",)) != "no"
    if sharded and cfg.dtype == "fp16":  # accelerate scales the loss, and unscales in optimisers that it has prepared, none of shards
        got = "--dtype fp16 with a launch configuration of fsdp"
        raise UserError(got, "a precision whose gradients need no scaling", f"pass --dtype bf16, or launch with {WHOLE}")
    accelerator = open_accelerator(
        cfg.processes, ("fsdp",), mps=True, mixed_precision=cfg.dtype, gradient_accumulation_steps=cfg.grad_accumulation
    )
    device, world = accelerator.device, accelerator.num_processes
    set_seed(cfg.seed)

    # 1. Data: codes and encoded captions.
    corpus = load_tokens(cfg.tokens) if cfg.tokens else synthetic_tokens()
    codec = codec_to_hear_by(cfg, corpus)
    encoder = load_text_encoder(cfg.text_encoder).to(device)
    with accelerator.main_process_first():
        data = load_data(corpus, encoder, cfg.cache)

    # 2. Model, averaged model, optimiser.
    n_q = int(data["train"].codes.shape[1])
    shape = MusicLMConfig(
        n_q=n_q, card=corpus.card, d_model=cfg.d_model, n_layers=cfg.n_layers, n_heads=cfg.n_heads, d_ff=cfg.d_ff,
        text_dim=encoder.dim, dropout=cfg.dropout, codec_sha256=corpus.codec_sha256, text_encoder=cfg.text_encoder,
        beat_clock=cfg.beat_clock, frame_rate=corpus.frame_rate,
    )  # fmt: skip
    lm, averaged = MusicLM(shape), MusicLM(shape).eval()
    averaged.load_state_dict(lm.state_dict())
    refuse_another_run(cfg.out, cfg.resume)
    parents = {"tokens_sha256": corpus.sha256, "codec_sha256": corpus.codec_sha256, "text_encoder": cfg.text_encoder}
    checkpoint = latest_training_state(cfg.out, parents)
    step, elapsed, moments = 0, 0.0, None
    if checkpoint is not None:
        step, tensors, states, extra = load_training_state(checkpoint)
        try:
            lm.load_state_dict(tensors["lm"])
            averaged.load_state_dict(tensors["averaged"])
        except RuntimeError as error:
            raise UserError(
                f"a run of another shape in {cfg.out}", "its own settings", "resume with them, or choose another --out"
            ) from error
        moments, elapsed = states["optimizer"], float(extra["elapsed_s"])
        logger.info("resumed %s at step %d", cfg.out, step)
    for network in (lm, averaged):
        shard(network) if sharded else network.to(device)
    lm.fast_training()
    decay = [p for p in lm.parameters() if p.dim() > 1]
    groups = [
        {"params": decay, "weight_decay": cfg.weight_decay},
        {"params": [p for p in lm.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    if moments is not None:
        optimizer.load_state_dict(moments)
        spread_moments(optimizer)
    model: nn.Module = lm
    if not sharded:
        model, optimizer = accelerator.prepare(lm, optimizer)
    if accelerator.is_main_process:
        cfg.out.mkdir(parents=True, exist_ok=True)
        write_json(
            cfg.out / "config.json", {**to_mapping(cfg), "tokens_sha256": corpus.sha256, "world_size": world, "share_held": share_held(lm)}
        )
    board = _tensorboard(cfg) if accelerator.is_main_process and cfg.tensorboard else None

    # 3. Train.
    metrics: dict[str, float] = {}
    reported = -1
    bar = tqdm(total=cfg.steps, initial=step, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    began, recent = time.monotonic() - elapsed, None
    while step < cfg.steps:
        elapsed = time.monotonic() - began
        progress = step / cfg.steps
        if cfg.max_minutes is not None:
            progress = max(progress, agreed(elapsed, accelerator) / (60 * cfg.max_minutes))
            if progress >= 1:
                break
        lr = learning_rate(cfg, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((cfg.seed, step, accelerator.process_index)) % 2**63)  # dropout
        model.train()
        for micro in range(cfg.grad_accumulation):
            source = torch.Generator().manual_seed(((cfg.seed * 1_000_003 + step) * 64 + micro) * 1024 + accelerator.process_index)
            rows = torch.randint(len(data["train"].codes), (cfg.batch_size,), generator=source)
            codes, cond = data["train"].batch(rows, source, cfg)
            with accelerator.accumulate(model), accelerator.autocast():
                loss = nll(model, codes.to(device), cond.to(device))
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), cfg.max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            rate = min(cfg.ema, (1 + step) / (10 + step))
            for slow, fast in zip(averaged.parameters(), lm.parameters()):
                local(slow).lerp_(local(fast), 1 - rate)
        bits = loss.detach().mean().item() / math.log(2)
        recent = bits if recent is None else 0.98 * recent + 0.02 * bits
        bar.update()
        bar.set_postfix(bits=f"{recent:.3f}", lr=f"{lr:.1e}")

        # 4. Tell, and keep.
        last = step == cfg.steps
        if step % cfg.eval_every == 0 or last:
            metrics, reported = _report(accelerator, cfg, averaged, data["val"], board, step, recent, elapsed), step
        if step % cfg.save_every == 0 or last:
            groups_of = {"lm": whole(lm.state_dict()), "averaged": whole(averaged.state_dict())}
            states = {"optimizer": whole(optimizer.state_dict())}
            if accelerator.is_main_process:
                save_training_state(cfg.out, step, groups_of, states, {"elapsed_s": time.monotonic() - began, **parents})
        if cfg.sample_every and step % cfg.sample_every == 0:
            played = whole_copy(averaged) if sharded else averaged  # the sampler reads whole weights
            if accelerator.is_main_process:
                assert codec is not None
                _samples(cfg, played, codec, encoder, step)
        accelerator.wait_for_everyone()
    bar.close()

    # 5. The averaged weights are the model.
    if reported != step:
        metrics = _report(accelerator, cfg, averaged, data["val"], board, step, recent or 0.0, time.monotonic() - began)
    model_to_keep = whole_copy(averaged) if sharded else averaged
    if accelerator.is_main_process:
        model_to_keep.save(cfg.out / "lm")
        if board is not None:
            board.close()
        print(f"{cfg.out / 'lm'}: step {step}, val bits per code {metrics['val_bits']:.3f}")
    accelerator.end_training()
    return metrics


def _report(accelerator, cfg: Config, lm: MusicLM, data: Data, board, step: int, recent: float, elapsed: float) -> dict[str, float]:
    if not accelerator.is_main_process and share_held(lm) == 1:
        return {}
    with accelerator.autocast():
        bits = evaluate(lm, data, accelerator.device)
    free(lm)
    if not accelerator.is_main_process:
        return {}
    metrics = {f"val_bits_{k}": bits[k].item() for k in range(len(bits))}
    metrics |= {"val_bits": bits.mean().item(), "train_bits": recent, "elapsed_s": elapsed}
    append_jsonl(cfg.out / "metrics.jsonl", {"step": step, **metrics})
    if board is not None:
        for name, value in metrics.items():
            board.add_scalar(name, value, step)
    return metrics


def codec_to_hear_by(cfg: Config, corpus: TokenisedCorpus) -> Codec | None:
    """The codec that decodes samples; None where none are wanted. Raises: UserError without it, or for another than the tokens'."""
    if not cfg.sample_every:
        return None
    if cfg.codec is None:
        raise UserError("--sample-every without --codec", "the codec that decodes the samples", "add --codec DIR")
    return load_codec(cfg.codec) if cfg.tokens is None else codec_of(corpus, cfg.codec)


def _samples(cfg: Config, lm: MusicLM, codec: Codec, encoder: TextEncoder, step: int) -> None:
    """Decode a few guided samples, so that a run can be heard while it goes on."""
    cond = encode_prompts(SAMPLE_PROMPTS, encoder).to(next(lm.parameters()).device)
    codes = generate(lm, cond, 150, seeds=range(len(SAMPLE_PROMPTS)), cfg_coef=2.5, temperature=0.9, top_k=min(60, lm.config.card)).codes
    for i, wav in enumerate(codec.decode(codes)):
        write_audio(cfg.out / "samples" / f"{step:08d}_{i}.wav", wav.numpy(), codec.sample_rate)


def _tensorboard(cfg: Config):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(cfg.out / "tensorboard"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(main, Config, PRESETS)
