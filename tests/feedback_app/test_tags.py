"""What a file says beside its sound: nothing passes that may name a system, and bare clips pass as they are."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sqlalchemy import func, select

from base_models.audio import read_audio, write_audio
from base_models.errors import UserError
from db.schema import Campaign, Clip
from db.store import open_store
from feedback_app.campaigns import main
from feedback_app.tags import check_untagged

FORMATS = [
    (".wav", "PCM_16"), (".wav", "PCM_24"), (".wav", "PCM_U8"), (".wav", "FLOAT"), (".wav", "MS_ADPCM"),
    (".flac", "PCM_16"), (".flac", "PCM_24"), (".ogg", "VORBIS"), (".ogg", "OPUS"), (".mp3", "MPEG_LAYER_III"),
]  # fmt: skip
TAGS = ("title", "artist", "comment", "software", "album", "date")
SECRET = b"secret-dpo"


def sing(path: Path, subtype: str, rate: int = 48000, channels: int = 1, tag: str | None = None) -> Path:
    t = np.arange(rate // 2)
    wav = np.stack([0.3 * np.sin(t * (0.05 + 0.01 * c)) for c in range(channels)], axis=1)
    with soundfile.SoundFile(path, "w", rate, channels, subtype=subtype) as file:
        if tag:
            setattr(file, tag, SECRET.decode())
        file.write(wav)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
def test_a_clip_without_tags_passes(tmp_path: Path, suffix: str, subtype: str, channels: int) -> None:
    check_untagged(sing(tmp_path / f"clip{suffix}", subtype, channels=channels))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_what_encore_writes_passes(tmp_path: Path, suffix: str, rate: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, rate)).astype(np.float32)
    write_audio(tmp_path / f"clip{suffix}", noise, rate)
    check_untagged(tmp_path / f"clip{suffix}")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
def test_a_tag_that_is_in_the_bytes_is_refused(tmp_path: Path, suffix: str, subtype: str, tag: str) -> None:
    path = sing(tmp_path / f"clip{suffix}", subtype, tag=tag)
    if SECRET in path.read_bytes():
        with pytest.raises(UserError, match=r"nothing but its sound.*ffmpeg"):
            check_untagged(path)
    else:
        check_untagged(path)  # the format has no room for this tag: an ID3v1 has none for software, and cuts a date to a year
        assert suffix == ".mp3"
        assert tag in ("software", "date")


def riff(name: bytes, body: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data + struct.pack("<4sI", name, len(body)) + body + bytes(len(body) % 2)


def riff_first(name: bytes, body: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:12] + struct.pack("<4sI", name, len(body)) + body + data[12:]


def flac_block(kind: int, body: bytes) -> Callable[[bytes], bytes]:
    """Puts a block behind STREAMINFO."""
    return lambda data: data[:42] + bytes([kind]) + len(body).to_bytes(3, "big") + body + data[42:]


def id3(*frames: tuple[bytes, bytes], version: int = 4) -> Callable[[bytes], bytes]:
    body = b"".join(name + bytes([0, 0, 0, len(text)]) + bytes(2) + text for name, text in frames) + bytes(20)
    return lambda data: b"ID3" + bytes([version, 0, 0, 0, 0, 0, len(body)]) + body + data


def ending(tail: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data + tail


ID3V1 = b"TAG" + SECRET.ljust(125, b"\0")
APE = b"Artist\0" + SECRET + b"APETAGEX" + bytes(24)
FOREIGN = {
    "bext": (".wav", riff(b"bext", SECRET.ljust(602, b"\0"))),
    "bext before the sound": (".wav", riff_first(b"bext", SECRET.ljust(602, b"\0"))),
    "id3 chunk": (".wav", riff(b"id3 ", b"ID3" + SECRET)),
    "iXML": (".wav", riff(b"iXML", SECRET)),
    "list that is no INFO": (".wav", riff(b"LIST", b"adtl" + SECRET)),
    "software that is no encoder": (".wav", riff(b"LIST", b"INFOISFT" + struct.pack("<I", 10) + SECRET)),
    "padding with words": (".wav", riff(b"JUNK", SECRET)),
    "second data": (".wav", riff(b"data", SECRET)),
    "long fact": (".wav", riff(b"fact", SECRET * 4)),
    "words behind the sound": (".wav", ending(bytes(8) + SECRET)),
    "application": (".flac", flac_block(2, b"test" + SECRET)),
    "picture": (".flac", flac_block(6, SECRET)),
    "cue sheet": (".flac", flac_block(5, SECRET)),
    "flac padding with words": (".flac", flac_block(1, SECRET)),
    "comment": (".flac", flac_block(4, struct.pack("<III", 0, 1, 18) + b"encoder=" + SECRET)),
    "vendor": (".flac", flac_block(4, struct.pack("<I", 10) + SECRET + bytes(4))),
    "endless comment": (".flac", flac_block(4, struct.pack("<II", 0, 2**31))),
    "flac behind an ID3 tag": (".flac", id3((b"TSSE", b"\3Lavf60.3.100"))),
    "flac with ID3v1": (".flac", ending(ID3V1)),
    "flac with APE": (".flac", ending(APE)),
    "chained": (".ogg", lambda data: data + data),
    "words between pages": (".ogg", ending(SECRET.ljust(40, b"\0"))),
    "ogg with ID3v1": (".ogg", ending(ID3V1)),
    "ID3v2 title": (".mp3", id3((b"TIT2", b"\3" + SECRET))),
    "ID3v2.3 title after an encoder": (".mp3", id3((b"TSSE", b"\3Lavf60.3.100"), (b"TIT2", b"\0" + SECRET), version=3)),
    "ID3v2 encoder that is none": (".mp3", id3((b"TSSE", b"\3" + SECRET))),
    "ID3v1": (".mp3", ending(ID3V1)),
    "APE": (".mp3", ending(APE)),
    "words behind the frames": (".mp3", ending(SECRET)),
    "an AIFF": (".wav", lambda data: b"FORM" + data[4:]),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_only_other_programs_write_is_refused(tmp_path: Path, case: str) -> None:
    suffix, spoil = FOREIGN[case]
    path = tmp_path / f"clip{suffix}"
    write_audio(path, np.sin(np.arange(24000) * 0.05).astype(np.float32), 24000)
    check_untagged(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError) as refused:
        check_untagged(path)
    assert SECRET.decode() not in refused.value.got


HARMLESS = {
    "what ffmpeg says in a WAV": (".wav", riff(b"LIST", b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0")),
    "padding before the sound": (".wav", riff_first(b"JUNK", bytes(28))),
    "zeros behind the sound": (".wav", ending(bytes(64))),
    "padding in FLAC": (".flac", flac_block(1, bytes(8192))),
    "what ffmpeg says in an MP3": (".mp3", id3((b"TSSE", b"\3Lavf60.16.100\0"))),
    "what ffmpeg says in UTF-16": (".mp3", id3((b"TSSE", b"\1" + "Lavf60".encode("utf-16")), version=3)),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_padding_and_an_encoders_own_name_pass(tmp_path: Path, case: str) -> None:
    suffix, add = HARMLESS[case]
    path = tmp_path / f"clip{suffix}"
    write_audio(path, np.sin(np.arange(24000) * 0.05).astype(np.float32), 24000)
    path.write_bytes(add(path.read_bytes()))
    check_untagged(path)
    wav, _ = read_audio(path)
    assert wav.shape[1] >= 24000


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_every_cut_and_every_flipped_header_byte_is_answered_in_words(tmp_path: Path, suffix: str) -> None:
    write_audio(tmp_path / f"whole{suffix}", np.sin(np.arange(2400) * 0.05).astype(np.float32), 24000)
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"clip{suffix}"
    for at in range(1, min(300, len(whole))):
        for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(broken)
            with suppress(UserError):  # any other error fails the test
                check_untagged(path)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_campaign_with_a_tagged_clip_is_refused_by_its_name_and_nothing_is_stored(tmp_path: Path, capsys, suffix: str) -> None:
    subtype = {".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}.get(suffix, "PCM_16")
    rows = []
    for n, tag in enumerate((None, "title")):
        sing(tmp_path / f"{n}{suffix}", subtype, rate=44100 + 3900 * n, tag=tag)
        rows.append({"file_name": f"{n}{suffix}", "caption": "calm", "system": f"s{n}"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = f"sqlite:///{tmp_path / 'v.db'}"
    assert main(["--db", url, "--name", "c", "--source", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"1{suffix}" in error
    assert "-map_metadata -1" in error
    with open_store(url) as store, store.read() as session:
        assert [session.scalar(select(func.count()).select_from(table)) for table in (Campaign, Clip)] == [0, 0]
    sing(tmp_path / f"1{suffix}", subtype)
    assert main(["--db", url, "--name", "c", "--source", str(tmp_path)]) == 0
