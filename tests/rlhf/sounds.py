"""Sounds whose descriptors are known beforehand, and their magnitudes."""

import math

import torch

RATE, HOP, N_FFT = 16_000, 160, 1024


def magnitude_of(wav):
    spectrum = torch.stft(wav, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    return spectrum.abs().transpose(1, 2)


def tones(*frequencies, seconds=4.0):
    t = torch.arange(int(seconds * RATE)) / RATE
    return sum(torch.sin(2 * math.pi * f * t) for f in frequencies) / len(frequencies)


def clicks(period_s, seconds=4.0):
    wav = 1e-4 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(wav) - 800, int(period_s * RATE)):
        burst = torch.randn(800, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 0, 800)
        wav[start : start + 800] += burst
    return wav


def struck(decay_s, seconds=4.0, period_s=0.5):
    """A tone that is struck again and again and dies away."""
    since = (torch.arange(int(seconds * RATE)) / RATE) % period_s
    return tones(440.0, 880.0, seconds=seconds) * torch.exp(-since / decay_s)


def noise(seconds=4.0):
    return 0.1 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(2))
