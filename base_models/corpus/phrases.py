"""What a band plays with: the score it reads, the tracks it makes, and patterns laid over melody and chords.

Velocities are 1..127, times in quarter notes from the clip's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .harmony import EPS, Chord, Note, chord_at, voicing
from .styles import Band

Hit = tuple[float, float, float]  # (beat in the cycle, factor on velocity, length)
Stroke = tuple[float, int, int]  # (beat in the cycle, drum note, velocity)

# Where each lead instrument sounds like itself: program -> (lowest, highest) pitch.
LEAD_RANGES = {
    11: (60, 84), 22: (60, 82), 24: (55, 79), 26: (52, 76), 27: (55, 79), 29: (55, 79), 30: (55, 79), 42: (43, 67),
    52: (57, 77), 53: (60, 79), 54: (60, 79), 56: (58, 80), 58: (36, 55), 59: (58, 79), 60: (53, 74), 61: (55, 79),
    66: (52, 74), 73: (67, 90), 87: (48, 72),
}  # fmt: skip
DEFAULT_LEAD_RANGE = (60, 84)


@dataclass(frozen=True)
class Track:
    """Notes for one program; `is_drum` sends them to the drum channel."""

    notes: list[Note]
    program: int
    is_drum: bool = False


@dataclass(frozen=True)
class Score:
    """What is to be played, in quarter notes from the clip's start: melody, chords, and four voices if the piece has them."""

    melody: list[Note]
    chords: list[Chord]
    total_beats: float
    bar_beats: float
    meter: tuple[int, int]
    band: Band
    register: int
    rng: np.random.Generator
    voices: list[list[Note]] | None = None

    @property
    def lead_range(self) -> tuple[int, int]:
        low, high = LEAD_RANGES.get(self.band.lead.program, DEFAULT_LEAD_RANGE)
        return low + self.register, high + self.register


@dataclass(frozen=True)
class Played:
    """Tracks by stem."""

    lead: list[Track]
    backing: list[Track]
    bass: list[Track] = field(default_factory=list)
    drums: list[Track] = field(default_factory=list)


def fit_range(melody: Sequence[Note], low: int, high: int) -> list[Note]:
    """The melody moved by octaves so that it lies around the middle of [low, high], stray notes folded in."""
    if not melody:
        return []
    mean = sum(note.pitch for note in melody) / len(melody)
    shift = 12 * round(((low + high) / 2 - mean) / 12)
    fitted = []
    for note in melody:
        pitch = note.pitch + shift
        while pitch > high:
            pitch -= 12
        while pitch < low:
            pitch += 12
        fitted.append(note._replace(pitch=pitch))
    return fitted


def thin(melody: Sequence[Note], grid: float, total_beats: float) -> list[Note]:
    """The note that sounds longest in every `grid` beats, repeats tied up to two grids: a sustained line out of a busy tune."""
    line: list[Note] = []
    for step in range(int(np.ceil(total_beats / grid - EPS))):
        start = step * grid
        best: Note | None = None
        best_weight = 0.0
        for note in melody:
            overlap = min(note.onset + note.length, start + grid) - max(note.onset, start)
            weight = overlap + (0.3 if abs(note.onset - start) < EPS else 0.0)
            if overlap > 0 and weight > best_weight:
                best, best_weight = note, weight
        if best is None:
            continue
        last = line[-1] if line else None
        touches = last is not None and abs(last.onset + last.length - start) < EPS
        if last is not None and touches and last.pitch == best.pitch and last.length < 2 * grid:
            line[-1] = last._replace(length=last.length + grid)
        else:
            line.append(best._replace(onset=start, length=grid))
    return line


def lead_line(score: Score, *, grid: float | None = None, length: float = 1.0, velocity: int | None = None) -> list[Note]:
    """The tune in the lead's range; thinned to `grid`, lengths scaled, one velocity for all if given."""
    melody = score.melody if grid is None else thin(score.melody, grid, score.total_beats)
    low, high = score.lead_range
    return [
        note._replace(length=note.length * length, velocity=note.velocity if velocity is None else velocity)
        for note in fit_range(melody, low, high)
    ]


def comp(
    score: Score, hits: Sequence[Hit], cycle: float, low: int, high: int, velocity: int, *, strum: float = 0.0,
    quality: str | None = None,
) -> list[Note]:  # fmt: skip
    """Chords struck in a rhythm that repeats every `cycle` beats; `strum` delays each higher string."""
    notes = []
    previous: list[int] | None = None
    for start in np.arange(0.0, score.total_beats - EPS, cycle).tolist():
        for offset, factor, length in hits:
            beat = start + offset
            chord = chord_at(score.chords, beat) if beat < score.total_beats else None
            if chord is None:
                continue
            previous = voicing(chord.root, quality or chord.quality, low, high, previous)
            notes += [Note(beat + strum * i, length, pitch, int(velocity * factor)) for i, pitch in enumerate(previous)]
    return notes


def bass_line(
    score: Score, hits: Sequence[tuple[float, float]], cycle: float, low: int, velocity: int, fifths: Sequence[int] = ()
) -> list[Note]:
    """Roots in a rhythm that repeats every `cycle` beats; the hits numbered in `fifths` play the fifth instead."""
    notes = []
    for start in np.arange(0.0, score.total_beats - EPS, cycle).tolist():
        for index, (offset, length) in enumerate(hits):
            beat = start + offset
            chord = chord_at(score.chords, beat) if beat < score.total_beats else None
            if chord is None:
                continue
            pitch = low + (chord.root - low) % 12
            if index in fifths:
                pitch += 7 if pitch + 7 < low + 14 else -5
            notes.append(Note(beat, length, pitch, velocity))
    return notes


def strokes(pattern: str, drum: int, step: float, accent: int, plain: int | None = None) -> list[Stroke]:
    """'X' accented, 'x' plain, '.' nothing, one character every `step` beats."""
    quiet = int(accent * 0.62) if plain is None else plain
    return [(index * step, drum, accent if mark == "X" else quiet) for index, mark in enumerate(pattern) if mark in "Xx"]


def drum_loop(score: Score, pattern: Sequence[Stroke], cycle: float) -> list[Track]:
    """The pattern repeated to the end, on the band's kit; nothing if the band has none."""
    if score.band.kit is None:
        return []
    notes = [
        Note(start + offset, 0.2, drum, velocity)
        for start in np.arange(0.0, score.total_beats - EPS, cycle).tolist()
        for offset, drum, velocity in pattern
        if start + offset < score.total_beats
    ]
    return [Track(notes, score.band.kit, is_drum=True)]
