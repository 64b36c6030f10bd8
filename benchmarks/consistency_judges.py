"""Judges of mood and instrument that no reward has heard of: fitted on real melodies whose mood, lead and genre are drawn apart.

    clips of which everything is known (base_models.corpus.known) -> through the codec and back
    -> what it sounds like [F] (base_models.measures: timbre, movement, harmony), its mode, its pace -> logistic regression

The codec stands between, because that is how the clips sound that are judged later. Melodies that are fitted on and melodies that are told
accuracy of are kept apart, as in the corpus, and both from those that the reward's ears were fitted on (rlhf/train_ears.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from base_models.atomic import atomic_file
from base_models.codec import Codec
from base_models.corpus.known import CHOIR, LEADS, MORE_LEADS, OTHER, Player, lead_name
from base_models.corpus.styles import GENRES, MOODS
from base_models.errors import UserError
from base_models.measures import GenreProbe, chroma, estimate_tempo, probe_features
from rlhf.descriptors import MAJOR, MINOR

OTHERS = tuple(program for programs in MORE_LEADS.values() for program in programs)
"""Leads that no prompt of the benchmark asks for, and that are none of those it does."""
JUDGED_GENRES = tuple(genre for genre in GENRES if genre != CHOIR)
"""A choir sings all its voices itself: it has no lead that could be exchanged."""


@dataclass(frozen=True)
class Known:
    """A clip of which everything is known. codes [K, T]; features [F] of its sound after the codec."""

    mood: str
    lead: str
    genre: str
    tempo_bpm: float
    key: str
    codes: torch.Tensor
    features: np.ndarray


# ---- clips of which everything is known ------------------------------------------------------------------------------


def known_clips(codec: Codec, n: int, bucket: Sequence[str], n_frames: int, seed: int, swap: bool = True) -> list[Known]:
    """n clips, each of a mood and a lead by chance. swap: any lead in any genre; without it bands play as they do in the corpus."""
    if n < 1:
        raise UserError(f"{n} clips", "at least 1", "ask for more")
    player = Player(codec.sample_rate, n_frames / codec.frame_rate, bucket, JUDGED_GENRES)
    return list(tqdm(_known(codec, player, n, n_frames, seed, swap), total=n, desc=f"known clips ({', '.join(bucket)})", unit="clip"))


def _known(codec: Codec, player: Player, n: int, n_frames: int, seed: int, swap: bool) -> Iterator[Known]:
    names = [*LEADS, OTHER]
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        mood, name = str(rng.choice(list(MOODS))), names[int(rng.integers(len(names)))]
        lead = int(rng.choice(LEADS.get(name, OTHERS))) if swap else None
        wav, facts = player.play(mood, lead, rng)
        with torch.no_grad():
            codes = codec.encode(torch.from_numpy(wav)[None, None])[:, :, :n_frames]
            heard = codec.decode(codes)[0].numpy()
        lead_heard = lead_name(facts.program)
        sound = sound_features(heard, codec.sample_rate)
        yield Known(mood, lead_heard, facts.genre, facts.tempo_bpm, facts.key, codes[0], sound)


FACTS = ("mood", "lead", "genre", "tempo_bpm", "key")


def save_clips(path: Path, clips: Sequence[Known]) -> None:
    """Plain arrays in an .npz, whole or not at all."""
    facts = json.dumps([{name: getattr(clip, name) for name in FACTS} for clip in clips])
    codes, features = np.stack([clip.codes.numpy() for clip in clips]), np.stack([clip.features for clip in clips])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, facts=np.array(facts), codes=codes.astype(np.int16), features=features)


def load_clips(path: Path) -> list[Known]:
    """What `save_clips` wrote."""
    with np.load(path, allow_pickle=False) as data:
        facts, codes, features = json.loads(str(data["facts"])), data["codes"].astype(np.int64), data["features"]
    return [Known(**row, codes=torch.from_numpy(c), features=f) for row, c, f in zip(facts, codes, features)]


# ---- what a clip sounds like -----------------------------------------------------------------------------------------


def sound_features(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """`probe_features`, how much more minor than major it is, its pitch classes counted from the tonic, and the octaves of its tempo."""
    tempo = estimate_tempo(wav, sample_rate)
    pace = 0.0 if np.isnan(tempo) else np.log2(tempo / 120)
    return np.concatenate([probe_features(wav, sample_rate), mode_features(chroma(wav, sample_rate).mean(1)), [pace]])


def mode_features(pitches: np.ndarray) -> np.ndarray:
    """Share of each pitch class [12] -> [15]: the best fit to a minor key, to a major key, the one less the other, and the shares
    from the better one's tonic upwards. A transposition changes nothing. Profiles: Krumhansl and Kessler 1982."""
    centred = pitches - pitches.mean()
    fits_of = {}
    for name, profile in (("major", MAJOR), ("minor", MINOR)):
        steps = np.asarray(profile) - np.mean(profile)
        scale = np.linalg.norm(steps) * max(float(np.linalg.norm(centred)), 1e-9)
        fits_of[name] = np.array([centred @ np.roll(steps, tonic) / scale for tonic in range(12)])
    major, minor = float(fits_of["major"].max()), float(fits_of["minor"].max())
    tonic = int(fits_of["minor" if minor > major else "major"].argmax())
    return np.concatenate([[minor, major, minor - major], np.roll(pitches, -tonic)])


# ---- judges ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judges:
    """Two judges: `mood` of the four, `lead` of what a prompt may ask for or something else."""

    mood: GenreProbe
    lead: GenreProbe

    @classmethod
    def fit(cls, clips: Sequence[Known]) -> Judges:
        features = np.stack([clip.features for clip in clips])
        labels = {kind: [getattr(clip, kind) for clip in clips] for kind in ("mood", "lead")}
        return cls(**{kind: GenreProbe.fit_features(features, names) for kind, names in labels.items()})

    def probability(self, kind: str, features: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
        """How sure the judge of a kind is of what was wanted: features [N, F] -> [N]."""
        probe: GenreProbe = getattr(self, kind)
        shares = probe.probabilities_of(features)
        return shares[np.arange(len(features)), [probe.classes.index(name) for name in wanted]]

    def right(self, kind: str, features: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
        """Whether it finds what was wanted the likeliest of all [N]."""
        probe: GenreProbe = getattr(self, kind)
        return np.array([probe.classes[best] == name for best, name in zip(probe.probabilities_of(features).argmax(1), wanted)])

    def hearing(self, clips: Sequence[Known]) -> dict[str, dict[str, float]]:
        """What the judges can hear of known clips: accuracy, the best guess without ears, and for each answer the chance that a clip of it
        scores above a clip of another (AUC)."""
        features = np.stack([clip.features for clip in clips])
        told = {}
        for kind in ("mood", "lead"):
            names = [getattr(clip, kind) for clip in clips]
            told[kind] = {"n": len(clips), "accuracy": float(self.right(kind, features, names).mean())}
            told[kind]["guess"] = max(names.count(name) for name in set(names)) / len(names)
            for name in sorted(set(names)):
                mine = np.array([other == name for other in names])
                if not mine.all():
                    score = self.probability(kind, features, [name] * len(names))
                    told[kind][f"auc {name}"] = above(score[mine], score[~mine])
        return told


def above(right: np.ndarray, wrong: np.ndarray) -> float:
    """The probability that one of `right` is higher than one of `wrong`; equal ones count half."""
    return float((right[:, None] > wrong).mean() + 0.5 * (right[:, None] == wrong).mean())
