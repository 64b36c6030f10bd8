"""The readers understand what the notation says; what load_tunes returns keeps its promises."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest

from base_models.corpus import abc_notation, musicxml, tunes
from base_models.corpus.tunes import Tune
from base_models.errors import UserError


def read(body: str, key: str = "C", meter: str = "4/4", unit: str = "1/8", extra: str = "") -> abc_notation.AbcTune:
    tune = abc_notation.parse_tune(f"X:1\nT:Test\nM:{meter}\nL:{unit}\n{extra}K:{key}\n{body}\n")
    assert tune is not None
    return tune


def pitches(tune: abc_notation.AbcTune) -> list[list[int | None]]:
    return [[midi for _, _, midi in bar.notes] for bar in tune.bars]


def durations(tune: abc_notation.AbcTune) -> list[list[Fraction]]:
    return [[duration for _, duration, _ in bar.notes] for bar in tune.bars]


# ---- ABC -------------------------------------------------------------------------------------------------------------


def test_octaves_and_accidentals_follow_the_standard() -> None:
    assert pitches(read("C, C c c' ^F _B =F z")) == [[48, 60, 72, 84, 66, 70, 65, None]]


@pytest.mark.parametrize(
    ("key", "tonic", "mode", "f", "c", "b"),
    [
        ("C", 0, "major", 65, 60, 71),
        ("G", 7, "major", 66, 60, 71),
        ("D", 2, "major", 66, 61, 71),
        ("F", 5, "major", 65, 60, 70),
        ("Am", 9, "minor", 65, 60, 71),
        ("Edor", 4, "dorian", 66, 61, 71),
        ("A Mixolydian", 9, "mixolydian", 66, 61, 71),
        ("Bb", 10, "major", 65, 60, 70),
        ("C#", 1, "major", 66, 61, 72),
        ("HP", 9, "mixolydian", 66, 61, 71),
    ],
)
def test_a_key_signature_moves_its_notes(key: str, tonic: int, mode: str, f: int, c: int, b: int) -> None:
    tune = read("F C B", key=key)
    assert (tune.tonic, tune.mode) == (tonic, mode)
    assert pitches(tune) == [[f, c, b]]


def test_an_accidental_lasts_to_the_end_of_its_bar() -> None:
    assert pitches(read("^F F | F")) == [[66, 66], [65]]


def test_lengths_multiply_and_divide_the_unit() -> None:
    assert durations(read("C C2 C/ C// C3/2")) == [[Fraction(n) for n in ("1/2", "1", "1/4", "1/8", "3/4")]]


def test_broken_rhythm_moves_time_from_one_note_to_the_next() -> None:
    tune = read("C>D C<D C>>D")
    assert durations(tune) == [[Fraction(n, 16) for n in (12, 4, 4, 12, 14, 2)]]
    assert tune.bars[0].length == 3


def test_a_triplet_takes_the_time_of_two() -> None:
    tune = read("(3CDE F (3:2:2CD")
    assert durations(tune)[0] == [Fraction(1, 3)] * 3 + [Fraction(1, 2)] + [Fraction(1, 3)] * 2


def test_a_tie_joins_notes_within_a_bar_and_repeats_them_across() -> None:
    tune = read("C2-C2 E4- | E8")
    assert durations(tune) == [[2, 2], [4]]
    assert pitches(tune) == [[60, 64], [64]]


def test_only_the_first_voice_and_the_top_of_a_chord_are_read() -> None:
    assert pitches(read("V:1\n[CEG]4 C4 |\nV:2\nG,8 |\nV:1\nD8 |\n[V:2] A,8 |[V:1] E8 |")) == [[67, 60], [62], [64]]


def test_what_does_not_sound_is_skipped() -> None:
    assert pitches(read('"Am"C {g}D !trill!E .F ~G % a remark')) == [[60, 62, 64, 65, 67]]


def test_what_follows_a_bar_line_at_once_is_read() -> None:
    assert pitches(read("C8 |[CE]8 |1 F8 :|[2 G8 |]")) == [[60], [64], [65], [67]]


def test_a_tempo_is_told_in_quarter_notes() -> None:
    assert read("C", extra="Q:3/8=80\n").bpm == 120
    assert read("C", extra='Q:"slow"\n').bpm is None


def test_changes_of_key_and_metre_are_noticed() -> None:
    assert read("C8 |[K:G] F8").changes_key
    assert read("C8 |\nM:3/4\nF6").changes_meter
    assert not read("C8 |\nL:1/4\nF4").changes_key


@pytest.mark.parametrize("header", ["K:none", "K:Hnonsense", "M:free\nK:C", "M:0/4\nK:C", "M:2+3/8\nK:C", "T:no key"])
def test_a_tune_without_key_or_metre_is_none(header: str) -> None:
    assert abc_notation.parse_tune(f"X:1\n{header}\nCDEF|\n") is None


# ---- MusicXML --------------------------------------------------------------------------------------------------------

SCORE = """<?xml version="1.0"?><score-partwise><movement-title>Test</movement-title>
<part-list><score-part id="P1"><part-name>Soprano</part-name></score-part></part-list><part id="P1">
<measure><attributes><divisions>2</divisions><key><fifths>-1</fifths><mode>minor</mode></key>
<time><beats>2</beats><beat-type>4</beat-type></time><transpose><chromatic>-2</chromatic></transpose></attributes>
<sound tempo="90"/>
<note><grace/><pitch><step>A</step><octave>4</octave></pitch></note>
<note><pitch><step>E</step><octave>4</octave></pitch><duration>2</duration><lyric><text>Ach</text></lyric></note>
<note><chord/><pitch><step>G</step><alter>1</alter><octave>4</octave></pitch><duration>2</duration></note>
<note><pitch><step>C</step><octave>5</octave></pitch><duration>2</duration><tie type="start"/></note>
<backup><duration>4</duration></backup><note><rest/><duration>4</duration></note></measure>
<measure><note><pitch><step>C</step><octave>5</octave></pitch><duration>2</duration><tie type="stop"/></note>
<note><pitch><step>C</step><octave>5</octave></pitch><duration>2</duration></note></measure></part></score-partwise>"""


@pytest.mark.parametrize("suffix", [".musicxml", ".mxl"])
def test_a_score_is_read_with_its_ties_chords_transposition_and_words(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".mxl":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("META-INF/container.xml", "<container/>")
            archive.writestr("a.xml", SCORE)
    else:
        path.write_text(SCORE)
    score = musicxml.read_score(path)
    assert (score.title, score.tonic, score.mode, score.meter, score.bpm) == ("Test", 2, "minor", (2, 4), 90)
    part = score.parts[0]
    assert part.name == "Soprano"
    assert part.notes == [(0, 1, 62), (0, 1, 66), (1, 2, 70), (3, 1, 70)]
    assert part.syllables == [(0, "Ach")]
    assert [(measure.start, measure.length) for measure in part.measures] == [(0, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', ValueError),
        ("a.mxl", b"no archive", zipfile.BadZipFile),
        ("a.xml", b"<a", musicxml.ElementTree.ParseError),
    ],
)
def test_a_score_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, error: type[Exception]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        musicxml.read_score(tmp_path / name)


# ---- screens ---------------------------------------------------------------------------------------------------------

SCALE = "CDEF GABc|c4 G4|E4 G4|C8|"


def collection(root: Path, *bodies: str, source: str = "oneills1850") -> Path:
    """A data folder that holds these tunes in one file: `title|header fields|notes`."""
    (root / source).mkdir(parents=True, exist_ok=True)
    texts = []
    for i, body in enumerate(bodies):
        title, fields, notes = body.split("|", 2)
        texts.append(f"X:{i + 1}\nT:{title}\nM:4/4\nL:1/8\n{fields or 'K:C'}\n{notes}\n")
    (root / source / "book.abc").write_text("\n".join(texts), encoding="latin-1")
    return root


def test_only_whole_bars_in_one_key_that_the_notes_agree_with_are_kept(tmp_path: Path) -> None:
    root = collection(
        tmp_path,
        f"Good||{SCALE}",
        f"Wrong key|K:F#|{SCALE}",
        f"Changing key||{SCALE}[K:G]{SCALE}",
        "Too short||CDEF GABc|c4 G4|C8|",
        "Broken bars||CDEF|c4 G4|E4 G4|C8|GG|CEGc|c8|",
        f"Unheard mode|K:Clyd|{SCALE}",
    )
    assert [tune.title for tune in tunes.read_tunes(root)] == ["Good"]


def test_a_bar_cut_in_two_by_a_repeat_is_one_bar(tmp_path: Path) -> None:
    [tune] = tunes.read_tunes(collection(tmp_path, "Pickup||G2|CDEF GABc|c4 G4|E4 C2:|:G2|c8|C8|"))
    assert len(tune.bars) == 5
    assert tune.bars[2] == [(0.0, 2.0, 64), (2.0, 1.0, 60), (3.0, 1.0, 67)]


def test_exact_duplicates_go_and_near_duplicates_share_a_group(tmp_path: Path) -> None:
    root = collection(
        tmp_path,
        f"The Rakes||{SCALE}",
        f"Printed again||{SCALE}",  # the same notes
        "Rakes, The||EDCD E2G2|c4 G4|E4 G4|C8|",  # the same title
        "Elsewhere|K:D|DEFG ABcd|d4 A4|F4 A4|D8|",  # the same theme in another key
        "Unrelated||G2E2 C2E2|G2c2 G4|D2F2 G2A2|c8|",
    )
    found = {tune.title: tune for tune in tunes.read_tunes(root)}
    assert set(found) == {"The Rakes", "Rakes, The", "Elsewhere", "Unrelated"}
    assert found["The Rakes"].group == found["Rakes, The"].group == found["Elsewhere"].group
    assert found["Unrelated"].group != found["The Rakes"].group


def test_two_tunes_numbered_alike_get_different_ids(tmp_path: Path) -> None:
    root = collection(tmp_path, f"One||{SCALE}", "Two||G2E2 C2E2|G2c2 G4|D2F2 G2A2|c8|")
    path = root / "oneills1850" / "book.abc"
    path.write_text(path.read_text().replace("X:2", "X:1"))
    assert len({tune.id for tune in tunes.read_tunes(root)}) == 2


def test_a_chord_is_named_after_what_sounds() -> None:
    def weights(*classes: int) -> tuple[float, ...]:
        return tuple(1.0 if i in classes else 0.0 for i in range(12))

    assert tunes._chord(weights(0, 4, 7), 48) == (0, "maj")
    assert tunes._chord(weights(9, 0, 4), 45) == (9, "min")
    assert tunes._chord(weights(7, 11, 2, 5), 43) == (7, "7")
    assert tunes._chord(weights(0, 4, 7), 52) == (0, "maj")  # first inversion


def test_a_key_is_recognised_from_its_scale() -> None:
    assert tunes.estimate_key([(0, 2 if p in (60, 67) else 1, p) for p in (60, 62, 64, 65, 67, 69, 71)]) == (0, "major")
    assert tunes.estimate_key([(0, 2 if p in (62, 69) else 1, p) for p in (62, 64, 65, 67, 69, 70, 73)]) == (2, "minor")


# ---- the real files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tune]]:
    cache = tmp_path_factory.mktemp("tunes")
    return cache, tunes.load_tunes(cache)


def test_thousands_of_tunes_in_thousands_of_groups_are_found(loaded: tuple[Path, list[Tune]]) -> None:
    _, found = loaded
    assert len(found) >= 3000
    assert len({tune.group for tune in found}) >= 2500
    assert {tune.source for tune in found} == {*tunes.ABC_COLLECTIONS, "bach"}
    assert sum(tune.mode in ("minor", "dorian") for tune in found) >= 300


def test_every_tune_keeps_the_promises_of_its_fields(loaded: tuple[Path, list[Tune]]) -> None:
    _, found = loaded
    assert len({tune.id for tune in found}) == len(found)
    for tune in found:
        assert len(tune.bars) >= 4
        assert tune.title
        assert tune.composer
        assert 0 <= tune.tonic <= 11
        assert tune.mode in tunes.MODES
        assert tune.bar_beats == tune.meter[0] * 4 / tune.meter[1]
        for bar in [*tune.bars, *(voice for voices in tune.parts or [] for voice in voices)]:
            for onset, duration, midi in bar:
                assert 0 <= onset < tune.bar_beats
                assert 0 < duration <= tune.bar_beats - onset + 1e-5
                assert 21 <= midi <= 108
        for rows in (tune.chords, tune.parts, tune.lyrics):
            assert rows is None or len(rows) == len(tune.bars)


def test_chorales_have_four_real_parts_their_harmony_and_words(loaded: tuple[Path, list[Tune]]) -> None:
    _, found = loaded
    chorales = [tune for tune in found if tune.source == "bach"]
    assert len(chorales) >= 100
    assert sum(tune.lyrics is not None for tune in chorales) >= 80
    for tune in chorales:
        assert tune.parts is not None
        assert tune.chords is not None
        assert all(len(voices) == 4 for voices in tune.parts)
        assert all(voices[0] == bar for voices, bar in zip(tune.parts, tune.bars))
        assert all(0 <= beat < tune.bar_beats and q in tunes.CHORD_TONES for bar in tune.chords for beat, _, q in bar)


def test_the_second_call_returns_the_same_tunes_from_the_cache(loaded: tuple[Path, list[Tune]], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, found = loaded
    monkeypatch.setattr(tunes, "read_tunes", None)  # calling it would raise
    assert tunes.load_tunes(cache) == found


def test_a_damaged_cache_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = collection(tmp_path / "data", f"Good||{SCALE}")
    monkeypatch.setattr(tunes, "corpus_root", lambda: root)
    first = tunes.load_tunes(tmp_path / "cache")
    [cache] = (tmp_path / "cache").iterdir()
    whole = cache.read_text()
    cache.write_text(whole[: len(whole) // 2])
    assert tunes.load_tunes(tmp_path / "cache") == first
    assert cache.read_text() == whole


def test_without_the_data_files_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'music21"):
        tunes.load_tunes()


def test_neither_music21_nor_torch_is_imported(loaded: tuple[Path, list[Tune]]) -> None:
    code = (
        "import sys; from base_models.corpus.tunes import load_tunes; load_tunes(sys.argv[1]);"
        "sys.exit(any(m in sys.modules for m in ('music21', 'torch')))"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code, str(loaded[0])], cwd=root, check=False).returncode == 0
