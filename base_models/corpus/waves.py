"""The waveforms of a corpus as one int16 memory map: decoded once, cached by content, then random crops cost next to nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from base_models.atomic import atomic_folder
from base_models.audio import read_audio, resample
from base_models.errors import UserError


@dataclass(frozen=True)
class Waves:
    """Mono clips end to end: clip i is samples[starts[i] : starts[i + 1]], int16; rows[i] is its line of metadata.jsonl."""

    samples: np.ndarray
    starts: np.ndarray
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def clip(self, index: int) -> np.ndarray:
        """Clip `index` as float32 [L]."""
        return self.samples[self.starts[index] : self.starts[index + 1]].astype(np.float32) / 32768

    def crops(self, n: int, length: int, rng: np.random.Generator, gain_db: tuple[float, float] = (0, 0)) -> np.ndarray:
        """`n` random crops [n, 1, length] float32 with a random gain each, which never clips; short clips end in silence."""
        out = np.zeros((n, 1, length), np.float32)
        for i, clip in enumerate(rng.integers(len(self), size=n)):
            start, end = self.starts[clip], self.starts[clip + 1]
            start += rng.integers(max(1, end - start - length + 1))
            part = self.samples[start : min(end, start + length)].astype(np.float32) / 32768
            gain = 10 ** (rng.uniform(*gain_db) / 20)
            out[i, 0, : len(part)] = part * min(gain, 1 / max(1e-6, np.abs(part).max(initial=0)))
        return out


def load_waves(corpus: str | Path, splits: Sequence[str], sample_rate: int, workers: int = 2) -> Waves:
    """Reads the clips of `splits` (mixed down, resampled); the second call maps `<corpus>/.waves/<hash>/samples.npy`.

    Raises: UserError when the corpus holds no clip of these splits.
    """
    corpus = Path(corpus)
    rows = [row for row in read_rows(corpus) if row["split"] in splits]
    files = [corpus / row["file_name"] for row in rows]
    if not files:
        raise UserError(f"no clips of the splits {list(splits)} in {corpus}", "at least one", "look at metadata.jsonl")
    listing = "\n".join(f"{file.relative_to(corpus)} {file.stat().st_size}" for file in files)
    key = hashlib.sha256((corpus / "metadata.jsonl").read_bytes() + f"{sample_rate}\n{listing}".encode()).hexdigest()
    folder = corpus / ".waves" / key[:16]
    if not folder.is_dir():
        with ThreadPoolExecutor(workers) as pool, atomic_folder(folder) as temporary:
            jobs = pool.map(lambda file: _read_mono(file, sample_rate), files)
            clips = list(tqdm(jobs, total=len(files), desc="decode clips", unit="clip"))
            starts = np.cumsum([0, *map(len, clips)])
            out = open_memmap(temporary / "samples.npy", mode="w+", dtype=np.int16, shape=(int(starts[-1]),))
            for i, clip in enumerate(clips):
                out[starts[i] : starts[i + 1]] = clip
            out.flush()
            del out
            np.save(temporary / "starts.npy", starts)
    return Waves(
        np.load(folder / "samples.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "starts.npy", allow_pickle=False),
        rows,
    )


def read_rows(corpus: Path) -> list[dict[str, Any]]:
    """The lines of metadata.jsonl. Raises UserError when it is missing or names a file outside the corpus."""
    path = corpus / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"{corpus} without metadata.jsonl", "a corpus folder", "build one, or `encore corpus import FOLDER`")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        name = PurePosixPath(row["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"file_name {row['file_name']!r}", "a path inside the corpus", "correct metadata.jsonl")
    return rows


def _read_mono(file: Path, sample_rate: int) -> np.ndarray:
    wav, rate = read_audio(file)
    mono = wav.mean(0)
    if rate != sample_rate:
        mono = resample(mono[None], rate, sample_rate)[0]
    return np.round(np.clip(mono, -1, 1) * 32767).astype(np.int16)


def synthetic_waves(n: int, duration_s: float, sample_rate: int, seed: int = 0) -> Waves:
    """Plucked chords over noise, for smoke runs that have no corpus: every clip has notes, onsets and a noise floor."""
    rng = np.random.default_rng(seed)
    L = round(duration_s * sample_rate)
    t = np.arange(L) / sample_rate
    clips = []
    for _ in range(n):
        wav = 0.003 * rng.standard_normal(L)
        for onset in np.arange(0, duration_s, 0.25):
            decay = np.where(t >= onset, np.exp(-5 * (t - onset).clip(0)), 0)
            for note in rng.choice([48, 52, 55, 60, 64, 67, 72], 2, replace=False):
                hz = 440 * 2 ** ((note - 69) / 12)
                wav += sum(0.1 / h * np.sin(2 * np.pi * hz * h * (t - onset)) for h in range(1, 5)) * decay
        clips.append(np.round(np.clip(wav, -1, 1) * 32767).astype(np.int16))
    return Waves(np.concatenate(clips), np.arange(n + 1) * L)
