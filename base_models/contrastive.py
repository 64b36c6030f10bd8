"""Codes and prompts in one space: the embedding that rewards, clusters and metrics share.

    codes [B, K, T] -> codec latents [B, D, T] -> ConvNeXt -> mean and deviation over time = features [B, F] -> linear -> [B, E]
    prompts -> frozen text encoder, pooled -> two-layer projection -> [B, E]

Both ends have unit length, so a dot product is a cosine. The model carries a copy of the codec's codebooks and needs no codec.

Papers: CLIP (Radford et al. 2021, arXiv:2103.00020); MuLan (Huang et al. 2022, arXiv:2208.12415) and CLAP (Wu et al. 2023,
arXiv:2211.06687) for music; identical captions count as right answers (supervised contrastive, Khosla et al. 2020, arXiv:2004.11362).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.codec import ConvNeXtBlock, check_codes, load_codec
from base_models.errors import UserError
from base_models.text_encoder import TextEncoder, load_text_encoder


@dataclass(frozen=True)
class ContrastiveConfig:
    """The shape of an `AudioTextModel` and the codec it hears through."""

    n_q: int = 4
    card: int = 1024
    latent_dim: int = 96
    width: int = 160
    blocks: int = 4
    embed_dim: int = 128
    text_encoder: str = "minilm"
    text_dim: int = 384
    codec_sha256: str = ""


class AudioTextModel(nn.Module):
    """Two towers; `features` is the audio tower before its projection."""

    def __init__(self, config: ContrastiveConfig, text_encoder: TextEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self._text_encoder = [text_encoder] if text_encoder is not None else []  # in a list: frozen, no part of our state
        self.codebooks: Tensor
        self.latent_scale: Tensor
        self.register_buffer("codebooks", torch.zeros(config.n_q, config.card, config.latent_dim))
        self.register_buffer("latent_scale", torch.ones(()))
        width = config.width
        self.stem = nn.Conv1d(config.latent_dim, width, 5, stride=2, padding=2)
        half = config.blocks // 2
        self.early = nn.Sequential(*[ConvNeXtBlock(width, 3, 7) for _ in range(half)])
        self.halve = nn.Conv1d(width, width, 2, stride=2)
        self.late = nn.Sequential(*[ConvNeXtBlock(width, 3, 7) for _ in range(config.blocks - half)])
        self.norm = nn.LayerNorm(width)
        self.audio_projection = nn.Linear(2 * width, config.embed_dim)
        self.text_projection = nn.Sequential(nn.Linear(config.text_dim, 256), nn.GELU(), nn.Linear(256, config.embed_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def feature_dim(self) -> int:
        return 2 * self.config.width

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen encoder, loaded when a prompt first needs it."""
        if not self._text_encoder:
            device = self.codebooks.device
            self._text_encoder.append(load_text_encoder(self.config.text_encoder).to(device))
        return self._text_encoder[0]

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Takes over a codec's codebooks [K, V, D], whose first one sets the scale of the latents."""
        self.codebooks.copy_(codebooks)
        self.latent_scale.copy_(codebooks[0].std().clamp_min(1e-6))

    def features(self, codes: Tensor) -> Tensor:
        """codes [B, K, T >= 4] -> mean and standard deviation over time of the audio tower's states [B, F]."""
        check_codes(codes, self.config.n_q, self.config.card)
        codes = codes.to(self.codebooks.device)
        latents = torch.stack([F.embedding(codes[:, k], self.codebooks[k]) for k in range(self.config.n_q)]).sum(0)
        return self.features_of_latents(latents.transpose(1, 2))

    def features_of_latents(self, latents: Tensor) -> Tensor:
        """The same from the codec's latents [B, D, T >= 4], the sum of the codes' vectors; with a gradient to them."""
        if latents.shape[2] < 4:
            raise UserError(f"{latents.shape[2]} frames", "at least 4", "embed a longer clip")
        x = self.stem(latents / self.latent_scale).transpose(1, 2)
        x = self.halve(self.early(x).transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.late(x)).float()
        return torch.cat([x.mean(1), (x.var(1, unbiased=False) + 1e-5).sqrt()], -1)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> unit vectors [B, E]."""
        return F.normalize(self.audio_projection(self.features(codes)).float(), dim=-1)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """The codec's latents [B, D, T] -> unit vectors [B, E], with a gradient to them."""
        return F.normalize(self.audio_projection(self.features_of_latents(latents)).float(), dim=-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [B, E]."""
        return self.embed_pooled(self.text_encoder.pooled(list(prompts)))

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Pooled text states [B, text_dim] -> unit vectors [B, E]."""
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def forward(self, codes: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training route: unit audio [B, E], unit text [B, E], scale []."""
        return self.embed_codes(codes), self.embed_pooled(pooled), self.log_scale.exp().clamp(max=100)

    def sha256(self) -> str:
        """A hash over all tensors."""
        return tensors_sha256(self.state_dict())

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32, codebooks: bool = True) -> None:
        """Writes config.json and model.safetensors; float16 halves the file, and loading returns float32.

        Without `codebooks` the file is a third smaller, and loading takes them from the codec in the folder `codec` beside it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: t.to(dtype) for name, t in self.state_dict().items() if codebooks or name != "codebooks"}
        save_tensors(folder / "model.safetensors", kept)
        write_json(folder / "config.json", {"model_type": "encore_audio_text", **dataclasses.asdict(self.config)})


def load_contrastive(folder: str | Path) -> AudioTextModel:
    """Loads what `AudioTextModel.save` wrote, in eval mode and float32. Raises: UserError for another folder."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = config.pop("model_type", None)
    if kind != "encore_audio_text":
        raise UserError(f"model_type {kind!r} in {folder}", "encore_audio_text", "train one with base_models/train_contrastive.py")
    model = AudioTextModel(ContrastiveConfig(**config))
    tensors = {name: tensor.float() for name, tensor in load_tensors(folder / "model.safetensors").items()}
    if "codebooks" not in tensors:
        tensors["codebooks"] = _codebooks_beside(folder, model.config.codec_sha256)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder / 'model.safetensors'} with other tensors than config.json says",
            "both from the same run",
            "train it again",
        ) from error
    return model.eval()


def _codebooks_beside(folder: Path, codec_sha256: str) -> Tensor:
    """Codebooks of the codec that stands beside a model which was saved without them; another codec is refused."""
    codec = load_codec(folder.parent / "codec")
    found = codec.sha256()
    if found != codec_sha256:
        raise UserError(f"codec {found[:12]} beside {folder}", f"codec {codec_sha256[:12]}", "restore the codec it was trained with")
    return codec.codebooks


def contrastive_loss(audio: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE: cross entropy of scale * audio @ text.T against the right answers, from both sides, averaged.

    Args: audio, text: unit [B, E]. scale: inverse temperature []. same: [B, B] True where caption j also is right for clip i; a
    row's right answers share its probability. Returns: loss [].
    """
    B = len(audio)
    assert audio.shape == text.shape
    assert same.shape == (B, B)
    logits = scale * audio @ text.T
    target = same.float()
    by_clip = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    by_text = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
    return (by_clip.mean() + by_text.mean()) / 2


def recall_at(similarity: Tensor, right: Tensor, k: int = 10) -> tuple[float, float]:
    """Text-to-audio recall: the share of queries with a right clip among the first k, and what random order would reach.

    Args: similarity, right: [queries, clips]; right is True where the clip answers the query. A tie at the border counts with the
    probability that a random order of the tied clips brings a right one in. Returns: recall, chance.
    """
    Q, N = similarity.shape
    k = min(k, N)
    hits = chances = 0.0
    for scores, answers in zip(similarity.double(), right):
        border = scores.topk(k).values[-1]
        above, tied = scores > border, scores == border
        free = k - int(above.sum())
        miss = _miss_probability(int(tied.sum()), int((tied & answers).sum()), free)
        hits += 1.0 if bool((above & answers).any()) else 1 - miss
        chances += 1 - _miss_probability(N, int(answers.sum()), k)
    return hits / Q, chances / Q


def _miss_probability(n: int, n_right: int, draws: int) -> float:
    """The probability that `draws` of n without replacement hold none of the n_right."""
    return math.comb(n - n_right, draws) / math.comb(n, draws)
