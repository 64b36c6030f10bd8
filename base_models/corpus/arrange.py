"""A real melody, a house band and a mood -> note lists for lead, backing, bass and drums, in seconds.

tune -> some bars, transposed, augmented if too busy for the genre -> chords (the piece's own, or a Viterbi path)
     -> the genre's groove -> swing, small timing and velocity variation, seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .grooves import GROOVES, KICK
from .harmony import EPS, PITCH_NAMES, Chord, Note, harmonise, jazzify, join_repeats
from .phrases import Played, Score, Track
from .styles import STEMS, Band, Mood

if TYPE_CHECKING:
    from .tunes import Tune

METERS = ((4, 4), (2, 2), (2, 4), (3, 4), (6, 8))
DUPLE = ((4, 4), (2, 2), (2, 4))
# Genres whose chords come from the Viterbi path even if the piece has its own: loops want slow harmony.
OWN_HARMONY = ("techno", "house", "ambient", "reggae")
# Genres that stretch a tune to double length once it has more than so many notes a beat.
BUSY = {
    "ambient": 1.6, "cinematic": 2.2, "lofi": 2.2, "reggae": 2.2, "house": 2.2, "techno": 2.2, "jazz": 3.0, "bossa": 3.0,
    "rock": 3.0,
}  # fmt: skip
# Scale degrees that change between a tune and its parallel minor or major.
TO_MINOR = {4: 3, 9: 8, 11: 10}
TO_MAJOR = {3: 4, 8: 9, 10: 11}


@dataclass(frozen=True)
class Arrangement:
    """Everything a clip sounds, in seconds. Notes of `stems` are Note(onset s, length s, pitch, velocity).

    melody: (start s, stop s, pitch) of the lead. chords: (start s, stop s, "C:maj"). bar_indices: the tune's bars used.
    """

    stems: dict[str, list[Track]]
    melody: list[tuple[float, float, int]]
    chords: list[tuple[float, float, str]]
    tempo_bpm: float
    key: int
    mode: str
    bar_indices: list[int]
    real_harmony: bool
    duration_s: float

    @property
    def kicks(self) -> list[float]:
        """Kick onsets in seconds: what side-chain pumping follows."""
        return [note.onset for track in self.stems["drums"] if track.is_drum for note in track.notes if note.pitch == KICK]


def valence_of(tune: Tune) -> str:
    """'major' or 'minor', with the modes that sound like them."""
    return "major" if tune.mode in ("major", "mixolydian") else "minor"


def fits(genre: str, tune: Tune) -> bool:
    """Whether the genre can play this tune: its metre, and four real voices for a choir."""
    meter = tuple(tune.meter)
    if meter not in METERS:
        return False
    if genre == "choral":
        return tune.parts is not None
    if genre == "chamber":
        return tune.parts is not None or meter != (6, 8)
    return genre in ("folk", "cinematic", "ambient") or meter in DUPLE


def flip_mode(tune: Tune, valence: str) -> Tune:
    """The tune in its parallel 'major' or 'minor', by scale-degree substitution; its own chords and voices are dropped."""
    if valence_of(tune) == valence:
        return tune
    degrees = TO_MINOR if valence == "minor" else TO_MAJOR

    def moved(pitch: int) -> int:
        degree = (pitch - tune.tonic) % 12
        return pitch + degrees.get(degree, degree) - degree

    bars = [[(onset, length, moved(pitch)) for onset, length, pitch in bar] for bar in tune.bars]
    return replace(tune, mode=valence, bars=bars, chords=None, parts=None)


def arrange(tune: Tune, band: Band, mood: Mood, rng: np.random.Generator, *, tempo_bpm: float, key: int, duration_s: float) -> Arrangement:
    """Play `duration_s` seconds of `tune` as `band` in `mood`; `key` is the pitch class of the tonic.

    A beat of `tempo_bpm` is a quarter note, or a dotted quarter in 6/8.
    """
    genre = band.genre
    bar_beats = float(tune.bar_beats)
    quarters_per_s = tempo_bpm / 60 * (1.5 if tuple(tune.meter) == (6, 8) else 1.0)
    density = sum(len(bar) for bar in tune.bars) / (bar_beats * len(tune.bars))
    stretch = 2.0 if density > BUSY.get(genre, np.inf) else 1.0
    n_bars = int(np.ceil(duration_s * quarters_per_s / (bar_beats * stretch))) + 1
    indices = _choose_bars(len(tune.bars), n_bars, rng)
    shift = (key - tune.tonic + 6) % 12 - 6
    bars = [[(onset, length, int(pitch) + shift) for onset, length, pitch in tune.bars[i]] for i in indices]

    real_harmony = tune.chords is not None and genre not in OWN_HARMONY
    step = _chord_step(genre, bar_beats)
    bar_chords = _own_chords(tune, indices, shift, step, genre) if real_harmony else harmonise(bars, key, tune.mode, bar_beats, step)
    chords = join_repeats(
        [
            Chord((i * bar_beats + chord.onset) * stretch, chord.length * stretch, chord.root, chord.quality)
            for i, bar in enumerate(bar_chords)
            for chord in bar
        ]
    )
    chords = _genre_chords(chords, genre, key, rng)
    melody = _on_timeline(bars, bar_beats, stretch)
    voices = None
    if tune.parts is not None:
        moved = [[[(o, n * 0.98, int(p) + shift) for o, n, p in tune.parts[i][voice]] for i in indices] for voice in range(4)]
        voices = [[n._replace(velocity=84) for n in _on_timeline(part, bar_beats, stretch)] for part in moved]
    score = Score(
        melody, chords, n_bars * bar_beats * stretch, bar_beats * stretch, (tune.meter[0], tune.meter[1]), band,
        mood.register, rng, voices,
    )  # fmt: skip
    stems = _perform(GROOVES[genre](score), band, mood, quarters_per_s, duration_s, rng)
    lead = stems["lead"][0].notes if stems["lead"] else []
    return Arrangement(
        stems=stems,
        melody=[(round(n.onset, 3), round(min(n.onset + n.length, duration_s), 3), n.pitch) for n in lead],
        chords=[
            (round(start, 3), round(min(start + chord.length / quarters_per_s, duration_s), 3), chord.name)
            for chord in chords
            if (start := chord.onset / quarters_per_s) < duration_s
        ],
        tempo_bpm=float(tempo_bpm),
        key=key,
        mode=tune.mode,
        bar_indices=indices,
        real_harmony=real_harmony,
        duration_s=duration_s,
    )


def _choose_bars(n_available: int, n_bars: int, rng: np.random.Generator) -> list[int]:
    """Consecutive bars from the start of a four-bar phrase if the tune is long enough, wrapping round if it is not."""
    spare = max(0, n_available - n_bars)
    phrase = 4 if spare >= 4 else 1
    first = int(rng.integers(0, spare // phrase + 1)) * phrase
    return [(first + i) % n_available for i in range(n_bars)]


def _chord_step(genre: str, bar_beats: float) -> float:
    """Beats between chord changes."""
    if genre == "choral":
        return 1.0
    if genre in ("jazz", "bossa"):
        return min(2.0, bar_beats)
    if genre == "chamber":
        return 2.0 if bar_beats == 4 else bar_beats
    if genre in ("techno", "house", "ambient", "lofi", "reggae") or bar_beats <= 3:
        return bar_beats
    return min(2.0, bar_beats)


def _own_chords(tune: Tune, indices: Sequence[int], shift: int, step: float, genre: str) -> list[list[Chord]]:
    """The piece's beat-by-beat chords; outside the classical genres only those on every `step`-th beat, held."""
    assert tune.chords is not None
    every_beat = [[Chord(float(beat), 1.0, (root + shift) % 12, quality) for beat, root, quality in tune.chords[i]] for i in indices]
    if genre in ("chamber", "choral") or step < 2:
        return every_beat
    bar_beats = tune.bar_beats
    return [[c._replace(length=min(step, bar_beats - c.onset)) for c in bar if c.onset % step < EPS] for bar in every_beat]


def _genre_chords(chords: list[Chord], genre: str, key: int, rng: np.random.Generator) -> list[Chord]:
    """Sevenths for jazz, power chords for rock, some suspended seconds for ambient."""
    if genre in ("jazz", "bossa", "lofi"):
        return jazzify(chords, key, rng)
    if genre == "rock" or (genre == "techno" and rng.random() < 0.5):
        return [chord._replace(quality="5") for chord in chords]
    if genre == "ambient":
        return [chord._replace(quality="sus2") if rng.random() < 0.3 else chord for chord in chords]
    return chords


def _on_timeline(bars: Sequence[Sequence[tuple[float, float, int]]], bar_beats: float, stretch: float) -> list[Note]:
    """Bars laid end to end; notes on a beat are accented."""
    return [
        Note((i * bar_beats + onset) * stretch, length * stretch, pitch, 92 if abs(onset % 1) < EPS else 80)
        for i, bar in enumerate(bars)
        for onset, length, pitch in bar
    ]


def swing_time(beat: float, swing: float) -> float:
    """The beat with its off-beat eighth moved from 0.5 to `swing`, everything between stretched to fit."""
    whole, part = divmod(beat, 1.0)
    return whole + (part / 0.5 * swing if part < 0.5 else swing + (part - 0.5) / 0.5 * (1 - swing))


def _perform(
    played: Played, band: Band, mood: Mood, quarters_per_s: float, duration_s: float, rng: np.random.Generator
) -> dict[str, list[Track]]:
    """Beats to seconds: legato, swing, a few milliseconds of looseness (none for machines), velocities for the mood."""
    loose = 0.0 if band.genre in ("techno", "house") else 0.006
    stems: dict[str, list[Track]] = {}
    for stem in STEMS:
        tracks = []
        for track in getattr(played, stem):
            legato = mood.legato if stem in ("lead", "backing") and not track.is_drum else 1.0
            notes = []
            for note in track.notes:
                start = swing_time(note.onset, band.swing) / quarters_per_s
                stop = swing_time(note.onset + note.length * legato, band.swing) / quarters_per_s
                start = max(0.0, start + loose * float(rng.standard_normal()))
                if start >= duration_s:
                    continue
                stop = min(max(start + 0.04, stop), duration_s + 1.5)
                velocity = min(127, max(20, note.velocity + mood.velocity + int(rng.integers(-4, 5))))
                notes.append(Note(start, stop - start, min(127, max(0, note.pitch)), velocity))
            if notes:
                tracks.append(Track(notes, track.program, track.is_drum))
        stems[stem] = tracks
    return stems


def instruments_of(arrangement: Arrangement, band: Band) -> list[str]:
    """Names of what is heard, lead first, each once."""
    names = [band.lead.name, band.comp.name]
    if arrangement.stems["bass"] and band.bass is not None:
        names.append(band.bass.name)
    if arrangement.stems["drums"]:
        names.append("timpani and percussion" if band.kit == 48 else "drums")
    return list(dict.fromkeys(names))


def key_name(arrangement: Arrangement) -> str:
    """Such as 'Eb minor'."""
    return f"{PITCH_NAMES[arrangement.key]} {arrangement.mode}"
