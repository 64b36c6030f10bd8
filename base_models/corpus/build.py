"""The demo corpus: real public-domain melodies, arranged, rendered, captioned and split, from what pip installed alone.

    python -m base_models.corpus.build --out-dir .cache/corpus --n-clips 6000

clip number -> split, genre, mood, band, tune -> arrangement -> int16 audio -> <out>/<split>/000000.flac + a row of metadata.jsonl

Clip `i` of seed `s` is the same bytes on any number of workers: everything random comes from the seed (s, i).
Splits (by near-duplicate group of tunes, so that no melody is on both sides):
    train       trained pieces in trained genre+mood pairs
    val         other pieces, trained pairs
    test_piece  still other pieces, trained pairs
    test_combo  the test pieces in held-out genre+mood pairs: unseen on both counts, and more of them than chance would give
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from base_models.atomic import atomic_folder
from base_models.errors import UserError

from .arrange import arrange, fits, flip_mode, instruments_of, key_name, valence_of
from .captions import Facts, captions, tempo_words
from .render import Synth, render
from .styles import BANDS, GENRES, HELD_OUT_MOOD, MOODS, STEMS, draw_tempo, trained_moods
from .tunes import Tune, load_tunes

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # part of the cache key: raise it when the same parameters would give other bytes
LICENCE = "public-domain melody, generated arrangement; rendered with TimGM6mb.sf2 (GPL-2)"
# Share of the clips in each split; test_combo is oversampled.
SPLIT_SHARES = (("train", 0.86), ("val", 0.04), ("test_piece", 0.05), ("test_combo", 0.05))
PIECES_OF = {"train": "train", "val": "val", "test_piece": "test", "test_combo": "test"}
BATCH = 24  # clips a worker takes at a time


@dataclass(frozen=True)
class BuildParameters:
    """What decides the corpus's bytes, and so the cache key."""

    n_clips: int
    duration_s: float
    sample_rate: int
    seed: int
    stems: bool
    format_version: int = FORMAT_VERSION


def build_corpus(
    out_dir: str | Path,
    n_clips: int = 6000,
    duration_s: float = 6.0,
    sample_rate: int = 16000,
    seed: int = 0,
    workers: int = 2,
    stems: bool = False,
) -> Path:
    """Build the demo corpus in `out_dir`, or return at once if it is there with the same parameters.

    A corpus with other parameters in `out_dir` is replaced; any other non-empty folder is refused with a UserError. The corpus
    is built beside `out_dir` and renamed when whole, so an interrupted build leaves nothing there.

    Args:
        out_dir: The corpus's folder, new or empty, or an older demo corpus.
        n_clips: Clips over all splits, 1 or more.
        duration_s: Seconds a clip, 1 to 60.
        sample_rate: Of the clips, 8000 to 48000 Hz.
        seed: Decides, with a clip's number, all that is random in it.
        workers: Processes that render; at any number the same clips.
        stems: Write lead, backing, bass and drums of each clip too.

    Returns: out_dir, which holds metadata.jsonl, build.json and one FLAC a clip (with `stems`, four more a clip under stems/).
    """
    if n_clips < 1 or workers < 1:
        raise UserError(f"n_clips={n_clips}, workers={workers}", "both at least 1", "raise them")
    if not 1.0 <= duration_s <= 60.0 or not 8000 <= sample_rate <= 48000:
        raise UserError(f"duration_s={duration_s}, sample_rate={sample_rate}", "1 to 60 s, 8000 to 48000 Hz", "choose within these")
    out = Path(out_dir)
    parameters = BuildParameters(n_clips, float(duration_s), sample_rate, seed, stems)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = _read_build(out)
        if found is None:
            raise UserError(f"{out}, which is no demo corpus", "a new or empty folder", "choose another out_dir")
        if found["parameters"] == asdict(parameters) and found["content_sha256"] == _metadata_sha256(out):
            return out
    tunes = load_tunes()  # here first, so that the workers find its cache
    started = time.monotonic()
    with atomic_folder(out) as folder:
        for split, _ in SPLIT_SHARES:
            (folder / split).mkdir()
        rows = sorted(_all_rows(folder, parameters, tunes, workers), key=lambda row: row["file_name"].rpartition("/")[2])
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        build = {
            "parameters": asdict(parameters),
            "content_sha256": _metadata_sha256(folder),
            "clips": dict(Counter(row["split"] for row in rows)),
        }
        (folder / "build.json").write_text(json.dumps(build, indent=2) + "\n", encoding="utf-8")
    logger.info("built %d clips in %.1f s", n_clips, time.monotonic() - started)
    return out


def _read_build(folder: Path) -> dict[str, Any] | None:
    """What `build_corpus` wrote of itself; None if the folder is not its work, and so not its to replace."""
    try:
        build = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(build, dict) and {"parameters", "content_sha256", "clips"} <= build.keys()
    return build if ours else None


def _metadata_sha256(folder: Path) -> str:
    """Hash of the rows; each row holds its audio's hash, so this covers the corpus."""
    path = folder / "metadata.jsonl"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _all_rows(folder: Path, parameters: BuildParameters, tunes: list[Tune], workers: int) -> Iterator[dict[str, Any]]:
    """Write every clip and yield its row, in any order, under a progress bar."""
    batches = [range(start, min(start + BATCH, parameters.n_clips)) for start in range(0, parameters.n_clips, BATCH)]
    with tqdm(total=parameters.n_clips, desc="demo corpus", unit="clip", mininterval=1.0) as progress:
        if workers == 1:
            builder = ClipBuilder(folder, parameters, tunes)
            for batch in batches:
                for index in batch:
                    yield builder.build(index)
                    progress.update()
            return
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(folder, parameters))
        try:
            for done in as_completed([pool.submit(_build_batch, batch) for batch in batches]):
                rows = done.result()
                progress.update(len(rows))
                yield from rows
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_builder: ClipBuilder | None = None  # one a worker process: the synth and the tunes are loaded once


def _start_worker(folder: Path, parameters: BuildParameters) -> None:
    global _builder
    _builder = ClipBuilder(folder, parameters, load_tunes())


def _build_batch(indices: range) -> list[dict[str, Any]]:
    assert _builder is not None
    return [_builder.build(index) for index in indices]


class ClipBuilder:
    """Makes clip number `i`: chooses, arranges, renders, writes, describes."""

    def __init__(self, folder: Path, parameters: BuildParameters, tunes: list[Tune]) -> None:
        self.folder, self.parameters = folder, parameters
        self.synth = Synth(parameters.sample_rate)
        # (genre, bucket of pieces, valence) -> tunes
        self.pools: dict[tuple[str, str, str], list[Tune]] = {}
        for tune in tunes:
            for genre in GENRES:
                if fits(genre, tune):
                    self.pools.setdefault((genre, piece_bucket(tune.group), valence_of(tune)), []).append(tune)

    def build(self, index: int) -> dict[str, Any]:
        """Write clip `index` and return its metadata row."""
        parameters = self.parameters
        rng = np.random.default_rng([parameters.seed, index])
        split, genre = plan(index)
        moods = (HELD_OUT_MOOD[genre],) if split == "test_combo" else trained_moods(genre)
        mood = MOODS[moods[int(rng.integers(len(moods)))]]
        band = BANDS[genre][int(rng.integers(len(BANDS[genre])))]
        tune = self._choose_tune(genre, PIECES_OF[split], mood.valence, rng)
        flipped = valence_of(tune) != mood.valence
        tune = flip_mode(tune, mood.valence)
        arrangement = arrange(
            tune, band, mood, rng, tempo_bpm=draw_tempo(band, mood, rng), key=int(rng.integers(12)),
            duration_s=parameters.duration_s,
        )  # fmt: skip
        clip = render(arrangement, band, mood, self.synth, rng)
        instruments = instruments_of(arrangement, band)
        facts = Facts(genre, mood.name, tuple(instruments), arrangement.tempo_bpm, key_name(arrangement), band.name)
        written = captions(facts, rng)
        file_name = f"{split}/{index:06d}.flac"
        self._write(file_name, clip.mix)
        stem_files = {}
        if parameters.stems:
            stem_files = {stem: f"stems/{index:06d}/{stem}.flac" for stem in STEMS}
            for stem, path in stem_files.items():
                self._write(path, clip.stems[stem])
        return {
            "file_name": file_name,
            "caption": written[0],
            "captions": written,
            "genre": genre,
            "mood": mood.name,
            "tempo_bpm": arrangement.tempo_bpm,
            "tempo_word": tempo_words(arrangement.tempo_bpm)[0],
            "key": facts.key,
            "meter": f"{tune.meter[0]}/{tune.meter[1]}",
            "artist": band.name,
            "instruments": instruments,
            "lyrics": _lyrics(tune, arrangement.bar_indices) if arrangement.real_harmony else None,
            "stems": stem_files,
            "licence": LICENCE,
            "source": tune.id,
            "title": tune.title,
            "composer": tune.composer,
            "mode_flipped": flipped,
            "real_harmony": arrangement.real_harmony,
            "group": tune.group,
            "split": split,
            "duration_s": parameters.duration_s,
            "sample_rate": parameters.sample_rate,
            "sha256": hashlib.sha256(clip.mix.astype("<i2").tobytes()).hexdigest(),
            "melody": arrangement.melody,
            "chords": arrangement.chords,
        }

    def _choose_tune(self, genre: str, bucket: str, valence: str, rng: np.random.Generator) -> Tune:
        """A tune of that valence, or one in three times (and where there is none) a tune to be flipped into it."""
        native = self.pools.get((genre, bucket, valence), [])
        other = self.pools.get((genre, bucket, "minor" if valence == "major" else "major"), [])
        if genre == "choral":
            other = []  # flipping would lose the real voices
        flip = rng.random() < 1 / 3
        pool = (other or native) if flip else (native or other)
        if not pool:
            raise UserError(
                f"no {valence} tune for {genre} among the {bucket} pieces",
                "at least one",
                "reinstall music21==10.5.1 and delete the tunes cache",
            )
        return pool[int(rng.integers(len(pool)))]

    def _write(self, file_name: str, samples: np.ndarray) -> None:
        path = self.folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, self.parameters.sample_rate, subtype="PCM_16", format="FLAC")


def plan(index: int) -> tuple[str, str]:
    """(split, genre) of clip `index`: genres in turn, splits by their shares spread evenly within each genre."""
    turn, place = divmod(index, len(GENRES))
    position = (turn * 0.6180339887498949 + place * 0.4142135623730951) % 1.0  # irrational steps: even, no period
    for split, share in SPLIT_SHARES:
        position -= share
        if position < 0:
            return split, GENRES[place]
    return SPLIT_SHARES[-1][0], GENRES[place]


def piece_bucket(group: str) -> str:
    """'test' (10 %), 'val' (6 %) or 'train' for a near-duplicate group of tunes, by its hash."""
    percent = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 100
    return "test" if percent < 10 else "val" if percent < 16 else "train"


def _lyrics(tune: Tune, bar_indices: list[int]) -> str | None:
    """The syllables under the bars that are played."""
    if tune.lyrics is None:
        return None
    return " ".join(syllable for i in bar_indices for _, syllable in tune.lyrics[i] if syllable) or None


if __name__ == "__main__":
    import tyro

    print(tyro.cli(build_corpus))
