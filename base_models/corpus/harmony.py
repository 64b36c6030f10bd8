"""Chords for a melody: a Viterbi path over diatonic triads, jazz colourings, and close voicings.

Onsets and lengths are in quarter notes, pitches are MIDI numbers, roots are pitch classes (0 = C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PITCH_NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

CHORD_TONES: dict[str, tuple[int, ...]] = {
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "dim": (0, 3, 6),
    "5": (0, 7),
    "sus2": (0, 2, 7),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10),
    "maj9": (0, 4, 7, 11, 14),
    "m9": (0, 3, 7, 10, 14),
}

# mode -> (semitones above the tonic, quality, price of using it)
DIATONIC: dict[str, tuple[tuple[int, str, float], ...]] = {
    "major": (
        (0, "maj", 0.0),
        (2, "min", 0.5),
        (4, "min", 0.8),
        (5, "maj", 0.15),
        (7, "maj", 0.1),
        (9, "min", 0.3),
    ),
    "minor": (
        (0, "min", 0.0),
        (3, "maj", 0.4),
        (5, "min", 0.2),
        (7, "maj", 0.25),
        (8, "maj", 0.3),
        (10, "maj", 0.3),
        (7, "min", 0.6),
    ),
    "dorian": ((0, "min", 0.0), (3, "maj", 0.4), (5, "maj", 0.2), (10, "maj", 0.1), (7, "min", 0.5)),
    "mixolydian": ((0, "maj", 0.0), (10, "maj", 0.1), (5, "maj", 0.25), (7, "min", 0.5), (2, "min", 0.5)),
}

EPS = 1e-6  # slack, in quarter notes, when two onsets are compared


class Note(NamedTuple):
    """One note; `velocity` 1..127."""

    onset: float
    length: float
    pitch: int
    velocity: int


class Chord(NamedTuple):
    """One chord; `root` is a pitch class, `quality` a key of CHORD_TONES."""

    onset: float
    length: float
    root: int
    quality: str

    @property
    def name(self) -> str:
        return f"{PITCH_NAMES[self.root]}:{self.quality}"


Bar = Sequence[Sequence[float]]  # [(onset in the bar, length, pitch), ...]


def harmonise(bars: Sequence[Bar], tonic: int, mode: str, bar_beats: float, step_beats: float) -> list[list[Chord]]:
    """Chords bar by bar, one every `step_beats`, by a Viterbi path: chord tones under the melody pay, rare degrees cost,
    falling fifths and staying put are cheap, and the line starts and ends on the tonic if it can.

    Returns: for each bar its chords, onsets within the bar; equal neighbours are joined.
    """
    candidates = DIATONIC[mode]
    spans: list[tuple[int, float, float]] = []
    weights: list[np.ndarray] = []
    for bar_index, bar in enumerate(bars):
        start = 0.0
        while start < bar_beats - EPS:
            stop = min(start + step_beats, bar_beats)
            spans.append((bar_index, start, stop - start))
            weights.append(_pitch_class_weights(bar, start, stop, tonic))
            start = stop
    fit = np.stack(weights)  # [spans, 12]
    total = fit.sum(1) + EPS
    member = np.zeros((len(candidates), 12))
    for row, (degree, quality, _) in enumerate(candidates):
        member[row, [(degree + tone) % 12 for tone in CHORD_TONES[quality]]] = 1.0
    price = np.array([cost for *_, cost in candidates])
    emission = 1.6 * (2 * fit @ member.T - total[:, None]) / total[:, None] - price  # [spans, candidates]
    is_tonic = np.array([degree == 0 for degree, *_ in candidates])
    move = np.zeros((len(candidates), len(candidates)))  # [from, to]
    for i, (from_degree, from_quality, _) in enumerate(candidates):
        for j, (to_degree, to_quality, _) in enumerate(candidates):
            if (from_degree, from_quality) == (to_degree, to_quality):
                move[i, j] = -0.2
            elif (from_degree - to_degree) % 12 == 7:
                move[i, j] = 0.3
    score = emission[0] - 0.6 * ~is_tonic
    back = np.zeros((len(spans), len(candidates)), dtype=int)
    for step in range(1, len(spans)):
        arrivals = score[:, None] + move
        back[step] = arrivals.argmax(0)
        score = arrivals.max(0) + emission[step]
    path = [int((score + 0.3 * is_tonic).argmax())]
    for step in range(len(spans) - 1, 0, -1):
        path.append(int(back[step, path[-1]]))
    chords: list[list[Chord]] = [[] for _ in bars]
    for (bar_index, start, length), choice in zip(spans, reversed(path)):
        degree, quality, _ = candidates[choice]
        chords[bar_index].append(Chord(start, length, (tonic + degree) % 12, quality))
    return [join_repeats(bar) for bar in chords]


def _pitch_class_weights(bar: Bar, start: float, stop: float, tonic: int) -> np.ndarray:
    """Time that each scale position sounds in [start, stop); a note struck at its start counts one and a half times."""
    weight = np.zeros(12)
    for onset, length, pitch in bar:
        overlap = min(onset + length, stop) - max(onset, start)
        if overlap > 0:
            weight[(int(pitch) - tonic) % 12] += overlap * (1.5 if abs(onset - start) < EPS else 1.0)
    return weight


def join_repeats(chords: Sequence[Chord]) -> list[Chord]:
    """Touching chords of the same root and quality become one long chord."""
    joined: list[Chord] = []
    for chord in chords:
        last = joined[-1] if joined else None
        if last and last[2:] == chord[2:] and abs(last.onset + last.length - chord.onset) < EPS:
            joined[-1] = last._replace(length=last.length + chord.length)
        else:
            joined.append(chord)
    return joined


def jazzify(chords: Sequence[Chord], tonic: int, rng: np.random.Generator) -> list[Chord]:
    """Triads become sevenths and ninths; the dominant keeps its minor seventh."""
    coloured = []
    for chord in chords:
        quality = chord.quality
        rich = rng.random() < 0.4
        if quality == "maj":
            quality = "7" if (chord.root - tonic) % 12 == 7 else ("maj9" if rich else "maj7")
        elif quality == "min":
            quality = "m9" if rich else "m7"
        elif quality == "dim":
            quality = "m7b5"
        coloured.append(chord._replace(quality=quality))
    return coloured


def voicing(root: int, quality: str, low: int, high: int, previous: Sequence[int] | None = None) -> list[int]:
    """The chord's pitches within [low, high], each as near as can be to the middle of the previous voicing."""
    centre = sum(previous) / len(previous) if previous else (low + high) / 2
    pitches = set()
    for tone in CHORD_TONES[quality]:
        lowest = low + (root + tone - low) % 12
        options = range(lowest, high + 1, 12)
        pitches.add(min(options, key=lambda pitch: abs(pitch - centre)) if lowest <= high else low)
    return sorted(pitches)


def chord_at(chords: Sequence[Chord], beat: float) -> Chord | None:
    """The chord sounding at `beat`, or None."""
    for chord in chords:
        if chord.onset - EPS <= beat < chord.onset + chord.length - EPS:
            return chord
    return None
