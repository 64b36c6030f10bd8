"""What does a prompt ask for? Its tempo, its key, and its words for a mood, a genre or an instrument, with what it might have said instead.

    "sad piano, 80 BPM, in C minor" -> (73.6, 86.4, stated) | [12] | ["happy piano, 80 BPM, ...", ...], [False, ...]

The vocabulary is the demo corpus's (base_models.corpus): its captions taught the base's text encoder, and a word that it never
met would be judged by chance. A prompt that says nothing of a kind is None everywhere, and nobody guesses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from base_models.conditions import parse_tempo
from base_models.corpus.captions import TEMPO_WORDS
from base_models.corpus.harmony import PITCH_NAMES
from base_models.corpus.known import LEADS, MORE_LEADS, OTHER, lead_name
from base_models.corpus.styles import BANDS, GENRE_NAMES, MOODS

TEMPO_TOLERANCE = 0.08
"""A tempo is met within 8 %, as base_models.measures.tempo_matches has it."""
Versions = Callable[[str], "tuple[list[str], list[bool]] | None"]
"""A prompt -> (itself in all versions, which of them say what it says), or None where it says nothing of the kind."""


# ---- words ---------------------------------------------------------------------------------------------------------


def mood_versions(prompt: str) -> tuple[list[str], list[bool]] | None:
    """The prompt with its mood's word exchanged for each mood's words (happy, calm, sad, dark in the demo's vocabulary)."""
    found = _first(prompt, mood_words(), instrument_words())
    if found is None:
        return None
    start, stop, word = found
    mood = mood_words()[word]
    options = [(name, other) for other, name in mood_words().items()]
    return [prompt[:start] + other + prompt[stop:] for _, other in options], [name == mood for name, _ in options]


def instrument_versions(prompt: str) -> tuple[list[str], list[bool]] | None:
    """The prompt with its first instrument exchanged for one of each family; its own family counts as what it says. "Guitar rock" is a
    genre."""
    found = _first(prompt, instrument_words(), genre_words())
    if found is None:
        return None
    start, stop, word = found
    family = instrument_words()[word]
    options = [(family, word)] + [(name, name) for name in FAMILIES if name != family]
    return [prompt[:start] + other + prompt[stop:] for _, other in options], [name == family for name, _ in options]


def genre_versions(prompt: str) -> tuple[list[str], list[bool]] | None:
    """The prompt with its genre exchanged for each other genre's plain name. "House piano" and "jazz guitar" name instruments."""
    found = _first(prompt, genre_words(), instrument_words())
    if found is None:
        return None
    start, stop, word = found
    genre = genre_words()[word]
    options = [(genre, word)] + [(name, names[0]) for name, names in GENRE_NAMES.items() if name != genre]
    return [prompt[:start] + other + prompt[stop:] for _, other in options], [name == genre for name, _ in options]


def asked_mood(prompt: str) -> str | None:
    """The mood that a prompt names, or None."""
    found = _first(prompt, mood_words(), instrument_words())
    return None if found is None else mood_words()[found[2]]


def asked_genre(prompt: str) -> str | None:
    """The genre that a prompt names, or None."""
    found = _first(prompt, genre_words(), instrument_words())
    return None if found is None else genre_words()[found[2]]


def asked_lead(prompt: str) -> str | None:
    """The instrument that a prompt names first, by the name that base_models.corpus.known has for it ("tenor sax" is a saxophone); None
    where it names none, or one without a name there."""
    found = _first(prompt, instrument_words(), genre_words())
    return None if found is None else lead_words().get(found[2])


FAMILIES: Mapping[str, str] = {
    "piano": r"piano|harpsichord",
    "organ": r"organ|accordion|harmonica",
    "vibraphone": r"vibraphone",
    "guitar": r"guitar|banjo",
    "violin": r"violin|fiddle|cello|strings?|contrabass",
    "trumpet": r"trumpet|horn|brass|tuba|trombone",
    "saxophone": r"sax(?:ophone)?",
    "flute": r"flute|oboe|clarinet|bassoon|winds?",
    "choir": r"choir|voices?|vocals?",
    "synth": r"synth|lead|pad|stabs",
}
"""Families of instruments that alternatives are taken from: a name, and the words that belong to it."""


@cache
def instrument_words() -> dict[str, str]:
    """Every instrument of the demo's bands and the families' own words -> its family; longer names first. Bass and drums, which
    nearly every band has, are left out: hearing them says little."""
    names = {name for bands in BANDS.values() for band in bands for name in (band.lead.name, band.comp.name)} | {
        *FAMILIES,
        *LEADS,
        *MORE_LEADS,
    }
    known = {}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        family = next((family for family, words in FAMILIES.items() if re.search(rf"\b(?:{words})\b", name)), None)
        if family is not None:
            known[name] = family
    return known


@cache
def lead_words() -> dict[str, str]:
    """Every instrument of the demo's bands that leads are known by, and these names themselves -> the name."""
    leads = {**LEADS, **MORE_LEADS}
    played = {part.name: lead_name(part.program, leads) for bands in BANDS.values() for band in bands for part in (band.lead, band.comp)}
    return {word: name for word, name in ({name: name for name in leads} | played).items() if name != OTHER}


@cache
def mood_words() -> dict[str, str]:
    """Every word for a mood -> the mood."""
    return {word: mood.name for mood in MOODS.values() for word in mood.words}


@cache
def genre_words() -> dict[str, str]:
    """Every name of a genre -> the genre."""
    return {word.lower(): genre for genre, names in GENRE_NAMES.items() for word in names}


def _first(prompt: str, words: Mapping[str, str], inside: Mapping[str, str] | None = None) -> tuple[int, int, str] | None:
    """(start, stop, word) of the earliest of `words` in the prompt, the longest where several begin there; none of those that are part
    of a longer name of `inside` ("warm" of a warm pad is no mood)."""
    taken = [m.span() for m in _pattern(tuple(inside)).finditer(prompt)] if inside else []
    for match in _pattern(tuple(words)).finditer(prompt):
        low, high = match.span()
        if not any(start <= low and high <= stop and high - low < stop - start for start, stop in taken):
            return match.start(), match.end(), match.group().lower()
    return None


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.IGNORECASE)


# ---- tempo and key --------------------------------------------------------------------------------------------------


def asked_tempo(prompt: str) -> tuple[float, float, bool] | None:
    """(slowest, fastest, whether it is stated in BPM) that a prompt asks for, or None. Words have the ranges of the captions."""
    stated = parse_tempo(prompt)
    if stated is not None:
        return stated * (1 - TEMPO_TOLERANCE), stated * (1 + TEMPO_TOLERANCE), True
    ranges, low = {}, 30.0
    for high, words in TEMPO_WORDS:
        ranges.update(dict.fromkeys(words, (low, min(high, 300.0))))
        low = high
    found = _first(prompt, dict.fromkeys(ranges, ""))
    return None if found is None else (*ranges[found[2]], False)


_KEY = re.compile(r"\b([A-Gb-g])([#b♯♭]|[ -]sharp|[ -]flat)?[ -]((?i:major|minor|maj|min))\b|\b((?i:major|minor))\b")
"""A lower-case "a" is the article of "in a minor key"; "min" without a letter counts minutes."""


def asked_keys(prompt: str) -> list[int] | None:
    """The keys that answer a prompt: 0 to 11 are C major upwards, 12 to 23 C minor; one for "Eb minor", twelve for "minor", or None."""
    found = _KEY.search(prompt)
    if found is None:
        return None
    minor = 12 if (found.group(3) or found.group(4)).lower().startswith("min") else 0
    if found.group(1) is None:
        return list(range(minor, minor + 12))
    letter = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[found.group(1).upper()]
    sign = (found.group(2) or "").strip(" -").lower()
    return [minor + (letter + (sign in ("#", "♯", "sharp")) - (sign in ("b", "♭", "flat"))) % 12]


def key_name(key: int) -> str:
    """3 -> 'Eb major'."""
    return f"{PITCH_NAMES[key % 12]} {'minor' if key >= 12 else 'major'}"
