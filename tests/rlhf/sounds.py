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


def noise(seconds=4.0):
    return 0.1 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(2))
