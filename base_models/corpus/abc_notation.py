"""A reader of ABC notation for single melodies: text -> header fields and bars of (onset, duration, midi).

It reads what collections of folk tunes use (keys and modes, accidentals that last a bar, broken rhythm, tuplets, ties, chords as
their top note, inline fields, voices) and ignores what does not sound (decorations, grace notes, lyrics). Repeats are not
played out. Standard: ABC 2.1, abcnotation.com/wiki/abc:standard:v2.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

STEP_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
CIRCLE_OF_FIFTHS = ("Cb", "Gb", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#")
SHARPS_OF_MAJOR = {tonic: sharps for sharps, tonic in enumerate(CIRCLE_OF_FIFTHS, -7)}
SHARPS_OF_MODE = {"lydian": 1, "major": 0, "mixolydian": -1, "dorian": -2, "minor": -3, "phrygian": -4, "locrian": -5}
MODE_OF_SUFFIX = {"": "major", "maj": "major", "ion": "major", "m": "minor", "min": "minor", "aeo": "minor"}
MODE_OF_SUFFIX |= {"dor": "dorian", "mix": "mixolydian", "phr": "phrygian", "lyd": "lydian", "loc": "locrian"}
ORDER_OF_SHARPS = "FCGDAEB"
TUPLET_TIME = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}
SILENT = frozenset(" ()~.uvTHLMPSOkJR`\t*$y;\\:'&")

TOKEN = re.compile(
    r"""(?P<text>"[^"]*") | (?P<decoration>![^!]*!|\+[^+]*\+) | (?P<field>\[[A-Za-z]:[^\]]*\]) | (?P<grace>\{[^}]*\})
      | (?P<bar>:*\|+[:\]]*(?:\[?\d)?|:+\||::+|\[\||\|\]|\[\d) | (?P<tuplet>\(\d(?::\d*)*)
      | (?P<chord>\[[^\]|]*\]\d*/*\d*) | (?P<note>[\^_=]*[A-Ga-g][,']*\d*/*\d*) | (?P<rest>[zx]\d*/*\d*)
      | (?P<broken>[<>]+) | (?P<tie>-) | (?P<other>.)""",
    re.VERBOSE,
)
NOTE = re.compile(r"(?P<accidental>[\^_=]*)(?P<letter>[A-Ga-g])(?P<octave>[,']*)(?P<length>\d*/*\d*)")


@dataclass
class AbcBar:
    """One bar as notated. length and onsets in quarter notes; a rest is a note whose midi is None."""

    notes: list[tuple[Fraction, Fraction, int | None]] = field(default_factory=list)
    length: Fraction = Fraction(0)


@dataclass
class AbcTune:
    """One tune as notated, before any screen."""

    number: str
    title: str
    composer: str
    tonic: int
    mode: str
    meter: tuple[int, int]
    bpm: float | None
    bars: list[AbcBar]
    changes_key: bool = False
    changes_meter: bool = False
    unknown_symbols: int = 0


def split_file(path: Path) -> list[str]:
    """The tunes of one file: each begins with its `X:` line. Old files are Latin-1, which also decodes any byte."""
    text = path.read_bytes().decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    return [part for part in re.split(r"(?m)^(?=X:)", text) if part.startswith("X:")]


def parse_key(text: str) -> tuple[int, str, dict[str, int]] | None:
    """`Ador` -> (tonic 0-11, mode, accidentals by letter); None where the field names no key."""
    text = text.strip()
    if text[:2] in ("HP", "Hp"):  # Highland pipes: A mixolydian
        return 9, "mixolydian", {"F": 1, "C": 1}
    match = re.match(r"([A-G])([#b]?)\s*([A-Za-z]*)", text)
    if match is None:
        return None
    letter, sign, suffix = match.group(1), match.group(2), match.group(3).lower()
    if suffix.startswith(("exp", "clef", "bass", "treble")):
        suffix = ""
    mode = MODE_OF_SUFFIX.get(suffix if suffix == "m" else suffix[:3])
    if mode is None or letter + sign not in SHARPS_OF_MAJOR:
        return None
    sharps = max(-7, min(7, SHARPS_OF_MAJOR[letter + sign] + SHARPS_OF_MODE[mode]))
    letters = ORDER_OF_SHARPS[:sharps] if sharps > 0 else ORDER_OF_SHARPS[::-1][:-sharps]
    tonic = (STEP_SEMITONES[letter] + {"": 0, "#": 1, "b": -1}[sign]) % 12
    return tonic, mode, dict.fromkeys(letters, 1 if sharps > 0 else -1)


def parse_meter(text: str) -> tuple[int, int] | None:
    """`6/8`, `C` (4/4) or `C|` (2/2) -> (beats, unit); None for free metre and sums such as 2+3/8."""
    word = text.split()[0] if text.split() else ""
    if word in ("C", "C|"):
        return (4, 4) if word == "C" else (2, 2)
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if match is None or int(match.group(1)) == 0 or int(match.group(2)) == 0:
        return None
    return int(match.group(1)), int(match.group(2))


def _length(text: str) -> Fraction:
    """`3/2` -> 3/2, `/` -> 1/2, `//` -> 1/4, nothing -> 1."""
    match = re.match(r"(\d*)(/*)(\d*)", text)
    assert match is not None
    over, slashes, under = match.groups()
    divisor = (int(under) if under else 2 ** len(slashes)) if slashes else 1
    return Fraction(int(over) if over else 1, max(divisor, 1))


def _tempo(text: str) -> float | None:
    """`1/4=120` -> 120.0 and `3/8=80` -> 120.0: quarter notes a minute."""
    match = re.search(r"(\d+)/(\d+)\s*=\s*(\d+)", text)
    if match is None or int(match.group(2)) == 0:
        return None
    bpm = float(Fraction(int(match.group(1)), int(match.group(2))) * 4 * int(match.group(3)))
    return bpm if bpm > 0 else None


def _header_and_body(text: str) -> tuple[dict[str, str], str]:
    """Header fields (the first of each letter) and the notes of the first voice, body fields turned into inline ones."""
    header: dict[str, str] = {}
    body: list[str] = []
    first_voice: str | None = None
    voice: str | None = None
    in_body = False
    for raw in text.split("\n"):
        line = re.sub(r"(?<!\\)%.*", "", raw).rstrip()
        if not line:
            continue
        match = re.match(r"([A-Za-z]):(.*)", line)
        if match:
            letter, value = match.group(1), match.group(2).strip()
            if not in_body:
                if letter != "V":
                    header.setdefault(letter, value)
                in_body = letter == "K"
            elif letter == "V":
                voice = value.split()[0] if value else ""
                first_voice = voice if first_voice is None else first_voice
            elif letter in "KML" and voice == first_voice:
                body.append(f"[{letter}:{value}]")
            continue
        if not in_body:
            continue
        for piece in re.split(r"(?=\[V:)", line):
            inline = re.match(r"\[V:\s*([^\]\s]*)[^\]]*\]", piece)
            if inline:
                voice = inline.group(1)
                first_voice = voice if first_voice is None else first_voice
            if voice == first_voice:
                body.append(piece[inline.end() if inline else 0 :].rstrip("\\"))
    return header, " ".join(body)


class _Reader:
    """The state that ABC carries from one symbol to the next."""

    def __init__(self, accidentals: dict[str, int], meter: tuple[int, int], unit: Fraction) -> None:
        self.key_accidentals, self.meter, self.unit = accidentals, meter, unit
        self.bars: list[AbcBar] = []
        self.bar = AbcBar()
        self.bar_accidentals: dict[tuple[str, int], int] = {}
        self.tuplet_left, self.tuplet_ratio = 0, Fraction(1)
        self.broken: Fraction | None = None
        self.tied = False
        self.changes_key = self.changes_meter = False
        self.unknown_symbols = 0

    def pitch(self, match: re.Match[str]) -> int:
        letter, accidental = match["letter"].upper(), match["accidental"]
        octave = (5 if match["letter"].islower() else 4) + match["octave"].count("'") - match["octave"].count(",")
        if accidental:
            shift = 0 if "=" in accidental else accidental.count("^") - accidental.count("_")
            self.bar_accidentals[letter, octave] = shift
        shift = self.bar_accidentals.get((letter, octave), self.key_accidentals.get(letter, 0))
        return 12 * (octave + 1) + STEP_SEMITONES[letter] + shift

    def add(self, midi: int | None, length: Fraction) -> None:
        duration = length * self.unit * 4
        if self.tuplet_left > 0:
            duration *= self.tuplet_ratio
            self.tuplet_left -= 1
        if self.broken is not None:
            duration, self.broken = duration * self.broken, None
        notes = self.bar.notes
        if self.tied and notes and midi is not None and notes[-1][2] == midi:
            notes[-1] = (notes[-1][0], notes[-1][1] + duration, midi)
        else:
            notes.append((self.bar.length, duration, midi))
        self.tied = False
        self.bar.length += duration

    def end_bar(self) -> None:
        if self.bar.notes:
            self.bars.append(self.bar)
            self.bar = AbcBar()
        self.bar_accidentals, self.tuplet_left, self.broken = {}, 0, None

    def note(self, text: str) -> None:
        match = NOTE.match(text)
        assert match is not None
        self.add(self.pitch(match), _length(match["length"]))

    def chord(self, text: str) -> None:
        close = text.index("]")
        notes = list(NOTE.finditer(text[1:close]))
        if notes:
            self.add(max(self.pitch(note) for note in notes), _length(notes[0]["length"]) * _length(text[close + 1 :]))

    def tuplet(self, text: str) -> None:
        count, *rest = text[1:].split(":")
        notes = int(count)
        if notes == 0:
            return
        compound = self.meter[0] % 3 == 0 and self.meter[1] == 8
        time = int(rest[0]) if rest and rest[0] else TUPLET_TIME.get(notes, 3 if compound else 2)
        self.tuplet_left = int(rest[1]) if len(rest) > 1 and rest[1] else notes
        self.tuplet_ratio = Fraction(time, notes)

    def broken_rhythm(self, text: str) -> None:
        """`A>B`: the first note takes what the second loses, 3:1, 7:1 for `>>` and so on; `<` the other way round."""
        if not self.bar.notes:
            self.unknown_symbols += 1
            return
        short = Fraction(1, 2 ** len(text))
        first, self.broken = (2 - short, short) if text[0] == ">" else (short, 2 - short)
        onset, duration, midi = self.bar.notes[-1]
        self.bar.notes[-1] = (onset, duration * first, midi)
        self.bar.length += duration * first - duration

    def inline_field(self, letter: str, value: str) -> None:
        if letter == "K":
            key = parse_key(value)
            if key is not None:
                self.changes_key, self.key_accidentals = True, key[2]
        elif letter == "M":
            meter = parse_meter(value)
            self.changes_meter |= meter != self.meter
        elif letter == "L":
            unit = parse_meter(value)
            if unit is not None:
                self.unit = Fraction(*unit)

    def read(self, body: str) -> None:
        for match in TOKEN.finditer(body):
            kind, text = match.lastgroup, match.group()
            if kind == "note":
                self.note(text)
            elif kind == "chord":
                self.chord(text)
            elif kind == "rest":
                self.add(None, _length(text[1:]))
            elif kind == "bar":
                if not re.fullmatch(r"\[\d", text):  # `[1` marks an ending, it is not a bar line
                    self.end_bar()
            elif kind == "tuplet":
                self.tuplet(text)
            elif kind == "broken":
                self.broken_rhythm(text)
            elif kind == "tie":
                self.tied = True
            elif kind == "field":
                self.inline_field(text[1], text[3:-1])
            elif kind == "other" and text not in SILENT:
                self.unknown_symbols += 1
        self.end_bar()


def parse_tune(text: str) -> AbcTune | None:
    """Read one tune; None where its key or its metre is missing or not understood."""
    header, body = _header_and_body(text)
    key = parse_key(header.get("K", ""))
    meter = parse_meter(header.get("M", "C"))
    if key is None or meter is None:
        return None
    unit = parse_meter(header.get("L", "")) or ((1, 16) if Fraction(*meter) < Fraction(3, 4) else (1, 8))
    reader = _Reader(key[2], meter, Fraction(*unit))
    reader.read(body)
    return AbcTune(
        number=header.get("X", ""),
        title=re.sub(r"\s+", " ", header.get("T", "")).strip(),
        composer=header.get("C", ""),
        tonic=key[0],
        mode=key[1],
        meter=meter,
        bpm=_tempo(header.get("Q", "")),
        bars=reader.bars,
        changes_key=reader.changes_key,
        changes_meter=reader.changes_meter,
        unknown_symbols=reader.unknown_symbols,
    )
