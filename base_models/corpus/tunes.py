"""Real melodies for the demo corpus: public-domain tunes whose encodings ship inside the music21 wheel, read by our own readers.

    O'Neill's, Aird's, Ryan's, American fife, Northumbrian (ABC) + Bach's chorales (MusicXML, four real parts and their words)
        -> full bars in one key and one metre -> key screen -> no exact duplicates -> near-duplicate groups -> Tune

music21 itself is never imported: only its data files are read, where they are installed, and nothing of them is committed.
Collections with terms of their own (Essen, Palestrina, Josquin, the demos, the Berlin lead sheet, Monteverdi) are left out.
The group is what a split must keep together: printed twice, or sharing a theme, is one piece.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from base_models.atomic import atomic_file
from base_models.corpus import abc_notation, musicxml
from base_models.errors import UserError

log = logging.getLogger(__name__)

VERSION = "2"
"""Part of the cache's name: raise it whenever reading or screening changes."""

ABC_COLLECTIONS = {
    "airdsAirs": "trad., James Aird's Selection (1778-1801)",
    "ryansMammoth": "trad., Ryan's Mammoth Collection (1883)",
    "oneills1850": "trad., O'Neill's Music of Ireland (1903)",
    "miscFolk": "trad., fife tunes and Northumbrian Minstrelsy (1882)",
}
CHORALES = "bach"
MODES = ("major", "minor", "dorian", "mixolydian")
CHORALE_METERS = ((4, 4), (3, 4))
MIN_BARS = 4
THEME_INTERVALS = 12
SAME = 1e-6

CHORD_TONES = {
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "dim": (0, 3, 6),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10),
}
# Krumhansl & Kessler 1982: how well each pitch class fits a key, rated by listeners.
KRUMHANSL_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
KRUMHANSL_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

Note = tuple[float, float, int]
"""(onset in the bar, duration, midi), both times in quarter notes."""
Bar = list[Note]


@dataclass(frozen=True)
class Tune:
    """One melody in full bars. All times are quarter notes from the bar's start; tonic is a pitch class (0 = C).

    A note held over a bar line is written in both bars, so that every bar stands alone.
    `chords[bar]` is (beat, root 0-11, quality) for each quarter note, `parts[bar][voice]` a bar of soprano, alto, tenor, bass,
    `lyrics[bar]` (onset, syllable); all three are indexed like `bars` and None where the source has none.
    """

    id: str
    source: str
    title: str
    composer: str
    tonic: int
    mode: str
    meter: tuple[int, int]
    bar_beats: float
    bpm: float | None
    bars: list[Bar]
    chords: list[list[tuple[int, int, str]]] | None
    parts: list[list[Bar]] | None
    lyrics: list[list[tuple[float, str]]] | None
    group: str


# ---- reading ---------------------------------------------------------------------------------------------------------


def corpus_root() -> Path:
    """The folder of music21's data files, found without importing music21."""
    spec = importlib.util.find_spec("music21")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    root = Path(folders[0]) / "corpus" if folders else None
    if root is None or not root.is_dir():
        raise UserError(
            "no music21 data files in this environment",
            "the melodies of the demo corpus, which ship inside the music21 wheel",
            "pip install 'music21==10.5.1' (its parser is not used, only its data files)",
        )
    return root


def _bar_beats(meter: tuple[int, int]) -> float:
    return meter[0] * 4 / meter[1]


def _longest_run(is_full: Sequence[bool]) -> range:
    """The first of the longest unbroken runs of True."""
    best = range(0)
    start: int | None = None
    for i, full in enumerate([*is_full, False]):
        if full and start is None:
            start = i
        elif not full and start is not None:
            if i - start > len(best):
                best = range(start, i)
            start = None
    return best


def _join_pickups(bars: list[abc_notation.AbcBar], bar_beats: float) -> list[abc_notation.AbcBar]:
    """A short bar before a repeat and the pickup after it are one bar, cut in two by the repeat sign."""
    joined: list[abc_notation.AbcBar] = []
    for bar in bars:
        last = joined[-1] if joined else None
        if last is not None and last.length < bar_beats and last.length + bar.length == bar_beats:
            shifted = [(onset + last.length, duration, midi) for onset, duration, midi in bar.notes]
            joined[-1] = abc_notation.AbcBar(last.notes + shifted, last.length + bar.length)
        else:
            joined.append(bar)
    return joined


def _from_abc(text: str, source: str, file_name: str) -> Tune | None:
    read = abc_notation.parse_tune(text)
    if read is None or read.changes_key or read.changes_meter or read.mode not in MODES:
        return None
    bar_beats = _bar_beats(read.meter)
    notated = _join_pickups(read.bars, bar_beats)
    run = _longest_run([bar.length == bar_beats for bar in notated])
    bars = [[(round(float(o), 6), round(float(d), 6), m) for o, d, m in notated[i].notes if m is not None and d > 0] for i in run]
    if len(bars) < MIN_BARS or sum(map(len, bars)) < 2 * MIN_BARS or not all(0 <= m <= 127 for b in bars for _, _, m in b):
        return None
    return Tune(
        id=f"{source}:{file_name}:{read.number}",
        source=source,
        title=read.title or f"{file_name} {read.number}",
        composer=read.composer or ABC_COLLECTIONS[source],
        tonic=read.tonic,
        mode=read.mode,
        meter=read.meter,
        bar_beats=bar_beats,
        bpm=read.bpm,
        bars=bars,
        chords=None,
        parts=None,
        lyrics=None,
        group="",
    )


def _slice(part: musicxml.Part, start: float, length: float) -> Bar:
    """What sounds between start and start + length, cut at both ends."""
    bar = []
    for onset, duration, midi in part.notes:
        begin, end = max(onset, start), min(onset + duration, start + length)
        if end - begin > SAME:
            bar.append((round(begin - start, 6), round(end - begin, 6), midi))
    return bar


@functools.cache
def _chord(weights: tuple[float, ...], bass: int | None) -> tuple[int, str]:
    """The chord that explains the sounding pitch classes best. weights [12]: how long each sounds.

    Chord tones count for it, other tones .8 against; the bass prefers the root; a tone that is missing, a fourth tone and the
    diminished triad cost a little, so that the plainer name wins where both fit.
    """
    total = sum(weights)
    best: tuple[float, int, str] | None = None
    for root in range(12):
        for quality, intervals in CHORD_TONES.items():
            tones = {(root + interval) % 12 for interval in intervals}
            inside = sum(weights[tone] for tone in tones)
            score = inside - 0.8 * (total - inside)
            score += 0.25 * total * (bass is not None and bass % 12 == root)
            score -= total * (0.06 * (len(tones) - 3) + 0.08 * (quality == "dim"))
            score -= 0.15 * total * sum(weights[(root + interval) % 12] == 0 for interval in intervals[:3])
            if best is None or score > best[0]:
                best = (score, root, quality)
    assert best is not None
    return best[1], best[2]


def _chords(voices: list[Bar], bar_beats: float) -> list[tuple[int, int, str]]:
    chords = []
    for beat in range(int(bar_beats)):
        weights = [0.0] * 12
        bass: int | None = None
        for voice, notes in enumerate(voices):
            for onset, duration, midi in notes:
                overlap = min(onset + duration, beat + 1) - max(onset, beat)
                if overlap > 0:
                    weights[midi % 12] += overlap * (1.3 if abs(onset - beat) < SAME else 1.0)
                if voice == 3 and onset <= beat + SAME < onset + duration:
                    bass = midi
        if sum(weights) > 0:
            chords.append((beat, *_chord(tuple(weights), bass)))
    return chords


def _from_chorale(path: Path) -> Tune | None:
    try:
        score = musicxml.read_score(path)
    except (ValueError, ElementTree.ParseError, zipfile.BadZipFile) as error:
        log.warning("left out %s: %s", path.name, error)
        return None
    meter, tonic = score.meter, score.tonic
    if len(score.parts) != 4 or meter not in CHORALE_METERS or tonic is None or score.mode not in ("major", "minor"):
        return None
    if score.changes_key or score.changes_meter:
        return None
    bar_beats = _bar_beats(meter)
    melody = score.parts[0]
    run = _longest_run([abs(measure.length - bar_beats) < SAME for measure in melody.measures])
    starts = [melody.measures[i].start for i in run]
    parts = [[_slice(part, start, bar_beats) for part in score.parts] for start in starts]
    bars = [voices[0] for voices in parts]
    if len(bars) < MIN_BARS or not any(bars):
        return None
    lyrics = [
        [(round(onset - start, 6), text) for onset, text in melody.syllables if -SAME <= onset - start < bar_beats - SAME]
        for start in starts
    ]
    return Tune(
        id=f"{CHORALES}:{path.name}",
        source=CHORALES,
        title=score.title or path.stem,
        composer="J. S. Bach",
        tonic=tonic,
        mode=score.mode,
        meter=meter,
        bar_beats=bar_beats,
        bpm=score.bpm,
        bars=bars,
        chords=None,  # named last, for what passes the screens
        parts=parts,
        lyrics=lyrics if any(lyrics) else None,
        group="",
    )


def _read_all(root: Path) -> Iterator[Tune]:
    for source in ABC_COLLECTIONS:
        for path in sorted((root / source).glob("*.abc")):
            for text in abc_notation.split_file(path):
                tune = _from_abc(text, source, path.name)
                if tune is not None:
                    yield tune
    for path in sorted((root / CHORALES).glob("*.mxl")):
        tune = _from_chorale(path)
        if tune is not None:
            yield tune


# ---- screens ---------------------------------------------------------------------------------------------------------


@functools.cache
def _key_profiles() -> np.ndarray:
    """[24, 12] the major then the minor profile on each tonic, centred and of unit length."""
    rows = [np.roll(profile, tonic) for profile in (KRUMHANSL_MAJOR, KRUMHANSL_MINOR) for tonic in range(12)]
    profiles = np.asarray(rows, dtype=np.float64)
    profiles -= profiles.mean(1, keepdims=True)
    return np.asarray(profiles / np.linalg.norm(profiles, axis=1, keepdims=True))


def estimate_key(notes: Sequence[Note]) -> tuple[int, str]:
    """(tonic, major|minor) whose Krumhansl profile correlates best with how long each pitch class sounds."""
    durations = np.zeros(12)
    for _, duration, midi in notes:
        durations[midi % 12] += duration
    best = int(np.argmax(_key_profiles() @ (durations - durations.mean())))
    return best % 12, "major" if best < 12 else "minor"


def key_ok(tune: Tune) -> bool:
    """Does the notated key agree with what sounds? Screens out wrong labels and tunes that wander off."""
    voices = [tune.bars] if tune.parts is None else tune.parts
    notes = [note for bars in voices for bar in bars for note in bar]
    tonic, mode = estimate_key(notes)
    return tonic == tune.tonic and (mode == "major") == (tune.mode in ("major", "mixolydian"))


def _signature(tune: Tune) -> str:
    """The opening's notes: the same opening is the same piece printed again."""
    opening = [[midi for _, _, midi in bar] for bar in tune.bars[:8]]
    return hashlib.sha256(repr((tune.source == CHORALES, opening)).encode()).hexdigest()[:12]


def _plain_title(title: str) -> str:
    """`The Rakes of Mallow -- a reel` and `Rakes of Mallow, The` -> `rakes of mallow`."""
    text = unicodedata.normalize("NFKD", title.lower()).encode("ascii", "ignore").decode()
    text = re.sub(r"--.*", "", text).strip()
    text = re.sub(r"^(the|a|an)\s+|,\s*(the|a|an)$|[^a-z0-9 ]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _kinship(tune: Tune) -> Iterator[tuple[str, Any]]:
    """What a tune shares with its near-duplicates: its title, or 12 successive intervals of its first four bars."""
    title = _plain_title(tune.title)
    if len(title) > 3 and tune.source != CHORALES:  # chorales share titles but not music
        yield "title", title
    pitches = [midi for bar in tune.bars[:4] for _, _, midi in bar]
    intervals = [after - before for before, after in itertools.pairwise(pitches)]
    for i in range(len(intervals) - THEME_INTERVALS + 1):
        yield "theme", tuple(intervals[i : i + THEME_INTERVALS])


def group_near_duplicates(tunes: Sequence[Tune]) -> list[Tune]:
    """The same tunes with `group` set: tunes that share a title or a theme, and their relatives in turn (union-find)."""
    parent = list(range(len(tunes)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[tuple[str, Any], int] = {}
    for i, tune in enumerate(tunes):
        for mark in _kinship(tune):
            parent[find(i)] = find(owner.setdefault(mark, i))
    # Named after its smallest id, a group keeps its name when the order of reading changes.
    names: dict[int, str] = {}
    for i, tune in enumerate(tunes):
        names[find(i)] = min(names.get(find(i), tune.id), tune.id)
    return [replace(tune, group=names[find(i)]) for i, tune in enumerate(tunes)]


def read_tunes(root: Path) -> list[Tune]:
    """Read and screen every tune under `root` (about 15 s); `load_tunes` is the cached way."""
    first: dict[str, Tune] = {}
    for tune in _read_all(root):
        first.setdefault(_signature(tune), tune)
    ids: set[str] = set()
    unique = []
    for tune in first.values():
        name, n = tune.id, 1
        while name in ids:  # a file may number two tunes alike
            n += 1
            name = f"{tune.id}.{n}"
        ids.add(name)
        unique.append(replace(tune, id=name))
    usable = [tune for tune in unique if key_ok(tune)]
    named = [
        replace(tune, chords=[_chords(voices, tune.bar_beats) for voices in tune.parts]) if tune.parts is not None else tune
        for tune in usable
    ]
    return group_near_duplicates(named)


# ---- cache -----------------------------------------------------------------------------------------------------------


def _tuples(bar: list[list[Any]]) -> list[Any]:
    return [tuple(item) for item in bar]


def _from_json(row: dict[str, Any]) -> Tune:
    return Tune(
        **{
            **row,
            "meter": (row["meter"][0], row["meter"][1]),
            "bars": [_tuples(bar) for bar in row["bars"]],
            "chords": None if row["chords"] is None else [_tuples(bar) for bar in row["chords"]],
            "parts": None if row["parts"] is None else [[_tuples(bar) for bar in voices] for voices in row["parts"]],
            "lyrics": None if row["lyrics"] is None else [_tuples(bar) for bar in row["lyrics"]],
        }
    )


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/encore, or ~/.cache/encore."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encore"


def load_tunes(cache_dir: str | os.PathLike[str] | None = None) -> list[Tune]:
    """Every usable tune, in a fixed order: >= 4 full bars, one key (which agrees with the notes), one metre, no duplicate.

    The first call reads the files; later ones read `<cache_dir>/tunes-<version>.json`. Raises UserError without music21's files.
    """
    root = corpus_root()
    key = f"{VERSION}-{importlib.metadata.version('music21')}"
    cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / f"tunes-{key}.json"
    if cache.is_file():
        try:
            content = json.loads(cache.read_text(encoding="utf-8"))
            return [_from_json(row) for row in content["tunes"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("the cache %s cannot be read (%s) and is built again", cache, error)
    tunes = read_tunes(root)
    with atomic_file(cache) as temporary:
        content = {"version": key, "tunes": [asdict(tune) for tune in tunes]}
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return tunes
