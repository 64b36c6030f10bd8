"""A little piece of music with one knob for each thing that a listener may like or not."""

import numpy as np

RATE = 16_000


def music(seed=0, bright=0.0, noise=0.0, notes_per_s=2.0, jitter_s=0.0, bass=0.35, swell=0.35, duration_s=6.0, decay=3.0, grow=0.0):
    """Plucked notes over a bass: harmonic, moving, with a beat. `decay` a second; `grow`: how much louder the end is, in 20 dB."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(duration_s * RATE)) / RATE
    out = np.zeros_like(t)
    for index in range(int(duration_s * notes_per_s)):
        start = max(0.0, index / notes_per_s + jitter_s * rng.normal())
        pitch = 220 * 2 ** (rng.choice([0, 3, 5, 7, 10, 12]) / 12)
        now = t[int(np.ceil(start * RATE)) :]
        envelope = np.exp(-decay * (now - start))
        out[len(t) - len(now) :] += envelope * sum(np.sin(2 * np.pi * pitch * h * now) / h ** (2.0 - bright) for h in range(1, 9))
        out[len(t) - len(now) :] += bass * envelope * np.sin(2 * np.pi * pitch / 4 * now)
    out *= 1 + swell * np.sin(2 * np.pi * t / duration_s)
    if grow:
        out *= 10 ** (grow * (t / duration_s - 0.5))
    return 0.2 * out / np.abs(out).max() + noise * rng.normal(size=len(t))


def pad(seed=0, tones=(0, 4, 7), moves=True, attack_s=0.8, rest=0.0, duration_s=6.0):
    """Three soft chords of long tones, in semitones over 330 Hz; `rest`: how far the last second falls, in 20 dB."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(duration_s * RATE)) / RATE
    out = np.zeros_like(t)
    for index in range(3):
        start = index * duration_s / 3
        held = np.clip((t - start) / attack_s, 0, 1) * np.clip((start + 1.4 * duration_s / 3 - t) / (0.4 * duration_s / 3), 0, 1)
        root = 330 * 2 ** ((0, 5, -2)[index] * moves / 12)
        for tone in tones:
            pitch, phase = root * 2 ** (tone / 12), rng.uniform(0, 6)
            out += held * sum(np.sin(2 * np.pi * pitch * h * t + phase * h) / h**1.2 for h in range(1, 7))
    out *= 10 ** (-rest * np.clip((t - duration_s + 1.5) / 1.0, 0, 1))
    return 0.2 * out / np.abs(out).max()
