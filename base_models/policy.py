"""A policy: the folder that holds everything from a prompt to a waveform, and the hash that adapters are bound to.

policy.json   lm/   codec/   contrastive/ (optional)   MODEL_CARD.md   figures.json
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base_models.checkpoint import read_json, tensors_sha256, write_json
from base_models.codec import Codec, load_codec
from base_models.conditions import Conditions, encode_prompts
from base_models.contrastive import AudioTextModel, load_contrastive
from base_models.errors import UserError
from base_models.lm import MusicLM, load_lm
from base_models.text_encoder import TextEncoder, load_text_encoder

PRETRAINED = Path(__file__).parent / "pretrained"
"""The demo base that ships with Encore."""


@dataclass
class Policy:
    """A loaded generator stack. `sha256` covers the language model, the codec and the vocabulary's layout."""

    lm: MusicLM
    codec: Codec
    text_encoder: TextEncoder
    contrastive: AudioTextModel | None
    path: Path
    sha256: str

    def conditions(self, prompts: list[str], tempo_bpm: list[float | None] | None = None) -> Conditions:
        """Prompts -> conditions on the language model's device."""
        device = next(self.lm.parameters()).device
        return encode_prompts(prompts, self.text_encoder, tempo_bpm).to(device)

    def n_frames(self, duration_s: float) -> int:
        """The codec frames that cover a duration, at least one."""
        return max(1, round(duration_s * self.codec.frame_rate))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> wav [B, C, L]."""
        return self.codec.decode(codes)


def policy_sha256(lm: MusicLM, codec: Codec) -> str:
    """One hash over both networks; it changes with any weight, the pattern or the vocabulary."""
    return hashlib.sha256(f"{lm.sha256()}|{tensors_sha256(codec.state_dict())}".encode()).hexdigest()


def load_policy(folder: str | Path = PRETRAINED, device: str | torch.device = "cpu") -> Policy:
    """Load a policy's folder in eval mode; refuses a language model that was trained on another codec."""
    folder = Path(folder)
    if not (folder / "policy.json").is_file():
        raise UserError(f"{folder} without policy.json", "a policy's folder", f"give its path; the demo base is {PRETRAINED}")
    content = read_json(folder / "policy.json")
    lm = load_lm(folder / "lm").to(device)
    codec = load_codec(folder / "codec").to(device)
    if (lm.n_q, lm.card) != (codec.n_q, codec.card):
        raise UserError(
            f"a language model of {lm.n_q} x {lm.card} codes with a codec of {codec.n_q} x {codec.card}",
            "the same vocabulary in both",
            "put the codec that tokenised its training data into the folder",
        )
    made_with = lm.config.codec_sha256
    if made_with and made_with != tensors_sha256(codec.state_dict()):
        raise UserError(f"a codec other than {made_with[:12]}", "the codec of the training data", "restore the codec's folder")
    contrastive = load_contrastive(folder / "contrastive").to(device) if (folder / "contrastive").is_dir() else None
    text_encoder = load_text_encoder(content.get("text_encoder", "minilm")).to(device)
    lm.eval()
    return Policy(lm, codec, text_encoder, contrastive, folder, policy_sha256(lm, codec))


def save_policy(folder: str | Path, lm: MusicLM, codec: Codec, contrastive: AudioTextModel | None = None) -> None:
    """Write a policy's folder (language model in float32)."""
    folder = Path(folder)
    lm.save(folder / "lm")
    codec.save(folder / "codec")
    if contrastive is not None:
        contrastive.save(folder / "contrastive")
    write_json(
        folder / "policy.json",
        {"text_encoder": lm.config.text_encoder, "frame_rate": codec.frame_rate, "pattern": lm.config.pattern},
    )
