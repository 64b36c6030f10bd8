"""A corpus on disk: audio files beside one `metadata.jsonl`, the layout that Hugging Face's `audiofolder` reads.

    corpus/metadata.jsonl       {"file_name": "train/000000.flac", "caption": "calm jazz with piano", "tempo_bpm": 96, ...}
    corpus/train/000000.flac    ...

`file_name` and `caption` are required, all else is optional. Fields that this page does not name are kept as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from base_models.atomic import atomic_file
from base_models.errors import UserError

METADATA = "metadata.jsonl"
SPLITS = ("train", "val", "test_piece", "test_combo")
ALIASES = {"text": "caption", "license": "licence", "bpm": "tempo_bpm"}
"""Other sets' names for the same fields; our own name wins where both stand."""


@dataclass(frozen=True)
class ClipRow:
    """One row of metadata.jsonl."""

    file_name: str
    """Relative to the corpus folder, with forward slashes; never leads out of it."""
    caption: str
    captions: list[str] = field(default_factory=list)
    """All wordings, the first of which is `caption`."""
    genre: str | None = None
    mood: str | None = None
    tempo_bpm: float | None = None
    key: str | None = None
    artist: str | None = None
    title: str | None = None
    lyrics: str | None = None
    stems: dict[str, str] = field(default_factory=dict)
    """Stem -> file, named like `file_name`."""
    licence: str | None = None
    source: str | None = None
    group: str | None = None
    """What a split keeps together: takes, arrangements and prints of one piece."""
    split: str | None = None
    duration_s: float | None = None
    sample_rate: int | None = None
    sha256: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file: empty fields left out, `extra` spread out."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {name: value for name, value in named.items() if value is not None and value not in ([], {})} | self.extra


TEXT_FIELDS = ("genre", "mood", "key", "artist", "title", "lyrics", "licence", "source", "group", "split", "sha256")
NAMES = frozenset(f.name for f in fields(ClipRow)) - {"extra"}


def check_relative(name: Any, where: str) -> str:
    """Return `name` if it is a relative path that stays below the folder; else raise a UserError."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"no file_name in {where}", "a path relative to the folder", "add it")
    windows = PureWindowsPath(name)
    if "\0" in name or name.startswith("/") or windows.drive or windows.root:
        raise UserError(f"the absolute path {name!r} in {where}", "a path relative to the folder", "move the file there")
    if ".." in windows.parts:
        raise UserError(f"the path {name!r} in {where}", "a path without '..'", "move the file into the folder")
    return str(PurePosixPath(name.replace("\\", "/")))


def parse_row(data: Any, where: str) -> ClipRow:
    """A parsed JSON value -> ClipRow. Raises UserError for what is missing or of a wrong type; `where` says the line."""
    if not isinstance(data, dict):
        raise UserError(f"{type(data).__name__} in {where}", "one JSON object a line", "look at the line")
    row = {ours: data[theirs] for theirs, ours in ALIASES.items() if theirs in data}
    row |= {name: value for name, value in data.items() if name not in ALIASES}
    file_name = check_relative(row.get("file_name"), where)
    captions = row.get("captions") or []
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions):
        raise UserError(f"captions={captions!r:.80} in {where}", "a list of texts", "correct the line")
    caption = row.get("caption") or (captions[0] if captions else None)
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"caption missing in {where}", "a text that describes the clip", "write one")
    texts = {name: _text(row.get(name), name, where) for name in TEXT_FIELDS}
    sample_rate = _number(row.get("sample_rate"), "sample_rate", where, 1, 10_000_000)
    return ClipRow(
        file_name=file_name,
        caption=caption.strip(),
        captions=captions or [caption.strip()],
        tempo_bpm=_number(row.get("tempo_bpm"), "tempo_bpm", where, 10, 1000),
        stems=_stems(row.get("stems"), where),
        duration_s=_number(row.get("duration_s"), "duration_s", where, 0, math.inf),
        sample_rate=None if sample_rate is None else int(sample_rate),
        extra={name: value for name, value in row.items() if name not in NAMES},
        **texts,
    )


def _text(value: Any, name: str, where: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UserError(f"{name}={value!r:.80} in {where}", "a text", "correct the line")
    return value.strip()


def _number(value: Any, name: str, where: str, low: float, high: float) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise UserError(f"{name}={value!r:.80} in {where}", f"a number from {low:g} to {high:g}", "correct or remove it")
    return number


def _stems(value: Any, where: str) -> dict[str, str]:
    """{"drums": "stems/drums.wav"}, or a list of files, which are then called after themselves."""
    if not value:
        return {}
    if isinstance(value, list):
        value = {PurePosixPath(str(file)).stem: file for file in value}
    if not isinstance(value, dict):
        raise UserError(f"stems={value!r:.80} in {where}", "an object of names and files", "correct the line")
    return {str(name): check_relative(file, where) for name, file in value.items()}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def read_lines(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Any, ClipRow | UserError]]:
    """(file_name or line, raw JSON, row or what is wrong with it) for each line; the folder itself must be readable.

    Raises: UserError when metadata.jsonl is missing, is not UTF-8 or holds no rows.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise UserError(f"{folder} without {METADATA}", f"a folder with audio and {METADATA}", "write one line a clip: file_name, caption")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, which is not UTF-8 (byte {error.start})", "UTF-8 text", "save it as UTF-8") from error
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        empty = False
        where = f"{path.name} line {number}"
        try:
            data = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            yield where, None, UserError(f"no JSON in {where} ({error})", "one JSON object a line", "correct the line")
            continue
        name = data.get("file_name") if isinstance(data, dict) else None
        try:
            yield str(name or where), data, parse_row(data, where)
        except UserError as error:
            yield str(name or where), data, error
    if empty:
        raise UserError(f"{path} without rows", "one JSON object a line", "write one line a clip: file_name, caption")


def read_manifest(folder: str | os.PathLike[str]) -> list[ClipRow]:
    """All rows of `<folder>/metadata.jsonl`, in order. The first bad row raises a UserError; so does a file named twice."""
    rows: list[ClipRow] = []
    seen: set[str] = set()
    for name, _, row in read_lines(folder):
        if isinstance(row, UserError):
            raise row
        if row.file_name in seen:
            raise UserError(f"{name} twice in {METADATA}", "one row a file", "remove one of the rows")
        seen.add(row.file_name)
        rows.append(row)
    return rows


def write_manifest(folder: str | os.PathLike[str], rows: Iterable[ClipRow]) -> Path:
    """Write `<folder>/metadata.jsonl` atomically and return its path. Paths that lead out of the folder are refused."""
    path = Path(folder) / METADATA
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            for name in (row.file_name, *row.stems.values()):
                check_relative(name, METADATA)
            file.write(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return path
