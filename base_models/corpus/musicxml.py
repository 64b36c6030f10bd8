"""A reader of MusicXML scores (.mxl and .musicxml) with the standard library: parts of (onset, duration, midi), lyrics, measures.

It reads pitch and time only: voices by backup/forward, ties, transposing instruments, syllables. It skips grace notes, and it
does not play repeats out. Standard: W3C MusicXML 4.0.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

STEP_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
MAX_XML_BYTES = 64 * 2**20


@dataclass
class Measure:
    """Where a measure lies in its part, in quarter notes."""

    start: float
    length: float


@dataclass
class Part:
    """One staff. notes: [onset, duration, midi] in quarter notes, ties merged; syllables: (onset, text)."""

    name: str
    notes: list[tuple[float, float, int]] = field(default_factory=list)
    syllables: list[tuple[float, str]] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)


@dataclass
class Score:
    """What a file says, before any screen. `fifths`: sharps (+) or flats (-) of the key signature."""

    title: str | None = None
    composer: str | None = None
    rights: str | None = None
    bpm: float | None = None
    fifths: int | None = None
    mode: str = "major"
    meter: tuple[int, int] | None = None
    changes_key: bool = False
    changes_meter: bool = False
    parts: list[Part] = field(default_factory=list)

    @property
    def tonic(self) -> int | None:
        """The pitch class of the tonic (0 = C), or None without a key signature."""
        return None if self.fifths is None else (self.fifths * 7 + (9 if self.mode == "minor" else 0)) % 12


def _root(path: Path) -> ElementTree.Element:
    if path.suffix != ".mxl":
        data = path.read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            inside = [
                info
                for info in archive.infolist()
                if not info.filename.startswith("META") and info.filename.endswith((".xml", ".musicxml"))
            ]
            if not inside or inside[0].file_size > MAX_XML_BYTES:
                raise ValueError(f"{path.name} holds no MusicXML score of a sane size")
            data = archive.read(inside[0])
    if re.search(rb"<!ENTITY", data[:4096]):  # entities can expand without bound, and no score needs them
        raise ValueError(f"{path.name} declares XML entities")
    return ElementTree.fromstring(data)


def _midi(pitch: ElementTree.Element, transpose: int) -> int:
    octave, step = int(pitch.findtext("octave", "4")), pitch.findtext("step", "C")
    return 12 * (octave + 1) + STEP_SEMITONES[step] + round(float(pitch.findtext("alter") or 0)) + transpose


def _read_attributes(element: ElementTree.Element, score: Score, divisions: int, transpose: int) -> tuple[int, int]:
    divisions = int(element.findtext("divisions") or divisions)
    fifths = element.findtext("key/fifths")
    if fifths is not None:
        if score.fifths is None:
            score.fifths, score.mode = int(fifths), element.findtext("key/mode") or "major"
        score.changes_key |= int(fifths) != score.fifths
    beats, unit = element.findtext("time/beats"), element.findtext("time/beat-type")
    if beats is not None and unit is not None:
        meter = (int(beats), int(unit)) if beats.isdigit() and unit.isdigit() else None
        if score.meter is None and meter is not None:
            score.meter = meter
        score.changes_meter |= meter != score.meter
    transpose = int(element.findtext("transpose/chromatic") or transpose)
    return divisions, transpose


def _read_part(element: ElementTree.Element, name: str, score: Score) -> Part:
    part = Part(name)
    notes: list[list[float]] = []
    open_ties: dict[int, int] = {}
    divisions, transpose, end = 1, 0, 0.0
    for measure in element.findall("measure"):
        start = cursor = end
        chord_onset = start
        for child in measure:
            if child.tag == "attributes":
                divisions, transpose = _read_attributes(child, score, divisions, transpose)
            elif child.tag in ("direction", "sound"):
                sound = child if child.tag == "sound" else child.find("sound")
                tempo = sound.get("tempo") if sound is not None else None
                if tempo and score.bpm is None:
                    score.bpm = float(tempo)
            elif child.tag == "backup":
                cursor -= float(child.findtext("duration", "0")) / divisions
            elif child.tag == "forward":
                cursor += float(child.findtext("duration", "0")) / divisions
                end = max(end, cursor)
            elif child.tag == "note" and child.find("grace") is None:
                duration = float(child.findtext("duration", "0")) / divisions
                if child.find("chord") is None:
                    chord_onset, cursor = cursor, cursor + duration
                    end = max(end, cursor)
                pitch = child.find("pitch")
                if pitch is None:
                    continue
                midi = _midi(pitch, transpose)
                ties = {tie.get("type") for tie in child.findall("tie")}
                if "stop" in ties and midi in open_ties:
                    notes[open_ties[midi]][1] += duration
                else:
                    notes.append([chord_onset, duration, midi])
                    open_ties[midi] = len(notes) - 1
                if "start" not in ties:
                    open_ties.pop(midi, None)
                syllable = child.findtext("lyric/text")
                if syllable:
                    part.syllables.append((chord_onset, syllable))
        part.measures.append(Measure(start, end - start))
    part.notes = sorted((onset, duration, int(midi)) for onset, duration, midi in notes)
    return part


def read_score(path: Path) -> Score:
    """Read a score. Raises ValueError, ElementTree.ParseError or zipfile.BadZipFile for a file that is none."""
    root = _root(path)
    score = Score(
        title=root.findtext(".//movement-title") or root.findtext(".//work-title"),
        composer=next((c.text for c in root.findall(".//creator") if c.get("type") == "composer"), None),
        rights=root.findtext(".//rights"),
    )
    names = {part.get("id"): part.findtext("part-name") or "" for part in root.findall(".//score-part")}
    score.parts = [_read_part(part, names.get(part.get("id"), ""), score) for part in root.findall("part")]
    return score
