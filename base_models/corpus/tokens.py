"""A corpus as tokens: every clip through the codec once, cached by content, read whole by the trainers.

    <out_dir>/<hash of codec, corpus and segment>/codes.npy    int16 [N, K, T]
                                                  rows.jsonl   N rows of metadata (without the melody's notes)
                                                  tokens.json  {sha256, codec_sha256, n_q, card, frame_rate, segment_s, ...}

Clips longer than a segment give several rows (`segment_start_s`); what is left of a clip and shorter than a segment is dropped,
so that no row holds padding.
"""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from base_models.atomic import atomic_folder
from base_models.checkpoint import read_json, write_json
from base_models.codec import Codec, load_codec
from base_models.corpus.waves import load_waves, read_rows
from base_models.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenisedCorpus:
    """codes int16 [N, K, T]; rows[i] is the metadata of codes[i]. `sha256` covers codes, rows and the codec."""

    codes: np.ndarray
    rows: list[dict[str, Any]]
    sha256: str
    codec_sha256: str
    n_q: int
    card: int
    frame_rate: float

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, name: str) -> np.ndarray:
        """The indices of a split's rows."""
        return np.array([i for i, row in enumerate(self.rows) if row["split"] == name], dtype=np.int64)


def tokenise(corpus_dir: str | Path, codec: Codec, out_dir: str | Path, segment_s: float = 6.0, workers: int = 2) -> Path:
    """Encodes all splits of a corpus; returns the folder for `load_tokens`. A second call with the same content returns at once.

    Raises: UserError when no clip is as long as a segment.
    """
    corpus_dir = Path(corpus_dir)
    T = round(segment_s * codec.frame_rate)
    L = T * codec.hop_length
    codec_sha256 = codec.sha256()
    corpus_sha256 = hashlib.sha256((corpus_dir / "metadata.jsonl").read_bytes()).hexdigest()
    key = hashlib.sha256(f"{codec_sha256} {corpus_sha256} {T}".encode()).hexdigest()
    folder = Path(out_dir) / key[:16]
    if (folder / "tokens.json").is_file():
        return folder
    codes, rows, short = [], [], 0
    for split in sorted({row["split"] for row in read_rows(corpus_dir)}):
        waves = load_waves(corpus_dir, [split], codec.sample_rate)
        parts = [(i, start) for i in range(len(waves.rows)) for start in range(0, waves.clip(i).shape[-1] - L + 1, L)]
        short += sum(waves.clip(i).shape[-1] < L for i in range(len(waves.rows)))

        def encode(part: tuple[int, int], waves: Any = waves) -> np.ndarray:
            wav = torch.from_numpy(waves.clip(part[0])[part[1] : part[1] + L])[None, None]
            return codec.encode(wav, codec.sample_rate)[0].to(torch.int16).numpy()

        with ThreadPoolExecutor(workers) as pool:  # torch gives the interpreter's lock back while it computes
            codes += tqdm(pool.map(encode, parts), total=len(parts), desc=f"tokenise {split}", unit="clip")
        for i, start in parts:
            kept = {name: value for name, value in waves.rows[i].items() if name != "melody"}
            rows.append({**kept, "segment_start_s": start / codec.sample_rate})
    if not codes:
        raise UserError(f"no clip of {corpus_dir} as long as {segment_s} s", "at least one", "choose a shorter segment_s")
    if short:
        logger.warning("%d clips are shorter than %.2f s and are left out", short, segment_s)
    with atomic_folder(folder) as temporary:
        np.save(temporary / "codes.npy", np.stack(codes))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / "rows.jsonl").write_text(lines, encoding="utf-8")
        write_json(
            temporary / "tokens.json",
            {
                "sha256": _sha256(np.stack(codes), lines, codec_sha256),
                "codec_sha256": codec_sha256,
                "corpus_sha256": corpus_sha256,
                "n_q": codec.n_q,
                "card": codec.card,
                "frame_rate": codec.frame_rate,
                "segment_s": segment_s,
                "n_rows": len(rows),
                "n_left_out": int(short),
            },
        )
    return folder


def load_tokens(path: str | Path) -> TokenisedCorpus:
    """Reads what `tokenise` wrote: its folder, or the cache above it when that holds exactly one.

    Raises: UserError when the folder is none, ambiguous, or does not match its hash.
    """
    folder = Path(path)
    if not (folder / "tokens.json").is_file():
        found = sorted(folder.glob("*/tokens.json"))
        if len(found) != 1:
            raise UserError(f"{folder} with {len(found)} tokenised corpora", "the folder of one", "name the folder that tokenise returned")
        folder = found[0].parent
    info = read_json(folder / "tokens.json")
    codes = np.load(folder / "codes.npy", allow_pickle=False)
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8")
    if _sha256(codes, lines, info["codec_sha256"]) != info["sha256"]:
        raise UserError(f"{folder} that differs from its hash", "codes as tokenise wrote them", "delete it and tokenise again")
    rows = [json.loads(line) for line in lines.split("\n") if line]
    return TokenisedCorpus(codes, rows, info["sha256"], info["codec_sha256"], info["n_q"], info["card"], info["frame_rate"])


def codec_of(corpus: TokenisedCorpus, folder: str | Path) -> Codec:
    """The codec in a folder, which made these tokens. Raises: UserError for another one."""
    codec = load_codec(folder)
    found = codec.sha256()
    if found != corpus.codec_sha256:
        raise UserError(f"codec {found[:12]}", f"codec {corpus.codec_sha256[:12]}, which made the tokens", "name that one")
    return codec


def synthetic_tokens(n: int = 48, n_q: int = 4, card: int = 32, n_frames: int = 25, seed: int = 0) -> TokenisedCorpus:
    """Rows whose codes follow their caption, for smoke runs: each of three genres has its own few codes and its own period."""
    rng = np.random.default_rng(seed)
    genres = ("techno", "folk", "ambient")
    codes = np.empty((n, n_q, n_frames), np.int16)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        which = i % len(genres)
        phase, period = rng.integers(4), 2 + which
        steps = (np.arange(n_frames) + phase) % period
        for k in range(n_q):
            codes[i, k] = (steps + which * card // len(genres) + (rng.random(n_frames) < 0.1)) % card
        genre, tempo_bpm = genres[which], (128.0, 96.0, 64.0)[which]
        split = ("val", "test_piece")[i // len(genres) % 2] if i // len(genres) % 8 >= 6 else "train"
        captions = [genre, f"{genre}, {tempo_bpm:.0f} BPM", f"a {genre} track", f"calm {genre}"]
        rows.append(
            {
                "file_name": f"{split}/{i:06d}.flac",
                "caption": captions[0],
                "captions": captions,
                "genre": genre,
                "mood": "calm",
                "tempo_bpm": tempo_bpm,
                "group": str(i),
                "split": split,
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return TokenisedCorpus(codes, rows, _sha256(codes, lines, ""), "", n_q, card, 25.0)


def _sha256(codes: np.ndarray, lines: str, codec_sha256: str) -> str:
    digest = hashlib.sha256(f"{codec_sha256} {codes.dtype} {codes.shape}".encode())
    digest.update(np.ascontiguousarray(codes).tobytes())
    digest.update(lines.encode())
    return digest.hexdigest()


if __name__ == "__main__":
    import tyro

    from base_models.codec import load_codec

    def run(corpus: Path, codec: Path, out: Path, segment_s: float = 6.0) -> None:
        """Tokenise a corpus and print the folder.

        Args:
            corpus: The corpus's folder, as built or imported.
            codec: The codec's folder.
            out: Folder of the tokens.
            segment_s: Seconds of a segment; a longer clip is cut into several.
        """
        print(tokenise(corpus, load_codec(codec), out, segment_s))

    tyro.cli(run)
