"""Genres, moods and house bands: what every clip's label promises, as frozen tables.

A band is a fixed signature (instruments, kit, room, tone, tempo range, swing) that plays one genre: the demo corpus's "artist".
A mood is a fixed way of playing and mixing. Nothing here computes sound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

STEMS = ("lead", "backing", "bass", "drums")


class Instrument(NamedTuple):
    """A General MIDI program (0..127) and the name that captions give it."""

    program: int
    name: str


@dataclass(frozen=True)
class Band:
    """One house band. `kit` is a General MIDI drum kit or None; `swing` is where the off-beat eighth falls (0.5 straight)."""

    genre: str
    name: str
    lead: Instrument
    comp: Instrument
    bass: Instrument | None
    kit: int | None
    reverb_s: float
    reverb_wet: float
    lowpass_hz: int | None
    bpm_range: tuple[int, int]
    swing: float

    @property
    def instrument_names(self) -> tuple[str, ...]:
        """What captions list: lead, comp, bass and drums, each once."""
        drums = None if self.kit is None else "timpani and percussion" if self.kit == 48 else "drums"
        names = (self.lead.name, self.comp.name, self.bass and self.bass.name, drums)
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class Mood:
    """How a mood is played and mixed.

    valence: the mode of the piece. energetic: upper or lower end of the band's tempo range. register: semitones added to the
    lead's range. velocity: added to every note. legato: factor on note lengths. brightness: factor on the low-pass cut-off.
    reverb: factor on the wet part. balance_db: on top of the genre's stem balance. words: what captions call it.
    """

    name: str
    valence: str
    energetic: bool
    register: int
    velocity: int
    legato: float
    brightness: float
    reverb: float
    words: tuple[str, ...]
    balance_db: dict[str, float] = field(default_factory=dict)


MOODS = {
    mood.name: mood
    for mood in (
        Mood("happy", "major", True, 2, 8, 0.9, 1.3, 0.8, ("happy", "joyful", "cheerful", "upbeat"), {"lead": 1.0, "drums": 1.0}),
        Mood("calm", "major", False, 0, -14, 1.08, 0.5, 1.4, ("calm", "peaceful", "warm", "relaxing"), {"drums": -5.0}),
        Mood("sad", "minor", False, -4, -14, 1.08, 0.4, 1.5, ("sad", "melancholic", "wistful", "gloomy"), {"drums": -4.0}),
        Mood("dark", "minor", True, -6, 8, 0.9, 0.62, 1.1, ("dark", "tense", "dramatic", "ominous"), {"bass": 3.0, "lead": -1.5}),
    )
}

GENRE_NAMES: dict[str, tuple[str, ...]] = {
    "jazz": ("jazz", "swing jazz", "jazz combo"),
    "bossa": ("bossa nova", "bossa nova jazz", "latin bossa nova"),
    "techno": ("techno", "EDM techno", "club techno"),
    "house": ("house", "house music", "EDM house"),
    "cinematic": ("cinematic", "cinematic film score", "cinematic orchestral music"),
    "rock": ("rock", "guitar rock", "rock band"),
    "folk": ("folk", "acoustic folk", "folk music"),
    "ambient": ("ambient", "atmospheric ambient", "ambient music"),
    "lofi": ("lo-fi", "lo-fi hip hop", "lofi beats"),
    "chamber": ("chamber music", "classical chamber music", "baroque chamber music"),
    "choral": ("choral music", "sacred choral music", "choir music"),
    "reggae": ("reggae", "roots reggae", "reggae dub"),
}
GENRES = tuple(GENRE_NAMES)

# One mood a genre is never trained on: prompts with such a pair ask for something new made of known parts.
HELD_OUT_MOOD = {
    "jazz": "sad",
    "bossa": "dark",
    "techno": "calm",
    "house": "sad",
    "cinematic": "happy",
    "rock": "calm",
    "folk": "dark",
    "ambient": "happy",
    "lofi": "happy",
    "chamber": "calm",
    "choral": "dark",
    "reggae": "sad",
}


def trained_moods(genre: str) -> tuple[str, ...]:
    """The moods that the training split holds for a genre: all but the held-out one."""
    return tuple(mood for mood in MOODS if mood != HELD_OUT_MOOD[genre])


def draw_tempo(band: Band, mood: Mood, rng: np.random.Generator) -> int:
    """A tempo in BPM: the upper part of the band's range for energetic moods, the lower part (and below) for the others."""
    low, high = band.bpm_range
    width = high - low
    if mood.energetic:
        return int(rng.integers(int(low + 0.6 * width), int(1.04 * high) + 1))
    return int(rng.integers(int(0.8 * low), int(low + 0.2 * width) + 1))


# genre | band | lead | comp | bass | kit | reverb seconds | wet | low-pass Hz | BPM | swing
_TABLE = """
jazz|Harlan Quill Quartet|66 tenor sax|0 piano|32 upright bass|40|0.5|0.12|-|120-168|0.66
jazz|Odessa Blue Trio|26 jazz guitar|4 electric piano|32 upright bass|32|0.4|0.10|9000|92-132|0.64
jazz|The Midtown Vibes|11 vibraphone|26 jazz guitar|32 upright bass|40|0.8|0.18|-|132-190|0.66
jazz|Marguerite Vane|59 muted trumpet|0 piano|32 upright bass|40|1.0|0.20|7000|66-96|0.62
bossa|Luz do Porto|73 flute|24 nylon guitar|32 upright bass|0|0.7|0.12|-|120-150|0.50
bossa|Celso Andrade|24 nylon guitar|4 electric piano|33 electric bass|8|0.5|0.10|9000|104-132|0.50
bossa|Ipeuna Sextet|65 alto sax|0 piano|32 upright bass|0|0.9|0.16|-|132-168|0.50
techno|VOLT-9|81 saw lead|90 poly synth|38 synth bass|25|0.6|0.14|-|126-136|0.50
techno|Kessel Null|80 square lead|93 metallic pad|39 synth bass|24|1.6|0.24|5500|132-146|0.50
techno|Rotor Club|87 bass lead|81 saw stabs|38 synth bass|25|0.4|0.08|-|122-130|0.54
house|Sunset Arcade|80 square lead|1 house piano|39 synth bass|24|0.7|0.15|-|118-126|0.54
house|Delphine K|54 synth voice|5 electric piano|38 synth bass|25|1.2|0.22|9000|116-124|0.50
house|Neon Harbour|81 saw lead|16 organ|39 synth bass|24|0.9|0.18|-|122-130|0.50
cinematic|Aurel Brandt|60 french horn|48 string ensemble|43 contrabass|48|2.6|0.34|-|72-96|0.50
cinematic|The Hollow Crown Orchestra|61 brass section|44 tremolo strings|43 contrabass|48|2.2|0.30|-|100-138|0.50
cinematic|Ines Solberg|42 cello|49 slow strings|43 contrabass|-|3.0|0.38|8000|54-72|0.50
cinematic|Mount Erebus|52 choir|48 string ensemble|58 tuba|48|2.8|0.34|-|84-116|0.50
rock|Gravel Saints|29 overdriven guitar|30 distortion guitar|34 picked bass|16|0.4|0.08|-|124-168|0.50
rock|Paper Rockets|27 electric guitar|29 overdriven guitar|33 electric bass|0|0.6|0.12|-|104-136|0.50
rock|Iron Meridian|30 distortion guitar|30 distortion guitar|34 picked bass|16|0.3|0.06|8000|150-190|0.50
folk|Bramble & Rye|40 fiddle|25 steel guitar|32 upright bass|-|0.5|0.12|-|96-126|0.52
folk|Tamsin Hale|73 flute|25 steel guitar|-|-|0.9|0.18|-|72-100|0.50
folk|The Millrace Band|21 accordion|105 banjo|32 upright bass|-|0.35|0.08|-|108-138|0.54
folk|Old Ferry Road|22 harmonica|25 steel guitar|32 upright bass|40|0.5|0.10|9000|84-112|0.56
ambient|Pale Meridian|88 new age synth|89 warm pad|-|-|4.0|0.45|6000|64-80|0.50
ambient|Low Tide Archive|11 vibraphone|94 halo pad|39 sub bass|-|3.4|0.42|4500|60-76|0.50
ambient|Snowfield|0 piano|92 bowed pad|-|-|3.6|0.40|7000|60-76|0.50
lofi|Rainy Desk|4 electric piano|4 electric piano|33 electric bass|8|0.5|0.10|3200|72-84|0.60
lofi|Mochi Tape|11 vibraphone|24 nylon guitar|32 upright bass|25|0.6|0.12|3800|78-90|0.58
lofi|Third Floor Window|0 piano|26 jazz guitar|33 electric bass|40|0.8|0.14|2800|68-80|0.62
chamber|Weissensee Quartet|40 violin|48 strings|42 cello|-|1.2|0.20|-|84-126|0.50
chamber|Clavier Cabinet|6 harpsichord|6 harpsichord|42 cello|-|0.9|0.16|-|92-132|0.50
chamber|Lindenholz Winds|68 oboe|71 clarinet|70 bassoon|-|1.0|0.18|-|76-116|0.50
choral|St. Anselm Choir|52 choir|52 choir|52 choir|-|3.0|0.35|-|60-80|0.50
choral|Nordkirche Organ & Voices|53 voices|19 church organ|19 church organ|-|3.4|0.38|-|64-88|0.50
reggae|Kingsland Dub|56 trumpet|16 organ|33 electric bass|8|1.4|0.22|-|68-84|0.58
reggae|Palm Signal|22 harmonica|28 muted guitar|33 electric bass|0|1.0|0.18|9000|76-92|0.56
"""


def _instrument(cell: str) -> Instrument:
    program, name = cell.split(" ", 1)
    return Instrument(int(program), name)


def _band(line: str) -> Band:
    genre, name, lead, comp, bass, kit, reverb_s, wet, lowpass, bpm, swing = (cell.strip() for cell in line.split("|"))
    low, high = bpm.split("-")
    return Band(
        genre,
        name,
        _instrument(lead),
        _instrument(comp),
        None if bass == "-" else _instrument(bass),
        None if kit == "-" else int(kit),
        float(reverb_s),
        float(wet),
        None if lowpass == "-" else int(lowpass),
        (int(low), int(high)),
        float(swing),
    )


_ALL_BANDS = tuple(_band(line) for line in _TABLE.strip().splitlines())
BANDS: dict[str, tuple[Band, ...]] = {genre: tuple(band for band in _ALL_BANDS if band.genre == genre) for genre in GENRES}
