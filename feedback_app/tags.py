"""Whether a clip holds nothing but its sound: a tag may name what made it, and a rater can save the bytes.

Strict on purpose: what is not known to be harmless is refused. Known to be so are the parts that decoding needs, padding of zeros, and
what an encoder says of itself, such as the vendor string that every FLAC and Ogg file carries, in exactly the words of libsndfile, Xiph,
LAME and ffmpeg. The layouts are those of RIFF, RFC 9639 (FLAC), RFC 3533 and 7845 (Ogg), ISO 11172-3 (MP3) and ID3v2.4.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path

from base_models.errors import UserError

_ENCODER = re.compile(
    r"|libsndfile(-[\d.]+)?|ffmpeg|Lav[fc][\d.]*( (libvorbis|libopus|libmp3lame|flac|vorbis|opus))?|libopus (unknown|[\d.]+)"
    r"|reference libFLAC [\d.]+ \d{8}|LAME (32|64)bits version [\d.]+ \(https?://lame\.sf\.net\)"
    r"|Xiph\.Org libVorbis I \d{8} "
    r"\((Everywhere|Schaufenugget|Omnipresent|Turpakäräjiin|⛄⛄⛄⛄|Now 100% fewer shells|Reducing Environment)\)"
)
_WAV_PARTS = {b"fmt ": 66, b"fact": 12, b"PEAK": 520}
"""What a player needs, or float WAV has, and how long it can be, in bytes."""
_WAV_PADDING = (b"JUNK", b"PAD ", b"FLLR")
_FLAC_BLOCKS = {2: "an application block", 5: "a cue sheet", 6: "a picture"}
_ID3_TEXT = {0: "latin-1", 1: "utf-16", 2: "utf-16-be", 3: "utf-8"}
_MP3_KBPS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
_MP3_HZ = {0: (11025, 12000, 8000), 2: (22050, 24000, 16000), 3: (44100, 48000, 32000)}


def check_untagged(path: Path) -> None:
    """Raises UserError for a WAV, FLAC, Ogg or MP3 file with a tag in it, and for a file of any other kind."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _foreign(data)
    if found is not None:
        expected = "a WAV, FLAC, Ogg or MP3 file with nothing but its sound, since a rater could read there what made it"
        remedy = (
            "strip it, e.g. with `ffmpeg -i clip.wav -map 0:a -map_metadata -1 -c copy -bitexact bare.wav`, and list it with its new hash"
        )
        raise UserError(f"{path} with {found}", expected, remedy)


def _foreign(data: mmap.mmap) -> str | None:
    """The first thing in the file that is no sound, in words."""
    try:
        if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            return _in_wav(data)
        if data[:4] == b"fLaC":
            return _in_flac(data)
        if data[:4] == b"OggS":
            return _in_ogg(data)
        return _in_mp3(data)
    except (struct.error, IndexError, UnicodeDecodeError):
        return "a header that cannot be read"


def _in_wav(data: mmap.mmap) -> str | None:
    seen: set[bytes] = set()
    at = 12
    while at + 8 <= len(data) and data[at : at + 4] != bytes(4):
        name, size = struct.unpack_from("<4sI", data, at)
        start, stop = at + 8, min(at + 8 + size, len(data))
        shown = f"a {name.decode('latin-1').strip()!r} chunk"
        if name == b"LIST":
            if found := _in_info(data[start:stop]):
                return found
        elif name in _WAV_PADDING:
            if data[start:stop].strip(b"\0"):
                return shown + " that is no padding"
        elif name in seen or (name != b"data" and size > _WAV_PARTS.get(name, -1)):
            return shown
        seen.add(name)
        at = stop + (size & 1)
    return _at_end(data, at)


def _in_info(chunk: bytes) -> str | None:
    """A LIST chunk may say which program wrote it (ISFT)."""
    if chunk[:4] != b"INFO":
        return "a 'LIST' chunk"
    at = 4
    while at + 8 <= len(chunk):
        name, size = struct.unpack_from("<4sI", chunk, at)
        text = chunk[at + 8 : at + 8 + size].rstrip(b"\0").decode("utf-8")
        if name != b"ISFT" or not _ENCODER.fullmatch(text):
            return f"a tag {name.decode('latin-1')!r}"
        at += 8 + size + (size & 1)
    return None


def _in_flac(data: mmap.mmap) -> str | None:
    at, last = 4, False
    while not last:
        last, kind = bool(data[at] & 128), data[at] & 127
        start = at + 4
        at = start + int.from_bytes(data[at + 1 : start], "big")
        if kind == 4:
            if found := _in_comments(data[start:at]):
                return found
        elif kind == 1:
            if data[start:at].strip(b"\0"):
                return "padding that is none"
        elif kind not in (0, 3):
            return _FLAC_BLOCKS.get(kind, f"a block of kind {kind}")
    return _tag_at_end(data[-160:])


def _in_comments(block: bytes) -> str | None:
    """The comment header of Vorbis, Opus and FLAC: an encoder's name may stand there, no more."""
    texts: list[str] = []
    at, left = 0, 2
    while left:
        (size,) = struct.unpack_from("<I", block, at)
        stored = block[at + 4 : at + 4 + size]
        if len(stored) < size:
            return "a header that cannot be read"
        texts.append(stored.decode("utf-8"))
        at += 4 + size
        left -= 1
        if len(texts) == 1:
            (left,) = struct.unpack_from("<I", block, at)
            at += 4
    if not _ENCODER.fullmatch(texts[0]):
        return "a vendor string of its own"
    for text in texts[1:]:
        name, _, value = text.partition("=")
        if name.upper() != "ENCODER" or not _ENCODER.fullmatch(value):
            return f"a tag {name[:32]!r}"
    return "bytes after its tags" if block[at:].strip(b"\0\1") else None


def _in_ogg(data: mmap.mmap) -> str | None:
    packets: list[bytes] = []
    at, packet = 0, b""
    serial = data[14:18]
    while at < len(data):
        n_segments = data[at + 26]
        if data[at : at + 4] != b"OggS" or data[at + 14 : at + 18] != serial or (at > 0 and data[at + 5] & 2):
            return "more than one stream in it"
        lacing = data[at + 27 : at + 27 + n_segments]
        at += 27 + n_segments
        for size in lacing:
            if len(packets) < 2:
                packet += data[at : at + size]
                if size < 255:
                    packets.append(packet)
                    packet = b""
            at += size
    if at != len(data) or len(packets) < 2:
        return "a page cut short"
    for head, tags in ((b"\x01vorbis", b"\x03vorbis"), (b"OpusHead", b"OpusTags")):
        if packets[0].startswith(head) and packets[1].startswith(tags):
            return _in_comments(packets[1][len(tags) :])
    return "a stream that is neither Vorbis nor Opus"


def _in_mp3(data: mmap.mmap) -> str | None:
    at, n_frames = 0, 0
    if data[:3] == b"ID3":
        at = 10 + _synchsafe(data[6:10])
        if found := _in_id3(data[:at]):
            return found
    while at + 4 <= len(data) and (size := _mp3_frame_size(data[at : at + 4])):
        at += size
        n_frames += 1
    if not n_frames:
        return "a format of another kind"
    return "a frame cut short" if at > len(data) else _at_end(data, at)


def _mp3_frame_size(header: bytes) -> int:
    """Bytes of a layer III frame, or 0 where none begins."""
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    rate, hz = header[2] >> 4, header[2] >> 2 & 3
    if header[0] != 255 or header[1] < 0xE0 or version == 1 or layer != 1 or rate in (0, 15) or hz == 3:
        return 0
    scale = 144_000 if version == 3 else 72_000
    return scale * _MP3_KBPS[version == 3][rate] // _MP3_HZ[version][hz] + (header[2] >> 1 & 1)


def _in_id3(tag: bytes) -> str | None:
    """An ID3v2 tag may say what encoded the file (TSSE)."""
    major, flags, at = tag[3], tag[5], 10
    if major not in (3, 4) or flags:
        return "an ID3 tag"
    while at + 10 <= len(tag) and tag[at : at + 4] != bytes(4):
        name, size = tag[at : at + 4].decode("latin-1"), _synchsafe(tag[at + 4 : at + 8])
        text = tag[at + 11 : at + 10 + size].decode(_ID3_TEXT.get(tag[at + 10], "ascii"))
        if name != "TSSE" or size > 127 or not _ENCODER.fullmatch(text.strip("\0")):
            return f"a tag {name!r}"
        at += 10 + size
    return "bytes after its tags" if tag[at:].strip(b"\0") else None


def _synchsafe(four: bytes) -> int:
    return four[0] << 21 | four[1] << 14 | four[2] << 7 | four[3]


def _at_end(data: mmap.mmap, at: int) -> str | None:
    """Behind the sound there is nothing, or zeros."""
    rest = data[at:]
    return (_tag_at_end(rest[-160:]) or "bytes after its end") if rest.strip(b"\0") else None


def _tag_at_end(tail: bytes) -> str | None:
    if tail[-128:-125] == b"TAG":
        return "an ID3 tag"
    return "an APE tag" if b"APETAGEX" in tail else None
