"""Import your own music: a folder of audio and `metadata.jsonl` -> checked, resampled clips, split by piece, and a report.

    from base_models.corpus.importer import import_folder
    print(import_folder("my_music", "runs/corpus").summary())

    folder -> each row and each file checked -> decoded, mixed down, resampled -> no duplicates -> split by group -> out/

What cannot be used is left out and named with its reason; nothing is dropped in silence. `out` appears only when it is whole.
Which split a group falls into depends on its name alone, so a corpus that grows never moves a piece from training to test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from base_models import audio
from base_models.atomic import atomic_folder
from base_models.corpus.manifest import METADATA, SPLITS, ClipRow, read_lines, write_manifest
from base_models.corpus.styles import GENRE_NAMES
from base_models.errors import UserError

REPORT = "import.json"
KNOWN_GENRES = (*GENRE_NAMES, *(name for names in GENRE_NAMES.values() for name in names))
SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "test": "test_piece"}


class LeftOut(NamedTuple):
    """A file or line that was not imported. reason: `kind: what was found`."""

    file: str
    reason: str


class Note(NamedTuple):
    """Something worth knowing about a clip that was kept, or about the whole import (file is then `*`)."""

    file: str
    note: str


@dataclass
class ImportReport:
    """What became of each row."""

    out: Path
    sample_rate: int
    kept: list[ClipRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, int]:
        """Clips in each split."""
        counts = Counter(row.split or "train" for row in self.kept)
        return {split: counts[split] for split in SPLITS if counts[split]}

    @property
    def duration_s(self) -> float:
        """Seconds of audio that were kept."""
        return sum(row.duration_s or 0.0 for row in self.kept)

    def summary(self, limit: int = 20) -> str:
        """The report as text, at most `limit` lines of each kind."""
        splits = ", ".join(f"{split} {n}" for split, n in self.splits.items())
        lines = [
            f"{self.out}: {len(self.kept)} clips, {self.duration_s / 60:.1f} min at {self.sample_rate} Hz ({splits})",
            f"left out: {len(self.left_out)}",
            *(f"  {item.file}: {item.reason}" for item in self.left_out[:limit]),
            *([f"  ... and {len(self.left_out) - limit} more, all in {REPORT}"] if len(self.left_out) > limit else []),
            f"notes: {len(self.notes)}",
            *(f"  {item.file}: {item.note}" for item in self.notes[:limit]),
            *([f"  ... and {len(self.notes) - limit} more, all in {REPORT}"] if len(self.notes) > limit else []),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """What stands in import.json."""
        return {
            "clips": len(self.kept),
            "duration_s": round(self.duration_s, 3),
            "sample_rate": self.sample_rate,
            "splits": self.splits,
            "left_out": [item._asdict() for item in self.left_out],
            "notes": [item._asdict() for item in self.notes],
        }


@dataclass(frozen=True)
class _Options:
    sample_rate: int
    mono: bool
    max_duration_s: float
    strict_genres: bool
    genres: frozenset[str]


class _Clip(NamedTuple):
    """One row that passed: the row as it will be written (its audio lies at row.file_name of the new folder)."""

    row: ClipRow
    note: Note | None


def import_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sample_rate: int = 16000,
    mono: bool = True,
    max_duration_s: float = audio.MAX_DURATION_S,
    strict_genres: bool = False,
    genres: Sequence[str] = KNOWN_GENRES,
    val_share: float = 0.06,
    test_share: float = 0.10,
    workers: int = 2,
    progress: bool = True,
) -> ImportReport:
    """Import `folder` into `out` (a corpus that `read_manifest` reads back) and say what was left out and why.

    Args:
        folder: audio (wav, flac, ogg, mp3) beside metadata.jsonl. out: new, empty, or an earlier import, which is replaced.
        strict_genres: leave out rows whose genre is not in `genres`; otherwise they are kept and noted.
        val_share, test_share: of the groups. A row's own `split` wins.
    Raises: UserError when the folder is missing or empty, when nothing in it can be used, or when `out` is not ours to replace.
    """
    source, target = Path(folder), Path(out)
    if workers < 1 or sample_rate < 1 or not 0 <= val_share + test_share < 1 or min(val_share, test_share) < 0:
        raise UserError(
            f"workers={workers}, sample_rate={sample_rate}, val_share={val_share}, test_share={test_share}",
            "positive counts and shares that leave something to train on",
            "choose other values",
        )
    _check_folders(source, target)
    options = _Options(sample_rate, mono, max_duration_s, strict_genres, frozenset(map(_plain, genres)))
    report = ImportReport(target, sample_rate)
    listed = _usable_rows(source, report, options)
    rows = _group_and_split(listed, report, val_share, test_share)
    with atomic_folder(target) as temporary:
        hashes: dict[str, str] = {}
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_convert, source, temporary, i, row, options) for i, row in enumerate(rows)]
            try:
                for row, job in tqdm(zip(rows, jobs), total=len(rows), desc="import clips", unit="clip", disable=not progress):
                    _settle(row, job.result(), temporary, hashes, report)
            finally:
                pool.shutdown(cancel_futures=True)
        if not report.kept:
            raise _nothing_usable(source, report)
        if not any(row.split for row in listed):  # splits that the rows name are theirs
            _settle_splits(report, temporary, {"val": val_share, "test_piece": test_share})
        _add_notes(report, options)
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        write_manifest(temporary, report.kept)
        text = json.dumps(report.to_json(), ensure_ascii=False, indent=2)
        (temporary / REPORT).write_text(text + "\n", encoding="utf-8")
    return report


# ---- before any audio is decoded -------------------------------------------------------------------------------------


def _check_folders(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source}, which is no folder", "a folder with audio and metadata.jsonl", "check the path")
    if not any(source.iterdir()):
        raise UserError(f"the empty folder {source}", "audio files and metadata.jsonl", "put the music there first")
    inside, outside = source.resolve(), target.resolve()
    if inside == outside or inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(f"{target} for the import of {source}", "two folders, side by side", "choose another output folder")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / REPORT).is_file())):
        raise UserError(f"{target}, which is no earlier import", "a new or empty folder", "choose another output folder")


def _plain(name: str) -> str:
    """`Lo-Fi` and `lofi` are one genre."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


def _find(folder: Path, name: str) -> Path | None:
    """The file that `name` means, whichever way its accents are encoded (macOS decomposes them)."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if (folder / form).is_file():
            return folder / form
    return None


def _kind(error: UserError) -> str:
    """A row's error as `kind: detail`."""
    for kind, sign in (
        ("path leads out of the folder", "the absolute path"),
        ("path leads out of the folder", "the path"),
        ("caption missing", "caption missing"),
    ):
        if error.got.startswith(sign):
            return f"{kind}: {error.got}"
    return f"bad row: {error.got}, not {error.expected}"


def _usable_rows(source: Path, report: ImportReport, options: _Options) -> list[ClipRow]:
    """The rows whose metadata and files can be used; the others go into the report."""
    rows: list[ClipRow] = []
    listed: set[str] = set()
    for name, _, row in read_lines(source):
        if isinstance(row, UserError):
            report.left_out.append(LeftOut(name, _kind(row)))
            listed.add(unicodedata.normalize("NFC", name))
            continue
        key = unicodedata.normalize("NFC", row.file_name)
        reason = "listed twice: its first row was used" if key in listed else _why_not(source, row, options)
        listed |= {key, *(unicodedata.normalize("NFC", stem) for stem in row.stems.values())}
        if reason is not None:
            report.left_out.append(LeftOut(row.file_name, reason))
            continue
        rows.append(row)
    for path in sorted(source.rglob("*")):
        name = unicodedata.normalize("NFC", path.relative_to(source).as_posix())
        if path.suffix.lower() in audio.FORMATS and path.is_file() and name not in listed:
            report.left_out.append(LeftOut(name, f"not listed: no row in {METADATA} names it"))
    if not rows:
        raise _nothing_usable(source, report)
    return rows


def _why_not(source: Path, row: ClipRow, options: _Options) -> str | None:
    for name in (row.file_name, *row.stems.values()):
        path = _find(source, name)
        if path is None:
            return f"missing: there is no file {name}"
        if not path.resolve().is_relative_to(source.resolve()):
            return f"path leads out of the folder: {name} is a link to {path.resolve()}"
        if path.suffix.lower() not in audio.FORMATS:
            return f"unknown format: {path.suffix or name} is none of {', '.join(audio.FORMATS)}"
    if options.strict_genres and row.genre is not None and _plain(row.genre) not in options.genres:
        return f"unknown genre: {row.genre!r}"
    if row.split is not None and _split_name(row.split) not in SPLITS:
        return f"unknown split: {row.split!r} is none of {', '.join(SPLITS)}"
    return None


def _nothing_usable(source: Path, report: ImportReport) -> UserError:
    reasons = "; ".join(f"{item.file}: {item.reason}" for item in report.left_out[:3])
    return UserError(f"no usable clip in {source} ({reasons})", "at least one", "mend the files and rows named here")


# ---- groups and splits -----------------------------------------------------------------------------------------------


def _split_name(split: str) -> str:
    return SPLIT_ALIASES.get(split.casefold(), split.casefold())


def _group_of(row: ClipRow, many_folders: bool) -> str:
    """Its own group, else artist and title (or source), else the artist, else its folder, else the file itself."""
    if row.group:
        return row.group
    work = row.title or row.source
    if work:
        return f"{row.artist} / {work}" if row.artist else work
    if row.artist:
        return row.artist
    path = PurePosixPath(row.file_name)
    return str(path.parent) if many_folders and len(path.parts) > 1 else str(path.with_suffix(""))


def position(group: str) -> float:
    """Where a group stands in [0, 1): a hash of its name, the same on every machine."""
    name = unicodedata.normalize("NFC", group).casefold()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_of(group: str, val_share: float, test_share: float) -> str:
    """test_piece for the first `test_share` of the positions, val for the next `val_share`, train for the rest."""
    place = position(group)
    return "test_piece" if place < test_share else "val" if place < test_share + val_share else "train"


def _group_and_split(rows: list[ClipRow], report: ImportReport, val_share: float, test_share: float) -> list[ClipRow]:
    """The rows with their groups and splits."""
    placed = []
    many_folders = len({PurePosixPath(row.file_name).parent for row in rows}) >= 3
    splits: dict[str, set[str]] = {}
    for row in rows:
        group = _group_of(row, many_folders)
        own = None if row.split is None else _split_name(row.split)
        split = own or split_of(group, val_share, test_share)
        splits.setdefault(group, set()).add(split)
        placed.append(replace(row, group=group, split=split))
    for group, names in sorted(splits.items()):
        if len(names) > 1:
            report.notes.append(Note("*", f"group {group!r} lies in several splits, as its rows say: {', '.join(sorted(names))}"))
    return placed


def _settle_splits(report: ImportReport, folder: Path, shares: dict[str, float]) -> None:
    """Something to train on first; then a split that the hash left empty gets the training group that stands nearest to it."""
    for split, share in (("train", 1.0), *shares.items()):
        if share == 0 or split in report.splits:
            continue
        groups = {row.group or "" for row in report.kept if split == "train" or row.split == "train"}
        if split != "train" and len(groups) < 3:
            report.notes.append(Note("*", f"{split} is empty: too few groups; name more groups or set `split` in {METADATA}"))
            continue
        moved = max(groups, key=position) if split == "train" else min(groups, key=position)
        report.notes.append(Note("*", f"{split} would be empty: group {moved!r} moved there"))
        for i, row in enumerate(report.kept):
            if row.group == moved:
                name = f"{split}/{Path(row.file_name).name}"
                (folder / split).mkdir(exist_ok=True)
                os.rename(folder / row.file_name, folder / name)
                report.kept[i] = replace(row, file_name=name, split=split)


# ---- audio -----------------------------------------------------------------------------------------------------------


def _audio_kind(error: UserError) -> str:
    """What read_audio says, as `kind: detail`."""
    for kind, sign in (
        ("zero-length", " 0 bytes"),
        ("zero-length", "without samples"),
        ("not finite", "NaN"),
        ("cut short", "cut short"),
    ):
        if sign in error.got:
            return f"{kind}: {error.got}"
    return f"too long: {error.got}, {error.expected}" if error.expected.startswith("at most") else f"corrupt: {error.got}"


def _read(path: Path, options: _Options) -> tuple[audio.Wav, int]:
    wav, rate = audio.read_audio(path, max_duration_s=options.max_duration_s)
    if options.mono and len(wav) > 1:
        wav = wav.mean(0, keepdims=True)
    if rate != options.sample_rate:
        wav = audio.resample(wav, rate, options.sample_rate)
    return wav, rate


def _convert(source: Path, folder: Path, index: int, row: ClipRow, options: _Options) -> _Clip | LeftOut:
    """Decode, mix down, resample and write one clip and its stems; a LeftOut, and no file, if that cannot be done."""
    written: list[Path] = []
    note: Note | None = None
    try:
        path = _find(source, row.file_name)
        assert path is not None
        wav, rate = _read(path, options)
        peak = float(np.abs(wav).max(initial=0.0))
        if peak == 0:
            return LeftOut(row.file_name, "silent: every sample is zero")
        stems = {}
        for stem, name in row.stems.items():
            stem_path = _find(source, name)
            assert stem_path is not None
            stems[stem] = _read(stem_path, options)[0]
        highest = max(peak, *(float(np.abs(stem).max(initial=0.0)) for stem in stems.values())) if stems else peak
        if highest > 1:
            wav, stems = wav / highest, {stem: samples / highest for stem, samples in stems.items()}
            note = Note(row.file_name, f"peaks {20 * np.log10(highest):.1f} dB above full scale: turned down")
        file_name = f"{row.split}/{index:06d}.flac"
        stem_names = {stem: f"stems/{index:06d}/{_file_safe(stem)}.flac" for stem in stems}
        for name, samples in [(file_name, wav), *((stem_names[stem], samples) for stem, samples in stems.items())]:
            written.append(folder / name)
            audio.write_audio(folder / name, samples, options.sample_rate)
    except UserError as error:
        for file in written:
            file.unlink(missing_ok=True)
        return LeftOut(row.file_name, _audio_kind(error))
    samples16 = (np.clip(wav, -1, 1) * 32767).astype("<i2")
    new = replace(
        row,
        file_name=file_name,
        stems=stem_names,
        duration_s=wav.shape[1] / options.sample_rate,
        sample_rate=options.sample_rate,
        sha256=hashlib.sha256(repr(samples16.shape).encode() + samples16.tobytes()).hexdigest(),
        extra=row.extra | {"imported_from": row.file_name, "imported_sample_rate": rate},
    )
    return _Clip(new, note)


def _file_safe(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _settle(row: ClipRow, result: _Clip | LeftOut, folder: Path, hashes: dict[str, str], report: ImportReport) -> None:
    """Book one converted clip, in the order of the rows; a duplicate's files are removed again."""
    if isinstance(result, LeftOut):
        report.left_out.append(result)
        return
    sha256 = result.row.sha256 or ""
    first = hashes.setdefault(sha256, row.file_name)
    if first != row.file_name:
        for name in (result.row.file_name, *result.row.stems.values()):
            (folder / name).unlink()
        report.left_out.append(LeftOut(row.file_name, f"duplicate: the same audio as {first}"))
        return
    report.kept.append(result.row)
    if result.note is not None:
        report.notes.append(result.note)


def _add_notes(report: ImportReport, options: _Options) -> None:
    """What many clips share is said once."""
    rates = Counter(row.extra["imported_sample_rate"] for row in report.kept)
    for rate, n in sorted(rates.items()):
        if rate != options.sample_rate:
            report.notes.append(Note("*", f"{n} clips resampled from {rate} to {options.sample_rate} Hz"))
    unknown = Counter(row.genre for row in report.kept if row.genre and _plain(row.genre) not in options.genres)
    for genre, n in sorted(unknown.items()):
        report.notes.append(Note("*", f"unknown genre {genre!r} kept in {n} clips"))
    if len(report.splits) == 1:
        report.notes.append(Note("*", f"every clip lies in {next(iter(report.splits))}: nothing is held out"))
