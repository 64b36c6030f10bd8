"""A folder of music becomes a corpus; whatever cannot be used is left out by name and reason; nothing is half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from base_models import audio
from base_models.corpus import importer
from base_models.corpus.importer import ImportReport, import_folder, split_of
from base_models.corpus.manifest import read_manifest
from base_models.errors import UserError


def noise(seed: int, sr: int = 16000, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, round(sr * seconds))).astype(np.float32)


class Music:
    """A folder being filled: `add` writes a clip and its row, `row` a row alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        folder.mkdir(parents=True)

    def add(self, name: str, *, seed: int | None = None, sr: int = 16000, channels: int = 1, **fields: Any) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        audio.write_audio(self.folder / name, noise(self.rows if seed is None else seed, sr, channels=channels), sr)
        self.row(file_name=name, **{"caption": f"clip {self.rows}"} | fields)

    def row(self, **fields: Any) -> None:
        self.line(json.dumps(fields, ensure_ascii=False))

    def line(self, text: str) -> None:
        self.rows += 1
        with (self.folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


@pytest.fixture
def music(tmp_path: Path) -> Music:
    return Music(tmp_path / "music")


def run(music: Music, **options: Any) -> ImportReport:
    return import_folder(music.folder, music.folder.parent / "out", progress=False, workers=1, **options)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_every_format_is_imported_resampled_and_read_back(music: Music) -> None:
    for i, suffix in enumerate(("wav", "flac", "ogg", "mp3")):
        music.add(f"clip{i}.{suffix}", sr=44100, channels=2, genre="jazz", tempo_bpm=100 + i, instruments=["piano"])
    report = run(music)
    assert report.left_out == []
    rows = read_manifest(report.out)
    assert rows == report.kept
    assert [row.tempo_bpm for row in rows] == [100, 101, 102, 103]
    for i, row in enumerate(rows):
        wav, rate = audio.read_audio(report.out / row.file_name)
        assert (rate, row.sample_rate, wav.shape[0]) == (16000, 16000, 1)
        assert row.duration_s == pytest.approx(wav.shape[1] / 16000)
        assert row.duration_s == pytest.approx(0.5, abs=0.01)
        assert row.file_name.startswith(f"{row.split}/")
        assert row.extra["instruments"] == ["piano"]
        assert row.extra["imported_from"].startswith(f"clip{i}.")
    assert ("*", "4 clips resampled from 44100 to 16000 Hz") in report.notes


def test_stereo_is_kept_where_it_is_wanted(music: Music) -> None:
    music.add("a.wav", channels=2)
    report = run(music, mono=False)
    assert audio.probe(report.out / report.kept[0].file_name).channels == 2


def test_stems_are_imported_with_their_mix(music: Music) -> None:
    audio.write_audio(music.folder / "drums.wav", noise(7, 44100), 44100)
    music.add("mix.wav", stems={"drums & bass": "drums.wav"})
    report = run(music)
    [row] = report.kept
    [(stem, name)] = row.stems.items()
    assert stem == "drums & bass"
    assert audio.probe(report.out / name).sample_rate == 16000
    assert report.left_out == []  # a stem needs no row of its own


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_match_however_they_are_encoded(music: Music, form: str) -> None:
    on_disk, in_metadata = ("NFD", "NFC") if form == "NFC" else ("NFC", "NFD")
    audio.write_audio(music.folder / unicodedata.normalize(on_disk, "Übung 音楽.wav"), noise(1), 16000)
    music.row(file_name=unicodedata.normalize(in_metadata, "Übung 音楽.wav"), caption="é")
    report = run(music)
    assert len(report.kept) == 1
    assert report.left_out == []


def test_peaks_beyond_full_scale_are_turned_down_not_clipped(music: Music) -> None:
    soundfile.write(music.folder / "hot.wav", noise(1)[0] * 4, 16000, subtype="FLOAT")
    music.row(file_name="hot.wav", caption="hot")
    report = run(music)
    wav, _ = audio.read_audio(report.out / report.kept[0].file_name)
    assert np.corrcoef(wav[0], noise(1)[0])[0, 1] > 0.9999
    assert any("above full scale" in note for _, note in report.notes)


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_each_kind_of_bad_row_and_file_is_left_out_with_its_reason(music: Music) -> None:
    music.add("good.wav")
    content = (music.folder / "good.wav").read_bytes()

    def file(name: str, data: bytes) -> None:
        (music.folder / name).write_bytes(data)
        music.row(file_name=name, caption="x")

    file("zero.wav", b"")
    file("corrupt.mp3", b"no sound " * 50)
    file("half.wav", content[: len(content) // 2])
    soundfile.write(music.folder / "nan.wav", np.array([0.1, math.nan]), 16000, subtype="FLOAT")
    music.row(file_name="nan.wav", caption="x")
    soundfile.write(music.folder / "long.wav", noise(3, seconds=3)[0], 16000)
    music.row(file_name="long.wav", caption="x")
    file("silent.wav", b"")
    audio.write_audio(music.folder / "silent.wav", np.zeros((1, 8000)), 16000)
    shutil.copy(music.folder / "good.wav", music.folder / "copy.wav")
    music.row(file_name="copy.wav", caption="x")
    soundfile.write(music.folder / "again.flac", *soundfile.read(music.folder / "good.wav", dtype="int16"))
    music.row(file_name="again.flac", caption="the same audio in another format")
    music.row(file_name="good.wav", caption="listed again")
    music.row(file_name="missing.wav", caption="x")
    music.row(file_name="../outside.wav", caption="x")
    music.row(file_name="/absolute.wav", caption="x")
    music.add("uncaptioned.wav", caption="")
    music.add("tempo.wav", tempo_bpm="fast")
    music.add("split.wav", split="holdout")
    file("notes.txt", b"not audio")
    music.line("{broken json")
    audio.write_audio(music.folder / "unlisted.wav", noise(50), 16000)
    outside = music.folder.parent / "secret.wav"
    audio.write_audio(outside, noise(60), 16000)
    (music.folder / "link.wav").symlink_to(outside)
    music.row(file_name="link.wav", caption="x")
    music.add("stem.wav", stems={"bass": "nothere.wav"})

    report = run(music, max_duration_s=2)
    kinds = {(name, reason.split(":")[0]) for name, reason in report.left_out}
    lines = {name for name, _ in kinds if name.startswith("metadata.jsonl line")}
    assert len(lines) == 1
    assert kinds == {
        ("zero.wav", "zero-length"),
        ("corrupt.mp3", "corrupt"),
        ("half.wav", "cut short"),
        ("nan.wav", "not finite"),
        ("long.wav", "too long"),
        ("silent.wav", "silent"),
        ("copy.wav", "duplicate"),
        ("again.flac", "duplicate"),
        ("good.wav", "listed twice"),
        ("missing.wav", "missing"),
        ("../outside.wav", "path leads out of the folder"),
        ("/absolute.wav", "path leads out of the folder"),
        ("uncaptioned.wav", "caption missing"),
        ("tempo.wav", "bad row"),
        ("split.wav", "unknown split"),
        ("notes.txt", "unknown format"),
        (lines.pop(), "bad row"),
        ("unlisted.wav", "not listed"),
        ("link.wav", "path leads out of the folder"),
        ("stem.wav", "missing"),
    }
    assert [row.extra["imported_from"] for row in report.kept] == ["good.wav"]
    written = sorted(path.relative_to(report.out).as_posix() for path in report.out.rglob("*") if path.is_file())
    assert written == ["import.json", "metadata.jsonl", "train/000000.flac"]
    assert len(json.loads((report.out / "import.json").read_text())["left_out"]) == 20
    assert "uncaptioned.wav: caption missing" in report.summary()


def test_an_unknown_genre_is_kept_and_noted_unless_genres_are_strict(music: Music) -> None:
    music.add("a.wav", genre="polka")
    music.add("b.wav", genre="Bossa Nova")
    music.add("c.wav", genre="Lo-Fi")
    report = run(music)
    assert [row.genre for row in report.kept] == ["polka", "Bossa Nova", "Lo-Fi"]
    assert ("*", "unknown genre 'polka' kept in 1 clips") in report.notes
    strict = run(music, strict_genres=True)
    assert strict.left_out == [("a.wav", "unknown genre: 'polka'")]
    assert len(strict.kept) == 2


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_a_piece_lies_in_one_split_and_each_split_has_some(music: Music) -> None:
    for i in range(24):
        music.add(f"{i}.wav", artist=f"artist {i // 4}", title=f"piece {i // 2}")
    report = run(music, val_share=0.2, test_share=0.2)
    groups: dict[str | None, set[str | None]] = {}
    for row in report.kept:
        groups.setdefault(row.group, set()).add(row.split)
    assert len(groups) == 12
    assert all(len(splits) == 1 for splits in groups.values())
    assert set(report.splits) == {"train", "val", "test_piece"}


def test_a_growing_corpus_moves_no_piece_from_one_split_to_another() -> None:
    shares = [split_of(f"piece {i}", 0.06, 0.1) for i in range(5000)]
    assert shares.count("val") / 5000 == pytest.approx(0.06, abs=0.015)
    assert shares.count("test_piece") / 5000 == pytest.approx(0.10, abs=0.015)
    assert split_of("Piece É", 0.06, 0.1) == split_of(unicodedata.normalize("NFD", "piece é"), 0.06, 0.1)
    assert split_of("fixed", 0.5, 0.25) == "val"  # SHA-256, so the same on every machine and in every run


def test_splits_that_the_rows_name_are_kept(music: Music) -> None:
    for i, split in enumerate(("train", "validation", "test", "test_combo")):
        music.add(f"{i}.wav", split=split)
    assert [row.split for row in run(music).kept] == ["train", "val", "test_piece", "test_combo"]


def test_a_group_across_several_named_splits_is_noted(music: Music) -> None:
    music.add("a.wav", split="train", group="one")
    music.add("b.wav", split="test", group="one")
    assert any("'one' lies in several splits" in note for _, note in run(music).notes)


def test_clips_of_one_folder_stay_together_where_there_are_many_folders(music: Music) -> None:
    for i in range(12):
        music.add(f"album {i // 3}/{i}.wav")
    assert {row.group for row in run(music).kept} == {f"album {i}" for i in range(4)}


@pytest.mark.parametrize("group", [f"g{i}" for i in range(12)])
def test_a_single_piece_is_trained_on_wherever_its_hash_falls(music: Music, group: str) -> None:
    music.add("a.wav", group=group)
    report = run(music, val_share=0.3, test_share=0.5)
    assert report.splits == {"train": 1}
    assert (report.out / report.kept[0].file_name).is_file()


def test_two_imports_are_the_same_whatever_the_number_of_workers(music: Music) -> None:
    for i in range(6):
        music.add(f"{i}.wav", seed=i % 4)
    one = run(music)
    two = import_folder(music.folder, music.folder.parent / "out2", workers=3, progress=False)
    assert one.kept == two.kept
    assert one.left_out == two.left_out


# ---- refusals, and nothing half-written ------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_or_one_without_usable_clips_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no folder"):
        import_folder(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty folder"):
        import_folder(tmp_path / "empty", out)
    audio.write_audio(tmp_path / "bare" / "a.wav", noise(1), 16000)
    with pytest.raises(UserError, match="without metadata"):
        import_folder(tmp_path / "bare", out)
    bad = Music(tmp_path / "bad")
    bad.row(file_name="a.wav", caption="x")
    with pytest.raises(UserError, match=r"no usable clip.*a\.wav: missing"):
        import_folder(bad.folder, out, progress=False)
    (bad.folder / "a.wav").touch()
    with pytest.raises(UserError, match=r"no usable clip.*a\.wav: zero-length"):
        import_folder(bad.folder, out, progress=False)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "bare", "bad"}


def test_an_import_that_fails_keeps_the_earlier_one(music: Music, monkeypatch: pytest.MonkeyPatch) -> None:
    music.add("a.wav")
    first = run(music)
    before = {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()}
    music.add("b.wav")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(importer, "write_manifest", full)
    with pytest.raises(OSError, match="no space"):
        run(music)
    assert {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()} == before
    assert {path.name for path in music.folder.parent.iterdir()} == {"music", "out"}


def test_an_earlier_import_is_replaced_but_no_other_folder_is(music: Music) -> None:
    music.add("a.wav")
    run(music)
    music.add("b.wav")
    assert len(run(music).kept) == 2
    foreign = music.folder.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(UserError, match="no earlier import"):
        import_folder(music.folder, foreign, progress=False)
    assert os.listdir(foreign) == ["thesis.txt"]


@pytest.mark.parametrize("out", ["music", "music/out", "."])
def test_an_import_never_touches_its_source(music: Music, out: str) -> None:
    music.add("a.wav")
    with pytest.raises(UserError, match="side by side"):
        import_folder(music.folder, music.folder.parent / out, progress=False)
    assert (music.folder / "a.wav").is_file()


@pytest.mark.parametrize("options", [{"workers": 0}, {"sample_rate": 0}, {"val_share": 0.6, "test_share": 0.4}, {"val_share": -1}])
def test_impossible_options_are_refused(music: Music, options: dict[str, Any]) -> None:
    music.add("a.wav")
    with pytest.raises(UserError, match="positive counts"):
        import_folder(music.folder, music.folder.parent / "out", **options)
