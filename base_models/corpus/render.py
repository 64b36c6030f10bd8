"""An arrangement -> four stems and their mix as int16, through a General MIDI soundfont, at 16 kHz by default.

stem notes -> tinysoundfont -> low-pass, pump, room -> genre and mood balance -> one loudness gain for all stems.
The soundfont is TimGM6mb.sf2 (GPL-2), found inside the installed pretty_midi; nothing of it is copied.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyloudnorm
import tinysoundfont
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import butter, sosfilt

from base_models.errors import UserError

from .arrange import Arrangement
from .phrases import Track
from .styles import STEMS, Band, Mood

TARGET_LUFS = -16.0
PEAK_CAP = 0.97
FLUSH_FRAMES = 640  # rendered and thrown away after each stem, so that no voice's tail reaches the next one
PUMPED_GENRES = ("techno", "house")
OPEN_LOWPASS_HZ = 9000  # cut-off of a band without a low-pass of its own, before the mood's brightness
REVERB_SHARE = {"lead": 1.0, "backing": 1.0, "bass": 0.25, "drums": 0.5}
BALANCE_DB = {"lead": 0.0, "backing": -5.0, "bass": -4.0, "drums": -3.0}
GENRE_BALANCE_DB: dict[str, dict[str, float]] = {
    "techno": {"drums": 2, "bass": -1, "lead": -4},
    "house": {"drums": 1, "bass": -2, "lead": -3},
    "rock": {"backing": -2, "drums": -1, "bass": -4},
    "ambient": {"backing": -1, "lead": -3},
    "cinematic": {"backing": -2},
    "choral": {"backing": -2, "bass": -2},
    "lofi": {"drums": -3, "backing": -3},
}


def soundfont_path() -> Path:
    """TimGM6mb.sf2 in the installed pretty_midi, without importing it."""
    spec = importlib.util.find_spec("pretty_midi")
    path = Path(spec.origin).parent / "TimGM6mb.sf2" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("no TimGM6mb.sf2", "the soundfont that pretty_midi ships", "pip install pretty_midi==0.2.11.post0")
    return path


class Synth:
    """A soundfont player that gives the same samples for the same notes, whatever it played before."""

    def __init__(self, sample_rate: int = 16000) -> None:
        self.sample_rate = sample_rate
        self._player = tinysoundfont.Synth(gain=-6, samplerate=sample_rate)
        self._font = self._player.sfload(str(soundfont_path()))

    def render(self, tracks: list[Track], duration_s: float) -> np.ndarray:
        """Tracks whose notes are in seconds -> mono float32 [L]."""
        player, n_samples = self._player, int(duration_s * self.sample_rate)
        events: list[tuple[int, int, int, int, int]] = []  # frame, 0 off / 1 on, channel, pitch, velocity
        melodic_channel = -1
        for track in tracks:
            if track.is_drum:
                channel = 9
                player.program_select(channel, self._font, 128, track.program, True)
            else:
                melodic_channel += 2 if melodic_channel == 8 else 1
                channel = melodic_channel
                player.program_select(channel, self._font, 0, track.program, False)
            for note in track.notes:
                events.append((int(note.onset * self.sample_rate), 1, channel, note.pitch, note.velocity))
                events.append((int((note.onset + note.length) * self.sample_rate), 0, channel, note.pitch, 0))
        events.sort()
        buffer = bytearray(n_samples * 8)  # stereo float32
        view = memoryview(buffer)
        position = 0
        for frame, is_on, channel, pitch, velocity in events:
            frame = min(frame, n_samples)
            if frame > position:
                player.generate_simple(frame - position, view[position * 8 : frame * 8])
                position = frame
            if position >= n_samples:
                break
            if is_on:
                player.noteon(channel, pitch, velocity)
            else:
                player.noteoff(channel, pitch)
        if position < n_samples:
            player.generate_simple(n_samples - position, view[position * 8 :])
        player.sounds_off()
        player.generate_simple(FLUSH_FRAMES)
        stereo = np.frombuffer(buffer, np.float32)
        return (stereo[0::2] + stereo[1::2]) * np.float32(0.5)


@lru_cache(maxsize=64)
def _room(sample_rate: int, reverb_s: float, n_samples: int) -> tuple[np.ndarray, int]:
    """Spectrum of an exponentially decaying noise room of unit energy, and the FFT length for clips of n_samples."""
    length = min(int(min(reverb_s, 4.0) * sample_rate), n_samples)
    time = np.arange(length) / sample_rate
    noise = np.random.default_rng(7).standard_normal(length) * np.exp(-6.9 * time / reverb_s)
    band = butter(1, [120, min(6500, 0.45 * sample_rate)], "band", fs=sample_rate, output="sos")
    response = sosfilt(band, noise)
    response[: int(0.012 * sample_rate)] *= 0.2  # the room answers a moment later
    response /= np.sqrt((response**2).sum())
    size = next_fast_len(n_samples + length, real=True)
    return rfft(response.astype(np.float32), size), size


@lru_cache(maxsize=64)
def _lowpass(sample_rate: int, cutoff_hz: float) -> np.ndarray:
    sections: np.ndarray = butter(2, min(cutoff_hz, 0.45 * sample_rate), fs=sample_rate, output="sos")
    return sections


def _pump(kicks: list[float], n_samples: int, sample_rate: int) -> np.ndarray:
    """Gain that ducks at every kick and recovers within a quarter of a second."""
    gain = np.ones(n_samples, np.float32)
    length = int(0.26 * sample_rate)
    dip = (1 - 0.75 * np.exp(-np.linspace(0, 5, length))).astype(np.float32)
    for kick in kicks:
        start = int(kick * sample_rate)
        stop = min(start + length, n_samples)
        if start < stop:
            gain[start:stop] = np.minimum(gain[start:stop], dip[: stop - start])
    return gain


def _tape(n_samples: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Hiss and crackle."""
    hiss = rng.standard_normal(n_samples) * 0.0016
    crackle = (rng.random(n_samples) < 6 / sample_rate) * rng.standard_normal(n_samples) * 0.05
    return np.asarray(sosfilt(_lowpass(sample_rate, 5000), hiss + crackle), np.float32)


@dataclass(frozen=True)
class RenderedClip:
    """int16 [L] audio. The stems add up to the mix within 2 steps of the last bit."""

    mix: np.ndarray
    stems: dict[str, np.ndarray]
    sample_rate: int


def _stem(tracks: list[Track], stem: str, arrangement: Arrangement, band: Band, mood: Mood, synth: Synth, n_samples: int) -> np.ndarray:
    """One stem, dry notes to balanced level: filter, pump, room, then RMS of its sounding part set by the balance."""
    sample_rate = synth.sample_rate
    audio = synth.render(tracks, n_samples / sample_rate)
    cutoff_hz = max(1200.0, (band.lowpass_hz or OPEN_LOWPASS_HZ) * mood.brightness)
    if cutoff_hz < 0.45 * sample_rate and stem != "bass":
        audio = sosfilt(_lowpass(sample_rate, cutoff_hz), audio).astype(np.float32)
    if band.genre in PUMPED_GENRES and stem in ("backing", "bass"):
        audio = audio * _pump(arrangement.kicks, n_samples, sample_rate)
    wet = min(0.6, band.reverb_wet * mood.reverb) * REVERB_SHARE[stem]
    if wet > 0.03:
        room, size = _room(sample_rate, band.reverb_s, n_samples)
        audio = (1 - wet * 0.5) * audio + 1.6 * wet * irfft(rfft(audio, size) * room, size)[:n_samples]
    loudest = float(np.abs(audio).max())
    if loudest == 0.0:
        return np.zeros(n_samples, np.float32)
    sounding = audio[np.abs(audio) > 1e-3 * loudest]
    level = float(np.sqrt(np.mean(np.square(sounding, dtype=np.float64))))
    balance = BALANCE_DB[stem] + GENRE_BALANCE_DB.get(band.genre, {}).get(stem, 0.0) + mood.balance_db.get(stem, 0.0)
    return (audio * (0.1 * 10 ** (balance / 20) / level)).astype(np.float32)


def render(arrangement: Arrangement, band: Band, mood: Mood, synth: Synth, rng: np.random.Generator) -> RenderedClip:
    """The clip at -16 LUFS, or quieter where its peak would pass 0.97; the same gain on every stem."""
    sample_rate = synth.sample_rate
    n_samples = int(arrangement.duration_s * sample_rate)
    stems = {
        stem: _stem(arrangement.stems[stem], stem, arrangement, band, mood, synth, n_samples)
        if arrangement.stems[stem]
        else np.zeros(n_samples, np.float32)
        for stem in STEMS
    }
    if band.genre == "lofi":
        stems["backing"] = stems["backing"] + _tape(n_samples, sample_rate, rng)
    fade = np.ones(n_samples, np.float32)
    fade_out = min(int(0.03 * sample_rate), n_samples)
    fade[-fade_out:] = np.linspace(1, 0, fade_out)
    fade[:64] *= np.linspace(0, 1, 64, dtype=np.float32)
    stacked = np.stack([stems[stem] for stem in STEMS]) * fade
    mix = stacked.sum(0)
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(mix.astype(np.float64))
    gain = 10 ** ((TARGET_LUFS - loudness) / 20) if np.isfinite(loudness) else 1.0
    peak = max(float(np.abs(mix).max()), float(np.abs(stacked).max())) * gain
    if peak > PEAK_CAP:
        gain *= PEAK_CAP / peak
    scaled = stacked.astype(np.float64) * (gain * 32767)
    return RenderedClip(
        mix=np.rint(scaled.sum(0)).astype(np.int16),
        stems={stem: np.rint(row).astype(np.int16) for stem, row in zip(STEMS, scaled)},
        sample_rate=sample_rate,
    )
