"""Captions for clips and prompts for demos, from one grammar.

    [mood] [genre synonym] [with instruments] [tempo word | N BPM] [in KEY MODE] [in the style of ARTIST]

Long templates fill most slots, short forms ("sad piano, slow", "jazz", "fast techno") only a few. A clip gets four captions of
four different kinds, so that a model learns to obey any subset of the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from base_models.errors import UserError

from .harmony import PITCH_NAMES
from .styles import BANDS, GENRE_NAMES, GENRES, HELD_OUT_MOOD, MOODS, draw_tempo, trained_moods

CAPTIONS_PER_CLIP = 4

# (upper bound in BPM, words): a tempo has the words of the first bound above it.
TEMPO_WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (66, ("very slow",)),
    (86, ("slow",)),
    (114, ("mid-tempo", "moderate")),
    (144, ("fast",)),
    (float("inf"), ("very fast",)),
)


@dataclass(frozen=True)
class Facts:
    """What is true of a clip. `key` is such as 'Eb minor'; instruments have the lead first."""

    genre: str
    mood: str
    instruments: tuple[str, ...]
    tempo_bpm: float
    key: str
    artist: str


def tempo_words(tempo_bpm: float) -> tuple[str, ...]:
    """The words for a tempo, the canonical one first."""
    return next(words for bound, words in TEMPO_WORDS if tempo_bpm < bound)


class _Slots:
    """One random filling of the grammar's slots."""

    def __init__(self, facts: Facts, rng: np.random.Generator) -> None:
        def pick(options: Sequence[str]) -> str:
            return options[int(rng.integers(len(options)))]

        words = MOODS[facts.mood].words
        if facts.tempo_bpm < 100:
            words = tuple(word for word in words if word != "upbeat")
        # The plain names are what people type: half of the draws.
        self.genre = GENRE_NAMES[facts.genre][0] if rng.random() < 0.5 else pick(GENRE_NAMES[facts.genre])
        self.mood = words[0] if rng.random() < 0.5 else pick(words)
        self.tempo = pick(tempo_words(facts.tempo_bpm))
        self.bpm = f"{facts.tempo_bpm:.0f} BPM"
        self.key = f"in {facts.key}"
        self.artist = f"in the style of {facts.artist}"
        self.lead = facts.instruments[0]
        shown = list(facts.instruments)
        if len(shown) > 2 and rng.random() < 0.5:
            shown = shown[:2]
        self.instruments = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
        self.listed = ", ".join(shown)


Template = Callable[[_Slots], str]

# Kinds of caption: full sentences, those that name the tempo in BPM, keyword lists, and short forms.
FULL: tuple[Template, ...] = (
    lambda s: f"{s.mood} {s.genre} with {s.instruments}, {s.tempo}, {s.key}",
    lambda s: f"{_article(s.tempo)} {s.tempo} {s.mood} {s.genre} piece led by {s.lead}",
    lambda s: f"{s.mood} {s.genre} {s.artist}, {s.tempo}",
    lambda s: f"{s.genre} with {s.instruments}, {s.mood} mood, {s.tempo}",
    lambda s: f"{_article(s.mood)} {s.mood} {s.genre} track featuring {s.instruments}",
)
WITH_BPM: tuple[Template, ...] = (
    lambda s: f"{s.mood} {s.genre} with {s.instruments}, {s.bpm}, {s.key}",
    lambda s: f"{s.bpm} {s.genre} {s.key}, {s.mood} mood",
    lambda s: f"{s.mood} {s.genre} {s.artist}, {s.bpm}",
    lambda s: f"{s.mood} {s.genre} at {s.bpm}",
    lambda s: f"{s.genre}, {s.bpm}",
    lambda s: f"{s.tempo} {s.genre} with {s.lead}, {s.bpm}",
    lambda s: f"{s.mood} {s.genre} with {s.instruments}, {s.bpm}",
)
KEYWORDS: tuple[Template, ...] = (
    lambda s: f"{s.genre}, {s.mood}, {s.listed}",
    lambda s: f"{s.mood}, {s.tempo}, {s.genre}",
    lambda s: f"{s.genre}, {s.lead}, {s.tempo}, {s.mood}",
    lambda s: f"{s.genre} {s.key}, {s.listed}",
    lambda s: f"{s.listed}, {s.mood} {s.genre}",
)
SHORT: tuple[Template, ...] = (
    lambda s: s.genre,
    lambda s: f"{s.mood} {s.genre}",
    lambda s: f"{s.tempo} {s.genre}",
    lambda s: f"{s.genre} with {s.lead}",
    lambda s: f"{s.genre} {s.artist}",
    lambda s: f"{s.mood} {s.lead} {s.genre}",
    lambda s: f"{s.mood} {s.lead}, {s.tempo}",
)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _write(facts: Facts, templates: Sequence[Template], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))](_Slots(facts, rng))


def captions(facts: Facts, rng: np.random.Generator) -> list[str]:
    """Four captions, one of each kind, in random order."""
    written = [_write(facts, kind, rng) for kind in (FULL, WITH_BPM, KEYWORDS, SHORT)]
    return [written[i] for i in rng.permutation(CAPTIONS_PER_CLIP)]


def demo_prompts(n: int, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Prompts for sampling pairs and for evaluation: the 12 genres in turn, no two alike, every other one naming a BPM.

    split 'heldout' asks for genre and mood pairs that no training clip has; 'train' for the others.
    Returns: rows {prompt, genre, mood, instruments, tempo_bpm, split}; tempo_bpm is None where the prompt names none.
    Every prompt says its genre and its mood.
    """
    if split not in ("train", "heldout"):
        raise UserError(f"split {split!r}", "'train' or 'heldout'", "pass one of the two")
    if not 0 <= n <= 20000:
        raise UserError(f"n={n}", "0 to 20000 prompts", "ask for fewer")
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        turn, place = divmod(len(rows), len(GENRES))
        genre = GENRES[place]
        moods = (HELD_OUT_MOOD[genre],) if split == "heldout" else trained_moods(genre)
        mood = MOODS[moods[turn % len(moods)]]
        band = BANDS[genre][int(rng.integers(len(BANDS[genre])))]
        tempo_bpm = draw_tempo(band, mood, rng)
        facts = Facts(
            genre=genre,
            mood=mood.name,
            instruments=band.instrument_names,
            tempo_bpm=float(tempo_bpm),
            key=f"{PITCH_NAMES[int(rng.integers(12))]} {mood.valence}",
            artist=band.name,
        )
        names_bpm = (turn + place) % 2 == 0
        prompt = _write(facts, WITH_BPM if names_bpm else FULL + KEYWORDS + SHORT, rng)
        bare = prompt  # without the names that could hold a mood's or a genre's word ("warm pad", "choir")
        for name in (*band.instrument_names, band.name):
            bare = bare.replace(name, "")
        says_mood = any(word in bare for word in mood.words)
        says_genre = any(name in bare for name in GENRE_NAMES[genre])
        if prompt in seen or not (says_mood and says_genre):
            continue
        seen.add(prompt)
        rows.append(
            {
                "prompt": prompt,
                "genre": genre,
                "mood": mood.name,
                "instruments": [name for name in band.instrument_names if name in prompt],
                "tempo_bpm": float(tempo_bpm) if names_bpm else None,
                "split": split,
            }
        )
    return rows
