"""Trains ears of genre, mood and lead instrument on clips of which everything is known.

    python rlhf/train_ears.py --out runs/ears                        # about ten minutes of one core, nearly all of it rendering
    python rlhf/train_ears.py --preset smoke --out /tmp/ears         # < 1 minute

    real melodies, mood, lead and genre drawn apart -> rendered -> codes [B, K, T] -> what they sound like [B, F] (rlhf/ears.py)
    -> a logistic regression a kind; penalty and temperature by melodies of `val` -> accuracy on melodies of `test`

Copied as `ears` into a policy's folder, rlhf/consistency.py asks them whether a clip is what its prompt names. No rater is heard here,
and no clip that a policy played. A run that was stopped goes on by itself: what is rendered stays in --known.

Papers: calibration by temperature, Guo et al. 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from base_models import settings
from base_models.atomic import atomic_file
from base_models.checkpoint import write_json
from base_models.codec import MagnitudeCodec, load_codec
from base_models.corpus.known import LEADS, MORE_LEADS, Player, lead_name
from base_models.corpus.styles import GENRES, MOODS
from base_models.errors import UserError
from base_models.launch import check_sharding
from base_models.policy import PRETRAINED
from rlhf.ears import Ears, sound_of_latents

NAMED_LEADS = {**LEADS, **MORE_LEADS}
CLASSES: dict[str, tuple[str, ...]] = {"genre": GENRES, "mood": tuple(MOODS), "instrument": tuple(NAMED_LEADS)}
CHUNK = 100
"""Clips a file of the cache."""
BUCKETS = ("train", "val", "test")
"""Melodies to fit on, to choose penalty and temperature by, and to be told by."""


@dataclass(frozen=True)
class Config:
    """What a run may vary."""

    out: Path = Path("runs/ears")
    """Run folder: config.json, figures.json, ears/."""
    codec: Path = PRETRAINED / "codec"
    """The codec they are to hear through."""
    known: Path = Path(".cache/ears")
    """Where rendered clips are kept from run to run."""
    clips: int = 2700
    """Clips to learn from, of melodies in `train`."""
    test_clips: int = 400
    """Clips of melodies in `val`, by which penalty and temperature are chosen, and as many of `test`, to be told."""
    usual: float = 0.3
    """Share of clips whose band keeps its own lead, as in the corpus; in the others any lead plays in any genre."""
    n_frames: int = 100
    """Codec frames of a clip."""
    penalties: tuple[float, ...] = (0.02, 0.06)
    """Inverse L2 penalties that are tried for each kind."""
    seed: int = 0
    """Seed of the clips."""


SMOKE: dict[str, Any] = {"clips": 60, "test_clips": 12, "n_frames": 40, "known": Path(".cache/ears-smoke"), "penalties": (0.03,)}
PRESETS = {"smoke": SMOKE}


@dataclass(frozen=True)
class Clips:
    """codes [N, K, T]; labels: kind -> [N], -1 where it has no name; usual [N]: whether the band kept its own lead."""

    codes: Tensor
    labels: dict[str, Tensor]
    usual: Tensor


# ---- clips -----------------------------------------------------------------------------------------------------------


def known_clips(cfg: Config, codec: MagnitudeCodec, n: int, bucket: str) -> Clips:
    """n clips of the melodies in a bucket, from the cache where they were rendered before."""
    folder = cfg.known / f"{codec.sha256()[:12]}-{bucket}-{cfg.n_frames}-{cfg.usual:g}-{drawn_from(cfg, bucket)}"
    folder.mkdir(parents=True, exist_ok=True)
    player, parts = None, []
    for start in tqdm(range(0, n, CHUNK), desc=f"clips ({bucket})", unit=f"{CHUNK} clips"):
        size = min(CHUNK, n - start)
        path = folder / f"{start:06d}-{size}.npz"
        if not path.is_file():
            player = player or Player(codec.sample_rate, cfg.n_frames / codec.frame_rate, (bucket,))
            played = [clip(cfg, codec, player, drawn_from(cfg, bucket), index) for index in range(start, start + size)]
            codes, facts = np.stack([c for c, _ in played]).astype(np.int16), [f for _, f in played]
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, codes=codes, facts=np.array(json.dumps(facts)))
        with np.load(path, allow_pickle=False) as data:
            parts.append((data["codes"].astype(np.int64), json.loads(str(data["facts"]))))
    rows = [row for _, facts in parts for row in facts]
    named = {
        "genre": [row["genre"] for row in rows],
        "mood": [row["mood"] for row in rows],
        "instrument": [lead_name(row["program"], NAMED_LEADS) for row in rows],
    }
    labels = {kind: torch.tensor([names.index(name) if name in names else -1 for name in named[kind]]) for kind, names in CLASSES.items()}
    usual = torch.tensor([bool(row["usual"]) for row in rows])
    return Clips(torch.from_numpy(np.concatenate([codes for codes, _ in parts])), labels, usual)


def drawn_from(cfg: Config, bucket: str) -> int:
    """The seed of a bucket's clips. Each bucket has its own: by one for all, a clip to be told would have a twin among those that
    are fitted on, with its band, mood, lead, tempo and key, and with another melody alone."""
    return 3 * cfg.seed + BUCKETS.index(bucket)


def clip(cfg: Config, codec: MagnitudeCodec, player: Player, seed: int, index: int) -> tuple[np.ndarray, dict[str, object]]:
    """The index-th clip: codes [K, T] and facts. Leads that a single word asks for are drawn twice as often."""
    rng = np.random.default_rng([seed, index])
    mood, usual = str(rng.choice(list(MOODS))), bool(rng.random() < cfg.usual)
    shares = np.array([2.0 if name in LEADS else 1.0 for name in NAMED_LEADS])
    name = list(NAMED_LEADS)[int(rng.choice(len(NAMED_LEADS), p=shares / shares.sum()))]
    wav, facts = player.play(mood, None if usual else int(rng.choice(NAMED_LEADS[name])), rng)
    codes = codec.encode(torch.from_numpy(wav)[None, None])[0, :, : cfg.n_frames]
    return codes.numpy(), {"mood": mood, "genre": facts.genre, "program": facts.program, "usual": usual}


@torch.no_grad()
def sounds(codec: MagnitudeCodec, codes: Tensor) -> Tensor:
    """What clips sound like [N, F]."""
    parts = codes.split(32)
    return torch.cat([sound_of_latents(codec, codec.latents(part)) for part in tqdm(parts, desc="listening", unit="32 clips")])


# ---- fitting ---------------------------------------------------------------------------------------------------------


def fit_head(train: Tensor, labels: Tensor, n_classes: int, C: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with the inverse L2 penalty C on z [N, F] -> weight [n_classes, F], bias [n_classes]; a name that
    is not met is never heard."""
    there = labels >= 0
    model = LogisticRegression(C=C, max_iter=2000).fit(train[there].numpy(), labels[there].numpy())
    if len(model.classes_) < 3:
        raise UserError(f"clips of {len(model.classes_)} names", "at least 3", "render more --clips")
    weight, bias = torch.zeros(n_classes, train.shape[1]), torch.full((n_classes,), -20.0)
    weight[model.classes_] = torch.from_numpy(model.coef_).float()
    bias[model.classes_] = torch.from_numpy(model.intercept_).float()
    return weight, bias


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The t in [1, 4] by which softmax(logits [N, C] / t) gives labels [N] the least cross entropy, on a grid of 1 %.

    Never below 1: that would sharpen answers which the penalty keeps soft, on clips that are cleaner than those a policy plays, until
    those that are right have no slope.
    """
    there = labels >= 0
    grid = torch.logspace(0, 2, 140, base=2).tolist()
    return min(grid, key=lambda t: float(F.cross_entropy(logits[there] / t, labels[there])))


def fit(codec: MagnitudeCodec, cfg: Config, train: Clips, val: Clips) -> tuple[Ears, dict[str, dict[str, float]]]:
    """Ears, and for each kind the penalty and the temperature that melodies of `val` chose."""
    heard, unmet = sounds(codec, train.codes), sounds(codec, val.codes)
    mean, scale = heard.mean(0), heard.std(0, correction=0).clamp_min(1e-4)
    heard, unmet = (heard - mean) / scale, (unmet - mean) / scale
    weights, biases, chosen = {}, {}, {}
    for kind, names in CLASSES.items():
        tried = []
        for C in tqdm(cfg.penalties, desc=f"fitting {kind}", unit="penalty"):
            weight, bias = fit_head(heard, train.labels[kind], len(names), C)
            logits, labels = unmet @ weight.T + bias, val.labels[kind]
            t = fit_temperature(logits, labels)
            loss = float(F.cross_entropy(logits[labels >= 0] / t, labels[labels >= 0]))
            tried.append((loss, C, t, weight / t, bias / t))
        loss, C, t, weights[kind], biases[kind] = min(tried, key=lambda entry: entry[0])
        chosen[kind] = {"C": C, "temperature": t, "val_nats": loss}
    return Ears(codec, CLASSES, mean, scale, weights, biases), chosen


def accuracy(ears: Ears, clips: Clips) -> dict[str, dict[str, float]]:
    """Kind -> share of clips that are rightly named, of any lead in any genre (`apart`) and as the corpus plays (`usual`), and the mean
    probability of what they are; clips without a name are left out."""
    told: dict[str, dict[str, float]] = {}
    heard = ears.probabilities_of(sounds(ears.codec, clips.codes))
    for kind, names in clips.labels.items():
        right = (heard[kind].argmax(1) == names).float()
        sure = heard[kind].gather(1, names.clamp_min(0)[:, None])[:, 0]
        told[kind] = {}
        for title, rows in (("apart", (names >= 0) & ~clips.usual), ("usual", (names >= 0) & clips.usual)):
            told[kind][f"n_{title}"] = int(rows.sum())
            if bool(rows.any()):
                told[kind] |= {title: float(right[rows].mean()), f"probability_{title}": float(sure[rows].mean())}
    return told


def main(cfg: Config) -> dict[str, object]:
    """Trains, writes `<out>/ears` and `<out>/figures.json`, and returns the figures."""
    check_sharding()
    # 1. Clips: three sets of melodies that never meet.
    codec = load_codec(cfg.codec)
    if not isinstance(codec, MagnitudeCodec):
        raise UserError(f"{cfg.codec}, another kind of codec", "a codec of base_models/train_codec.py", "ears need the magnitudes it plays")
    train, val, test = (
        known_clips(cfg, codec, n, bucket) for n, bucket in zip((cfg.clips, cfg.test_clips, cfg.test_clips), BUCKETS, strict=True)
    )
    # 2. Fit.
    ears, chosen = fit(codec, cfg, train, val)
    # 3. Tell what they hear of melodies of `test`.
    figures: dict[str, object] = {"heard": accuracy(ears, test), "chosen": chosen, "sha256": ears.sha256()}
    cfg.out.mkdir(parents=True, exist_ok=True)
    ears.save(cfg.out / "ears")
    write_json(cfg.out / "config.json", settings.to_mapping(cfg))
    write_json(cfg.out / "figures.json", figures)
    return figures


if __name__ == "__main__":
    settings.run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2))
