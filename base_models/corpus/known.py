"""Clips of which everything is known: real melodies, with mood, lead and genre drawn apart.

    tune x genre x mood x lead, each drawn by itself -> arranged, rendered -> wav [L] and its facts

In the demo corpus a piano plays jazz or lo-fi and never techno, so whoever learns from its clips may hear the genre and call it the
instrument. Here any lead plays in any genre and any mood, and what remains to be heard is the lead. Only a choir sings all its voices
itself, whatever lead was drawn. Which melodies are played is the caller's choice, so that those that are learnt from and those that are
judged can be kept apart, as in the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from base_models.errors import UserError

from .arrange import arrange, fits, flip_mode, key_name, valence_of
from .build import piece_bucket
from .render import Synth, render
from .styles import BANDS, GENRES, MOODS, Instrument, draw_tempo
from .tunes import Tune, load_tunes

CHOIR = "choral"
LEADS: Mapping[str, tuple[int, ...]] = {
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
"""Leads that a prompt may ask for in one word, and the General MIDI programs that are it."""
MORE_LEADS: Mapping[str, tuple[int, ...]] = {
    "electric piano": (4, 5),
    "harpsichord": (6,),
    "accordion": (21,),
    "harmonica": (22,),
    "overdriven guitar": (29, 30),
    "cello": (42,),
    "horn": (60,),
    "brass": (61,),
    "oboe": (68,),
    "clarinet": (71,),
}
"""The corpus's other leads, and two that it has as backing; none of them is what a word of LEADS asks for."""
OTHER = "other"


class Facts(NamedTuple):
    """What is known of a clip. program: the lead's, of General MIDI; key: such as 'Eb minor'; group: of near duplicates of its melody."""

    mood: str
    genre: str
    program: int
    tempo_bpm: float
    key: str
    group: str


class Player:
    """Plays a real melody as asked; the same numbers give the same samples."""

    def __init__(self, sample_rate: int, duration_s: float, bucket: Sequence[str], genres: Sequence[str] = GENRES) -> None:
        """bucket: which melodies, of 'train', 'val' and 'test' (base_models.corpus.build has them in groups of near duplicates)."""
        self.synth, self.duration_s, self.genres = Synth(sample_rate), duration_s, tuple(genres)
        tunes = [tune for tune in load_tunes() if piece_bucket(tune.group) in bucket]
        self.pools: dict[str, list[Tune]] = {genre: [tune for tune in tunes if fits(genre, tune)] for genre in self.genres}
        silent = [genre for genre, pool in self.pools.items() if not pool]
        if silent:
            raise UserError(f"no melody for {', '.join(silent)}", "melodies that each genre can play", "take more buckets of melodies")

    def play(self, mood: str, lead: int | None, rng: np.random.Generator, genre: str | None = None) -> tuple[np.ndarray, Facts]:
        """(wav [L] in [-1, 1], facts). lead: a General MIDI program, or None for the band's own. genre: None draws one."""
        genre = genre or str(rng.choice(self.genres))
        band = BANDS[genre][int(rng.integers(len(BANDS[genre])))]
        if lead is not None and genre != CHOIR:
            band = replace(band, lead=Instrument(lead, "lead"))
        pool, style = self.pools[genre], MOODS[mood]
        native = [tune for tune in pool if valence_of(tune) == style.valence]
        # mostly melodies that are in that mode by themselves; to change the mode of a choir's would leave it without its voices
        chosen = native if native and (genre == CHOIR or rng.random() < 2 / 3) else pool
        tune = flip_mode(chosen[int(rng.integers(len(chosen)))], style.valence)
        tempo = draw_tempo(band, style, rng)
        piece = arrange(tune, band, style, rng, tempo_bpm=tempo, key=int(rng.integers(12)), duration_s=self.duration_s)
        wav = render(piece, band, style, self.synth, rng).mix.astype(np.float32) / 32768
        return wav, Facts(mood, genre, band.lead.program, float(tempo), key_name(piece), tune.group)


def lead_name(program: int, leads: Mapping[str, tuple[int, ...]] = LEADS) -> str:
    """The word for a program, or `other`."""
    return next((name for name, programs in leads.items() if program in programs), OTHER)
