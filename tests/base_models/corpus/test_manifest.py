"""metadata.jsonl comes back as it was written; a row that is wrong is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from base_models.corpus.manifest import ClipRow, parse_row, read_manifest, write_manifest
from base_models.errors import UserError

FULL = ClipRow(
    file_name="train/Ünïcødé 音楽.flac",
    caption="calm jazz with piano",
    captions=["calm jazz with piano", "piano, calm"],
    genre="jazz",
    mood="calm",
    tempo_bpm=92.5,
    key="C major",
    artist="Łukasz & the “Owls”",
    title="Night",
    lyrics="la la\nla",
    stems={"drums": "stems/drums.flac"},
    licence="CC0-1.0",
    source="own recording",
    group="night",
    split="train",
    duration_s=6.0,
    sample_rate=16000,
    sha256="0" * 64,
    extra={"instruments": ["piano"], "take": 3},
)


def write(folder: Path, *rows: Any) -> Path:
    """metadata.jsonl of these rows: objects, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_rows_return_as_they_were_written(tmp_path: Path) -> None:
    rows = [FULL, ClipRow("b.wav", "only what is required", ["only what is required"])]
    write_manifest(tmp_path, rows)
    assert read_manifest(tmp_path) == rows


def test_each_line_is_one_json_object_with_no_empty_fields(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, [ClipRow("a.wav", "words", ["words"])])
    assert json.loads(path.read_text()) == {"file_name": "a.wav", "caption": "words", "captions": ["words"]}


def test_what_other_tools_write_is_understood(tmp_path: Path) -> None:
    row = {"file_name": "a\\b.wav", "text": "words", "license": "CC0", "bpm": "120", "stems": ["s/bass.wav"], "mood": ""}
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n")
    [read] = read_manifest(tmp_path)
    assert read == ClipRow("a/b.wav", "words", ["words"], tempo_bpm=120.0, licence="CC0", stems={"bass": "s/bass.wav"}, mood=None)


def test_the_first_of_the_captions_stands_in_for_a_missing_one() -> None:
    assert parse_row({"file_name": "a.wav", "captions": ["one", "two"]}, "line 1").caption == "one"


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"caption": "x"}, "no file_name"),
        ({"file_name": 7, "caption": "x"}, "no file_name"),
        ({"file_name": " ", "caption": "x"}, "no file_name"),
        ({"file_name": "../a.wav", "caption": "x"}, r"'\.\./a\.wav'"),
        ({"file_name": "a/../../b.wav", "caption": "x"}, r"\.\."),
        ({"file_name": "a\\..\\b.wav", "caption": "x"}, r"\.\."),
        ({"file_name": "/etc/passwd", "caption": "x"}, "absolute path"),
        ({"file_name": "C:\\a.wav", "caption": "x"}, "absolute path"),
        ({"file_name": "C:a.wav", "caption": "x"}, "absolute path"),
        ({"file_name": "\\\\host\\a.wav", "caption": "x"}, "absolute path"),
        ({"file_name": "a\0.wav", "caption": "x"}, "absolute path"),
        ({"file_name": "a.wav"}, "caption missing"),
        ({"file_name": "a.wav", "caption": "  "}, "caption missing"),
        ({"file_name": "a.wav", "caption": 3}, "caption missing"),
        ({"file_name": "a.wav", "captions": "x"}, "captions="),
        ({"file_name": "a.wav", "captions": ["x", ""]}, "captions="),
        ({"file_name": "a.wav", "caption": "x", "genre": ["jazz"]}, "genre="),
        ({"file_name": "a.wav", "caption": "x", "tempo_bpm": "fast"}, "tempo_bpm="),
        ({"file_name": "a.wav", "caption": "x", "tempo_bpm": 0}, "tempo_bpm="),
        ({"file_name": "a.wav", "caption": "x", "tempo_bpm": True}, "tempo_bpm="),
        ({"file_name": "a.wav", "caption": "x", "stems": "drums.wav"}, "stems="),
        ({"file_name": "a.wav", "caption": "x", "stems": {"drums": "../d.wav"}}, r"\.\."),
        ([1], "list in"),
        ('{"file_name": "a.wav", ', "no JSON"),
        ('{"file_name": "a.wav", "caption": "x", "tempo_bpm": NaN}', "no JSON"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_row_is_refused_and_its_line_is_named(tmp_path: Path, row: Any, got: str) -> None:
    folder = write(tmp_path, {"file_name": "good.wav", "caption": "x"}, row)
    with pytest.raises(UserError, match=got) as caught:
        read_manifest(folder)
    assert "line 2" in caught.value.got


def test_a_name_with_two_dots_in_it_is_a_name(tmp_path: Path) -> None:
    assert parse_row({"file_name": "take..2.wav", "caption": "x"}, "line 1").file_name == "take..2.wav"


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "without metadata.jsonl"), (b"", "without rows"), (b"\n \n", "without rows"), (b"\xff\xfe{}", "not UTF-8")],
)
def test_a_folder_without_readable_rows_is_refused(tmp_path: Path, content: bytes | None, got: str) -> None:
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=got):
        read_manifest(tmp_path)


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    row = {"file_name": "a.wav", "caption": "x"}
    with pytest.raises(UserError, match="twice"):
        read_manifest(write(tmp_path, row, row))


def test_a_path_that_leads_out_is_never_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, [FULL])
    with pytest.raises(UserError, match=r"\.\."):
        write_manifest(tmp_path, [ClipRow("../a.wav", "x")])
    assert read_manifest(tmp_path) == [FULL]
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.jsonl"]
