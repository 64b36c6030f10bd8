"""A policy: the folder that holds everything from a prompt to a waveform, and the hash that adapters are bound to.

policy.json   lm/   codec/   contrastive/ (optional)   MODEL_CARD.md   figures.json
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base_models.checkpoint import read_json, write_json
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
    return hashlib.sha256(f"{lm.sha256()}|{codec.sha256()}".encode()).hexdigest()


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
    if made_with and made_with != codec.sha256():
        raise UserError(f"a codec other than {made_with[:12]}", "the codec of the training data", "restore the codec's folder")
    contrastive = load_contrastive(folder / "contrastive").to(device) if (folder / "contrastive").is_dir() else None
    text_encoder = load_text_encoder(content.get("text_encoder", "minilm")).to(device)
    lm.eval()
    return Policy(lm, codec, text_encoder, contrastive, folder, policy_sha256(lm, codec))


def save_policy(
    folder: str | Path, lm: MusicLM, codec: Codec, contrastive: AudioTextModel | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a policy's folder. `dtype` is that of the language model's file; it is read back as float32."""
    folder = Path(folder)
    lm.save(folder / "lm", dtype)
    codec.save(folder / "codec")
    if contrastive is not None:
        contrastive.save(folder / "contrastive")
    _write_policy_json(folder, lm, codec)


def assemble(lm_dir: Path, codec_dir: Path, contrastive_dir: Path | None, out: Path) -> Policy:
    """Put trained parts together as a policy: float16 files, the shared space without its copy of the codebooks.

    Raises UserError, before anything is written, when a part was trained with another codec.
    """
    lm, codec = load_lm(lm_dir), load_codec(codec_dir)
    contrastive = load_contrastive(contrastive_dir) if contrastive_dir else None
    sha256 = codec.sha256()
    for name, made_with in (("lm", lm.config.codec_sha256), ("contrastive", contrastive.config.codec_sha256 if contrastive else "")):
        if made_with and made_with != sha256:
            raise UserError(f"{name} of codec {made_with[:12]}", f"codec {sha256[:12]}", "train it on tokens of this codec")
    out.mkdir(parents=True, exist_ok=True)
    if codec_dir.resolve() != (out / "codec").resolve():
        shutil.copytree(codec_dir, out / "codec", dirs_exist_ok=True)
    if contrastive is not None:
        contrastive.save(out / "contrastive", torch.float16, codebooks=False)
    lm.save(out / "lm", torch.float16)
    _write_policy_json(out, lm, codec)
    return load_policy(out)


def _write_policy_json(folder: Path, lm: MusicLM, codec: Codec) -> None:
    content = {"text_encoder": lm.config.text_encoder, "frame_rate": codec.frame_rate, "pattern": lm.config.pattern}
    write_json(folder / "policy.json", content)


if __name__ == "__main__":
    import tyro

    def run(lm: Path, codec: Path, out: Path, contrastive: Path | None = None) -> None:
        """Put trained parts together as a policy and print its hash."""
        print(assemble(lm, codec, contrastive, out).sha256)

    tyro.cli(run)
