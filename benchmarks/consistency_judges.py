"""Judges of mood and instrument that no reward has heard of: fitted on real melodies whose mood, lead and genre are drawn apart.

    tune x genre x mood x lead, each drawn by itself -> arranged, rendered -> through the codec and back
    -> what it sounds like [F] (base_models.measures: timbre, movement, harmony), its mode, its pace -> logistic regression

In the demo corpus a piano plays jazz or lo-fi and never techno, so a probe of its clips may hear the genre and call it the instrument.
Here any lead plays in any genre and any mood, and what remains to be heard is the lead. The codec stands between, because that is how
the clips sound that are judged later. Melodies that are fitted on and melodies that are told accuracy of are kept apart, as in the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from base_models.atomic import atomic_file
from base_models.codec import Codec
from base_models.corpus.arrange import arrange, fits, flip_mode, key_name, valence_of
from base_models.corpus.build import piece_bucket
from base_models.corpus.render import Synth, render
from base_models.corpus.styles import BANDS, GENRES, MOODS, Instrument, draw_tempo
from base_models.corpus.tunes import Tune, load_tunes
from base_models.errors import UserError
from base_models.measures import GenreProbe, chroma, estimate_tempo, probe_features
from rlhf.descriptors import MAJOR, MINOR

LEADS: dict[str, tuple[int, ...]] = {
    "piano": (0, 1),
    "organ": (16, 19),
    "vibraphone": (11,),
    "guitar": (24, 25, 26, 27),
    "violin": (40,),
    "trumpet": (56, 59),
    "saxophone": (65, 66),
    "flute": (73,),
    "choir": (52, 53),
    "synth": (80, 81, 88),
}
"""What a prompt may ask for, and the General MIDI programs that are it."""
OTHER = "other"
OTHERS = (4, 5, 6, 21, 22, 29, 30, 42, 60, 61, 68, 71)
"""Electric piano, harpsichord, accordion, harmonica, overdriven guitars, cello, horn, brass, oboe, clarinet: none of those above."""


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


class Player:
    """Plays a real melody as asked; the same numbers give the same samples."""

    def __init__(self, sample_rate: int, duration_s: float, bucket: Sequence[str]) -> None:
        """bucket: which melodies, of 'train', 'val' and 'test' (base_models.corpus.build has them in groups of near duplicates)."""
        self.synth, self.duration_s = Synth(sample_rate), duration_s
        self.pools: dict[str, list[Tune]] = {}
        tunes = [tune for tune in load_tunes() if piece_bucket(tune.group) in bucket]
        for genre in GENRES:
            self.pools[genre] = [tune for tune in tunes if fits(genre, tune)]

    def play(self, mood: str, lead: int | None, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, object]]:
        """(wav [L] in [-1, 1], facts). lead: a General MIDI program, or None for the band's own."""
        genre = str(rng.choice([genre for genre in GENRES if genre != "choral"]))  # a choir sings all its voices itself
        band = BANDS[genre][int(rng.integers(len(BANDS[genre])))]
        if lead is not None:
            band = replace(band, lead=Instrument(lead, "lead"))
        pool, style = self.pools[genre], MOODS[mood]
        native = [tune for tune in pool if valence_of(tune) == style.valence]
        chosen = native if native and rng.random() < 2 / 3 else pool  # mostly melodies that are in that mode by themselves
        tune = flip_mode(chosen[int(rng.integers(len(chosen)))], style.valence)
        tempo = draw_tempo(band, style, rng)
        piece = arrange(tune, band, style, rng, tempo_bpm=tempo, key=int(rng.integers(12)), duration_s=self.duration_s)
        wav = render(piece, band, style, self.synth, rng).mix.astype(np.float32) / 32768
        return wav, {"genre": genre, "tempo_bpm": float(tempo), "key": key_name(piece), "lead": lead_name(band.lead.program)}


def lead_name(program: int) -> str:
    """The word for a program, or `other`."""
    return next((name for name, programs in LEADS.items() if program in programs), OTHER)


def known_clips(codec: Codec, n: int, bucket: Sequence[str], n_frames: int, seed: int, swap: bool = True) -> list[Known]:
    """n clips, each of a mood and a lead by chance. swap: any lead in any genre; without it bands play as they do in the corpus."""
    if n < 1:
        raise UserError(f"{n} clips", "at least 1", "ask for more")
    player = Player(codec.sample_rate, n_frames / codec.frame_rate, bucket)
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
        yield Known(mood=mood, codes=codes[0], features=sound_features(heard, codec.sample_rate), **facts)  # type: ignore[arg-type]


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
