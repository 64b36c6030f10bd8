"""What the app takes for loud against ffmpeg's ebur128, on 50 clips that were registered as an owner registers them."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal
from sqlalchemy import select

from base_models.audio import write_audio
from db.campaigns import Rules
from db.gains import PEAK_CEILING_DBFS
from db.schema import Clip, Pair
from db.store import open_store
from feedback_app.campaigns import Source, fill_campaign

N_CLIPS = 50
RATES = (8000, 16000, 22050, 32000, 44100, 48000)
Samples = NDArray[np.float64]
Random = np.random.Generator


def melody(rng: Random, t: Samples) -> Samples:
    wav, at = np.zeros_like(t), 0.0
    while at < t[-1]:
        hz, since = rng.choice([110, 147, 196, 262, 330, 392, 523, 659]), np.clip(t - at, 0, None)
        wav += np.exp(-3 * since) * (since > 0) * sum(np.sin(2 * np.pi * hz * k * since) / k**1.5 for k in range(1, 6))
        at += rng.choice([0.125, 0.25, 0.5])
    return wav


def drums(rng: Random, t: Samples) -> Samples:
    return rng.standard_normal(len(t)) * np.exp(-25 * (t % 0.5)) + 2 * np.sin(2 * np.pi * 55 * t) * np.exp(-8 * (t % 0.5))


def rumble(rng: Random, t: Samples) -> Samples:
    return np.asarray(signal.lfilter([1], [1, -0.98], rng.standard_normal(len(t))))


def swell(rng: Random, t: Samples) -> Samples:
    """Loudest at its two ends, 40 dB softer between: a block too many at the end is heard at once."""
    return np.sin(2 * np.pi * rng.uniform(60, 2000) * t) * 10 ** (-2 * np.sin(np.pi * t / t[-1]))


KINDS: tuple[Callable[[Random, Samples], Samples], ...] = (
    melody,
    drums,
    rumble,
    swell,
    lambda rng, t: rng.standard_normal(len(t)),
    lambda rng, t: rng.standard_normal(len(t)) * ((t * rng.uniform(1, 4)) % 1 < 0.12),  # bursts
    lambda rng, t: melody(rng, t) * (t % 1.7 > 0.8),  # silence in between
    lambda rng, t: signal.square(2 * np.pi * rng.uniform(80, 900) * t),
)


@dataclass(frozen=True)
class Heard:
    """A clip by the database (loudness LUFS, true peak dBTP, gain dB) and by ffmpeg, as it is and with that gain."""

    pair_id: int
    lufs: float
    peak_dbtp: float
    gain_db: float
    theirs_lufs: float
    theirs_peak_dbtp: float
    matched_lufs: float
    matched_peak_dbtp: float


def by_ffmpeg(clip: Path, gain_db: float, folder: Path) -> tuple[float, float, float, float]:
    """(loudness, true peak) of a clip as it is, and with a gain. Peaks with silence around: a player goes on behind the last sample."""
    louder, silence, meter = f"volume={gain_db}dB:precision=double", "adelay=100:all=1,apad=pad_dur=0.1", "ebur128=peak=true:metadata=1"
    routes = ("anull", silence, louder, f"{louder},{silence}")
    chains = [f"[{i}]{route},{meter},ametadata=print:file={i}.txt[out{i}]" for i, route in enumerate(routes)]
    graph = ";".join(["[0:a]asplit=4" + "".join(f"[{i}]" for i in range(4)), *chains])
    outputs = [part for i in range(4) for part in ("-map", f"[out{i}]", "-f", "null", "-")]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(clip), "-filter_complex", graph, *outputs]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=120)

    def last(i: int, key: str) -> float:
        return float(re.findall(rf"r128\.{key}=(\S+)", (folder / f"{i}.txt").read_text())[-1])

    def peak_dbtp(i: int) -> float:
        return 20 * math.log10(last(i, "true_peak"))

    return last(0, "I"), peak_dbtp(1), last(2, "I"), peak_dbtp(3)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    """Music-like and noisy, gappy and steady, 2 to 6 s, one and two channels, -24 to 0 dBFS, six rates, WAV and FLAC."""
    folder = tmp_path_factory.mktemp("loudness")
    rng = np.random.default_rng(7)
    rows = []
    for i in range(N_CLIPS):
        rate, kind = RATES[i % len(RATES)], KINDS[(i // 2) % len(KINDS)] if i % 2 else KINDS[i % len(KINDS)]
        t = np.arange(int(rng.uniform(2, 6) * rate)) / rate
        wav = kind(rng, t)[None]
        if (i // 3) % 2:
            wav = np.vstack([wav, 0.6 * wav + 0.4 * kind(rng, t)])
        wav *= 10 ** (rng.uniform(-24, 0) / 20) / np.abs(wav).max()
        name = f"{i}{('.wav', '.flac')[(i // 4) % 2]}"
        write_audio(folder / name, wav, rate)
        rows.append({"file_name": name, "prompt": f"prompt {i // 2}", "system": "xy"[i % 2]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_store(f"sqlite:///{folder / 'votes.db'}") as store:
        fill_campaign(store, "c", [Source(str(folder))], Rules())
        with store.read() as session:
            pairs = session.scalars(select(Pair)).all()
            clips = {clip.id: clip for clip in session.scalars(select(Clip))}
    measured = []
    for pair in pairs:
        for clip_id, gain_db in ((pair.clip_x_id, pair.gain_x_db), (pair.clip_y_id, pair.gain_y_db)):
            clip = clips[clip_id]
            assert clip.lufs is not None
            assert clip.true_peak_dbfs is not None
            measured.append(Heard(pair.id, clip.lufs, clip.true_peak_dbfs, gain_db, *by_ffmpeg(Path(clip.uri), gain_db, folder)))
    return measured


def test_loudness_is_that_of_ffmpeg_within_a_tenth_of_a_lu_on_50_clips(heard: list[Heard], record_property: Callable) -> None:
    off_lu = [clip.lufs - clip.theirs_lufs for clip in heard]
    record_property("lufs_minus_ffmpeg", [round(lu, 4) for lu in off_lu])
    print(f"loudness minus ffmpeg's, {len(heard)} clips: {min(off_lu):+.4f} to {max(off_lu):+.4f} LU")
    assert len(heard) == N_CLIPS
    assert max(clip.lufs for clip in heard) - min(clip.lufs for clip in heard) > 20
    assert max(map(abs, off_lu)) <= 0.1


def test_the_true_peak_is_that_of_ffmpeg_within_a_quarter_of_a_decibel(heard: list[Heard]) -> None:
    off_db = [clip.peak_dbtp - clip.theirs_peak_dbtp for clip in heard]
    print(f"true peak minus ffmpeg's, {len(heard)} clips: {min(off_db):+.3f} to {max(off_db):+.3f} dB")
    assert max(map(abs, off_db)) <= 0.25


def test_by_ffmpeg_too_every_pair_is_equally_loud_within_a_fifth_of_a_lu_and_no_peak_is_over(heard: list[Heard]) -> None:
    by_pair: dict[int, list[Heard]] = {}
    for clip in heard:
        by_pair.setdefault(clip.pair_id, []).append(clip)
    apart_lu = [abs(x.matched_lufs - y.matched_lufs) for x, y in by_pair.values()]
    before_lu = [abs(x.theirs_lufs - y.theirs_lufs) for x, y in by_pair.values()]
    highest_dbtp = max(clip.matched_peak_dbtp for clip in heard)
    print(f"{len(apart_lu)} pairs: up to {max(before_lu):.1f} LU apart, {max(apart_lu):.4f} as played; peak {highest_dbtp:.2f} dBTP")
    assert len(apart_lu) == N_CLIPS // 2
    assert max(apart_lu) <= 0.2 < max(before_lu)
    assert highest_dbtp <= PEAK_CEILING_DBFS + 0.25 < 0
