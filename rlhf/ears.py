"""Ears: what genre, mood and lead instrument is heard in a clip, with a slope to the codec's latents.

    codec latents [B, D, T] -> statistics over time of the latents and of the magnitudes that the codec is about to play, descriptors
    -> standardised [B, F] -> one linear head a kind -> softmax -> kind -> probabilities [B, n_classes]

The shared audio-text space knows what goes with a piano, which is more than the piano. Ears are fitted by rlhf/train_ears.py on
melodies whose mood, lead and genre are drawn apart (base_models.corpus.known), so that one cannot be heard for another.

A head is a multinomial logistic regression, calibrated by a temperature that is fitted on melodies it did not learn from (Guo et al.
2017, arXiv:1706.04599) and folded into its weights: an answer that is sure without reason is flat where it is right. A
convolutional net on the latents told melodies apart less well, and heard less of a genre that a policy had lost (docs/experiments.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.codec import Codec, MagnitudeCodec
from base_models.errors import UserError
from rlhf.reward_features import Heard, over_time

FOLDER = "ears"
"""Where a policy's folder keeps them; a policy may have none."""


class Base(Protocol):
    """What of a policy is needed here (base_models.policy.Policy has it)."""

    @property
    def codec(self) -> Codec: ...
    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class _Alone:
    """A codec without an audio-text space, which ears do not need."""

    codec: MagnitudeCodec
    contrastive: None = None


def sound_of_latents(codec: MagnitudeCodec, latents: Tensor) -> Tensor:
    """Latents [B, D, T] -> what a clip sounds like, whenever it does so [B, F]; with a gradient to the latents."""
    return sound_heard(Heard(_Alone(codec), [""] * len(latents), latents=latents))


def sound_heard(heard: Heard) -> Tensor:
    """The same of clips that other judges hear as well."""
    return heard.once("sound", lambda: torch.cat([over_time(heard.latents), heard.statistics, heard.described], dim=1).float())


@dataclass(frozen=True)
class Ears:
    """Heads by kind, on one set of standardised statistics. mean, scale [F]; weight[kind] [n_classes, F]; bias[kind] [n_classes]."""

    codec: MagnitudeCodec
    classes: Mapping[str, tuple[str, ...]]
    mean: Tensor
    scale: Tensor
    weight: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]

    def probabilities(self, latents: Tensor) -> dict[str, Tensor]:
        """latents [B, D, T] -> kind -> [B, n_classes], rows summing to one; with a gradient to the latents."""
        return self.probabilities_of(sound_of_latents(self.codec, latents))

    def probabilities_of(self, sound: Tensor) -> dict[str, Tensor]:
        """The same from `sound_of_latents` [B, F]."""
        return {kind: told.exp() for kind, told in self.log_probabilities_of(sound).items()}

    def log_probabilities_of(self, sound: Tensor) -> dict[str, Tensor]:
        """Their logarithms, nats: where an answer is surely wrong these still have a slope."""
        z = (sound - self.mean.to(sound)) / self.scale.to(sound)
        return {kind: (z @ self.weight[kind].to(z).T + self.bias[kind].to(z)).log_softmax(1) for kind in self.classes}

    def place(self, kind: str, name: str | None) -> int | None:
        """The column of a name, or None where these ears do not know it."""
        names = self.classes.get(kind, ())
        return names.index(name) if name in names else None

    def tensors(self) -> dict[str, Tensor]:
        heads = {f"weight.{kind}": tensor for kind, tensor in self.weight.items()} | {f"bias.{kind}": t for kind, t in self.bias.items()}
        return {"mean": self.mean, "scale": self.scale, **heads}

    def sha256(self) -> str:
        """A hash over all that an answer depends on: names and tensors, and the codec."""
        content = [json.dumps(self.classes, sort_keys=True), tensors_sha256(self.tensors()), self.codec.sha256()]
        return hashlib.sha256("|".join(content).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", {name: tensor.float().contiguous() for name, tensor in self.tensors().items()})
        config = {"model_type": "encore_ears", "classes": self.classes, "codec_sha256": self.codec.sha256()}
        write_json(folder / "config.json", config)


def load_ears(folder: str | Path, codec: Codec) -> Ears:
    """Loads what `Ears.save` wrote. Raises: UserError for another folder, or for ears that were fitted on another codec."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "encore_ears":
        raise UserError(f"model_type {config.get('model_type')!r} in {folder}", "encore_ears", "train them with rlhf/train_ears.py")
    if not isinstance(codec, MagnitudeCodec) or config["codec_sha256"] != codec.sha256():
        raise UserError(
            f"ears of codec {config['codec_sha256'][:12]} in {folder}, with codec {codec.sha256()[:12]}",
            "ears of this codec",
            "train them on it with rlhf/train_ears.py, or remove the folder",
        )
    tensors = load_tensors(folder / "model.safetensors")
    classes = {kind: tuple(names) for kind, names in config["classes"].items()}
    width = codec.config.latent_dim
    sound = sound_of_latents(codec, torch.zeros(1, width, 8, device=codec.codebooks.device)).shape[1]
    wanted: dict[str, tuple[int, ...]] = {"mean": (sound,), "scale": (sound,)}
    for kind, names in classes.items():
        wanted |= {f"weight.{kind}": (len(names), sound), f"bias.{kind}": (len(names),)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise UserError(
            f"{folder / 'model.safetensors'} with other tensors than config.json and {sound} statistics ask for",
            "ears of this version",
            "train them again with rlhf/train_ears.py",
        )
    weight, bias = ({kind: tensors[f"{part}.{kind}"] for kind in classes} for part in ("weight", "bias"))
    return Ears(codec, classes, tensors["mean"], tensors["scale"], weight, bias)


def ears_of(base: Base) -> Ears | None:
    """The ears in a policy's folder, or None where it has none."""
    folder = base.path / FOLDER
    return load_ears(folder, base.codec) if folder.is_dir() else None
