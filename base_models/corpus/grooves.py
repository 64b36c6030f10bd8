"""How each genre plays: a score (melody and chords in beats) and a band become lead, backing, bass and drum tracks.

One function a genre, in `GROOVES`. Velocities 1..127, times in quarter notes.
"""

from __future__ import annotations

from collections.abc import Callable

from .harmony import CHORD_TONES, EPS, Chord, Note, chord_at, voicing
from .phrases import Hit, Played, Score, Stroke, Track, bass_line, comp, drum_loop, fit_range, lead_line, strokes

KICK, RIM, SNARE, CLAP, CLOSED_HAT, PEDAL_HAT, OPEN_HAT, CRASH, RIDE = 36, 37, 38, 39, 42, 44, 46, 49, 51
TAMBOURINE, MARACAS = 54, 70


def _lead(score: Score, notes: list[Note]) -> list[Track]:
    return [Track(notes, score.band.lead.program)]


def _backing(score: Score, notes: list[Note]) -> list[Track]:
    return [Track(notes, score.band.comp.program)]


def _bass(score: Score, notes: list[Note]) -> list[Track]:
    return [] if score.band.bass is None else [Track(notes, score.band.bass.program)]


def _root(chord: Chord, low: int) -> int:
    return low + (chord.root - low) % 12


def jazz(score: Score) -> Played:
    """Swung tune, sparse comping, a walking bass that leans a semitone into the next chord, ride and pedal hat."""
    rng = score.rng
    rhythms: list[list[Hit]] = [
        [(0, 0.9, 0.6), (1.5, 1, 0.4)],
        [(0.5, 0.9, 0.4), (2.5, 1, 0.5)],
        [(1.5, 1, 0.5), (3.5, 0.9, 0.4)],
    ]
    backing = comp(score, rhythms[int(rng.integers(3))], 4, 52, 70, 72)
    walk: list[Note] = []
    for beat in range(int(score.total_beats)):
        chord = chord_at(score.chords, beat) or score.chords[-1]
        following = next((later for later in score.chords if later.onset > beat + EPS), None)
        pitch = _root(chord, 28)
        if abs(beat - chord.onset) > EPS and walk:
            if following is not None and abs(following.onset - (beat + 1)) < EPS:
                pitch = _root(following, 28) + (1 if rng.random() < 0.5 else -1)
            else:
                pitch += int(rng.choice([tone for tone in CHORD_TONES[chord.quality][1:] if tone < 12]))
        walk.append(Note(float(beat), 0.95, pitch, 92))
    pattern = [*strokes("X.XxX.Xx", RIDE, 0.5, 84, 60), (1, PEDAL_HAT, 70), (3, PEDAL_HAT, 70)]
    pattern += [(beat, KICK, 42) for beat in range(4)]
    if rng.random() < 0.7:
        pattern.append((float(rng.choice([1.5, 2.5, 3.5])), SNARE, 46))
    lead = lead_line(score, length=0.9)
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, walk), drum_loop(score, pattern, 4))


def bossa(score: Score) -> Played:
    """Two-bar syncopated guitar, root and fifth on a dotted rhythm, rim clave."""
    rhythm: list[Hit] = [(0, 1, 0.7), (1.5, 1, 0.7), (3, 0.9, 0.7), (4.5, 1, 0.7), (6.5, 0.95, 0.9)]
    backing = comp(score, rhythm, 8, 52, 69, 74, strum=0.012)
    bass = bass_line(score, [(0, 1.4), (1.5, 0.5), (2, 1.4), (3.5, 0.5)], 4, 31, 90, fifths=(1, 2))
    bar = strokes("XxXxXxXx", CLOSED_HAT, 0.5, 58, 44)
    bar += [(0, KICK, 72), (1.5, KICK, 60), (2, KICK, 72), (3.5, KICK, 60)]
    pattern = bar + [(beat + 4, drum, velocity) for beat, drum, velocity in bar]
    pattern += [(beat, RIM, 74) for beat in (0, 1.5, 3, 5, 6.5)]
    lead = [note._replace(velocity=note.velocity - 6) for note in lead_line(score, length=0.95)]
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drum_loop(score, pattern, 8))


def techno(score: Score) -> Played:
    """Four on the floor, off-beat hats, sixteenth bass around the kick, short echoed lead, stabs."""
    rng = score.rng
    tune = lead_line(score, grid=0.5)
    lead = [note._replace(length=min(note.length, 0.24), velocity=96 if note.onset % 1 < 0.01 else 84) for note in tune]
    lead += [Note(note.onset + 0.25, 0.2, note.pitch, 64) for note in tune if rng.random() < 0.5]
    stabs: list[list[Hit]] = [
        [(0.5, 1, 0.3), (1.75, 0.8, 0.25), (2.5, 1, 0.3)],
        [(0.75, 1, 0.3), (2.25, 1, 0.3), (3.5, 0.8, 0.25)],
    ]
    backing = comp(score, stabs[int(rng.random() < 0.5)], 4, 55, 72, 84)
    sixteenths = [(beat + part, 0.22) for beat in range(4) for part in (0.25, 0.5, 0.75)]
    bass = bass_line(score, sixteenths, 4, 29, 100)
    pattern: list[Stroke] = [(beat, KICK, 118) for beat in range(4)] + [(beat + 0.5, OPEN_HAT, 84) for beat in range(4)]
    pattern += [*strokes("xXxXxXxXxXxXxXxX", CLOSED_HAT, 0.25, 52, 40), (1, CLAP, 92), (3, CLAP, 92)]
    if rng.random() < 0.5:
        pattern.append((3.75, SNARE, 60))
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drum_loop(score, pattern, 4))


def house(score: Score) -> Played:
    """Four on the floor with claps and open hats, syncopated piano chords, off-beat bass."""
    lead = [note._replace(length=min(note.length, 0.9)) for note in lead_line(score, grid=0.5, velocity=86)]
    rhythm: list[Hit] = [(0, 1, 0.4), (0.75, 0.9, 0.4), (1.5, 1, 0.4), (2.5, 1, 0.4), (3.25, 0.9, 0.4)]
    backing = comp(score, rhythm, 4, 55, 74, 92)
    bass = bass_line(score, [(0.5, 0.4), (1.5, 0.4), (2.5, 0.4), (3.5, 0.4), (3.75, 0.2)], 4, 31, 102)
    pattern: list[Stroke] = [(beat, KICK, 114) for beat in range(4)] + [(beat + 0.5, OPEN_HAT, 92) for beat in range(4)]
    pattern += [(1, CLAP, 100), (3, CLAP, 100)] + [(half * 0.5, MARACAS, 50) for half in range(8)]
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drum_loop(score, pattern, 4))


def cinematic(score: Score) -> Played:
    """Long lead over sustained strings; bands with percussion add a string ostinato, timpani and an opening crash."""
    band, bar = score.band, score.bar_beats
    lead = lead_line(score, grid=1.5 if score.meter == (6, 8) else 1.0, length=1.02, velocity=100)
    pads: list[Note] = []
    previous: list[int] | None = None
    for chord in score.chords:
        previous = voicing(chord.root, chord.quality, 50, 72, previous)
        pads += [Note(chord.onset, chord.length * 1.03, pitch, 78) for pitch in previous]
    low = 36 if band.bass is not None and band.bass.program == 43 else 24
    bass = [Note(chord.onset, chord.length, low + (chord.root - 24) % 12, 88) for chord in score.chords]
    backing, drums = [Track(pads, band.comp.program)], []
    if band.kit is not None:
        ostinato: list[Note] = []
        for chord in score.chords:
            tones = voicing(chord.root, chord.quality, 60, 79)
            for i in range(int(chord.length / 0.5)):
                pitch = tones[(0, 2, 1, 2)[i % 4] % len(tones)]
                ostinato.append(Note(chord.onset + i * 0.5, 0.4, pitch, 70 if i % 2 else 82))
        backing.append(Track(ostinato, 45))
        bars = range(int(score.total_beats // bar))
        timpani = [Note(chord.onset, 1.5, _root(chord, 36), 96) for chord in score.chords]
        timpani += [Note(i * bar + bar - 0.5, 0.3, _root(score.chords[0], 36), 80) for i in bars]
        booms = [Note(i * bar, 0.5, KICK, 100) for i in bars] + [Note(0, 2, CRASH, 90)]
        drums = [Track(timpani, 47), Track(booms, band.kit, is_drum=True)]
    return Played(_lead(score, lead), backing, _bass(score, bass), drums)


def rock(score: Score) -> Played:
    """Power chords in eighths (heavy kit) or a syncopated strum, driving bass, back-beat, opening crash."""
    band = score.band
    heavy = band.kit == 16
    eighths: list[Hit] = [(i * 0.5, 1 if i % 2 == 0 else 0.85, 0.42) for i in range(8)]
    strummed: list[Hit] = [(0, 1, 0.9), (1, 0.8, 0.4), (1.5, 0.9, 0.4), (2.5, 0.9, 0.4), (3, 1, 0.9)]
    backing = comp(score, eighths if heavy else strummed, 4, 40, 57, 96, quality="5")
    bass = bass_line(score, [(i * 0.5, 0.45) for i in range(8)], 4, 28, 104)
    pattern: list[Stroke] = [(0, KICK, 116), (2, KICK, 112), (2.5, KICK, 100), (1, SNARE, 116), (3, SNARE, 116)]
    pattern += strokes("XxXxXxXx", OPEN_HAT if heavy else CLOSED_HAT, 0.5, 88, 72)
    if band.bpm_range[0] >= 150:  # double-time kick for the fastest band
        pattern += [(i * 0.5, KICK, 100) for i in range(8)]
    drums = drum_loop(score, pattern, 4)
    drums[0].notes.insert(0, Note(0, 1, CRASH, 108))
    lead = lead_line(score, length=0.95, velocity=100)
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drums)


def folk(score: Score) -> Played:
    """The tune as written over a strummed or picked rhythm that follows its metre."""
    jig, waltz = score.meter == (6, 8), score.bar_beats == 3
    hits: list[Hit]
    if jig:
        hits, cycle = [(0, 1, 0.9), (1, 0.6, 0.4), (1.5, 0.9, 0.9), (2.5, 0.6, 0.4)], 3
    elif waltz:
        hits, cycle = [(0, 1, 0.9), (1, 0.75, 0.8), (2, 0.75, 0.8)], 3
    elif score.band.comp.program == 25:  # steel guitar strums, the banjo rolls
        hits = [(0, 1, 0.9), (1, 0.75, 0.5), (1.5, 0.6, 0.4), (2, 0.95, 0.9), (3, 0.75, 0.5), (3.5, 0.6, 0.4)]
        cycle = 4
    else:
        hits, cycle = [(i * 0.5, 1 if i % 2 == 0 else 0.7, 0.4) for i in range(8)], 4
    backing = comp(score, hits, cycle, 52, 71, 76, strum=0.02)
    bass_hits = [(0.0, 1.5)] if waltz and not jig else [(0.0, 0.9), (cycle / 2, 0.9)]
    bass = bass_line(score, bass_hits, cycle, 31, 86, fifths=(1,))
    pattern: list[Stroke] = [(0, KICK, 64), (2, KICK, 60), (1, SNARE, 52), (3, SNARE, 54)]
    pattern += strokes(".x.x.x.x", TAMBOURINE, 0.5, 44)
    drums = drum_loop(score, pattern, 4) if cycle == 4 else []
    lead = [note._replace(velocity=note.velocity + 4) for note in lead_line(score, length=0.96)]
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drums)


def ambient(score: Score) -> Played:
    """A slow line over pads; no pulse."""
    grid = 2.0 if score.bar_beats % 2 == 0 else score.bar_beats / 2
    pads: list[Note] = []
    for chord in score.chords:
        pads += [Note(chord.onset, chord.length * 1.1, pitch, 60) for pitch in voicing(chord.root, chord.quality, 48, 70)]
        pads.append(Note(chord.onset, chord.length * 1.1, _root(chord, 36), 56))
    bass = [Note(chord.onset, chord.length, _root(chord, 28), 70) for chord in score.chords]
    lead = lead_line(score, grid=grid, length=1.2, velocity=62)
    return Played(_lead(score, lead), _backing(score, pads), _bass(score, bass))


def lofi(score: Score) -> Played:
    """Late, strummed chords, a lazy back-beat with a swung kick."""
    backing = comp(score, [(0, 1, 1.4), (1.5, 0.8, 0.5), (2.5, 0.9, 1.2)], 4, 52, 71, 66, strum=0.025)
    bass = bass_line(score, [(0, 1.3), (1.75, 0.25), (2, 0.9), (3.5, 0.4)], 4, 31, 92, fifths=(3,))
    pattern: list[Stroke] = [(0, KICK, 104), (1.75, KICK, 80), (2.5, KICK, 92), (1, SNARE, 88), (3, SNARE, 88)]
    pattern += strokes("XxXxXxXx", CLOSED_HAT, 0.5, 60, 42)
    lead = lead_line(score, grid=0.5, length=0.9, velocity=70)
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drum_loop(score, pattern, 4))


def _four_voices(score: Score, voices: list[list[Note]], alto: int, tenor: int) -> Played:
    """The piece's own soprano, alto, tenor and bass."""
    backing = [Track(voices[1], alto), Track(voices[2], tenor)]
    return Played(_lead(score, voices[0]), backing, _bass(score, voices[3]))


def chamber(score: Score) -> Played:
    """Four real voices where the piece has them; else the tune over a broken-chord accompaniment and a cello line."""
    strings = score.band.comp.program == 48
    program = score.band.comp.program
    if score.voices is not None:
        return _four_voices(score, score.voices, 40 if strings else program, 41 if strings else program)
    figure: list[Note] = []
    for chord in score.chords:
        tones = voicing(chord.root, chord.quality, 52, 69)
        for i in range(round(chord.length / 0.5)):
            figure.append(Note(chord.onset + i * 0.5, 0.48, tones[(0, -1, 1, -1)[i % 4] % len(tones)], 66))
    bar = score.bar_beats
    bass = bass_line(score, [(0, 1.9)] if bar == 3 else [(0, 0.9), (bar / 2, 0.9)], bar, 38, 78)
    lead = [note._replace(length=note.length * 0.95, velocity=90) for note in fit_range(score.melody, 60, 86)]
    return Played(_lead(score, lead), [Track(figure, 41 if strings else program)], _bass(score, bass))


def choral(score: Score) -> Played:
    """Four real voices."""
    if score.voices is None:
        raise ValueError("choral music needs a piece with four voices")
    return _four_voices(score, score.voices, score.band.comp.program, score.band.comp.program)


def reggae(score: Score) -> Played:
    """Off-beat skank (guitar) or bubble (organ), a heavy bass that leaves room, one-drop kick."""
    skank: list[Hit] = [(1, 1, 0.22), (3, 1, 0.22)]
    bubble: list[Hit] = [
        (0.5, 0.8, 0.2), (1, 1, 0.2), (1.5, 0.7, 0.2), (2.5, 0.8, 0.2), (3, 1, 0.2), (3.5, 0.7, 0.2)
    ]  # fmt: skip
    backing = comp(score, skank if score.band.comp.program == 28 else bubble, 4, 55, 72, 94)
    bass = bass_line(score, [(0, 0.9), (1.5, 0.4), (2, 0.4), (2.5, 0.9)], 4, 28, 108, fifths=(1, 3))
    pattern: list[Stroke] = [(2, KICK, 112), (2, RIM, 104)]
    pattern += strokes("XxXxXxXx", CLOSED_HAT, 0.5, 72, 52)
    lead = lead_line(score, grid=0.5, length=0.9, velocity=86)
    return Played(_lead(score, lead), _backing(score, backing), _bass(score, bass), drum_loop(score, pattern, 4))


GROOVES: dict[str, Callable[[Score], Played]] = {
    "jazz": jazz,
    "bossa": bossa,
    "techno": techno,
    "house": house,
    "cinematic": cinematic,
    "rock": rock,
    "folk": folk,
    "ambient": ambient,
    "lofi": lofi,
    "chamber": chamber,
    "choral": choral,
    "reggae": reggae,
}
