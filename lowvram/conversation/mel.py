"""Log-mel features of a waveform of any length.

The numbers are those of transformers' `WhisperFeatureExtractor` as Qwen2.5-Omni configures it (16
kHz, windows of 400, hop 160, 128 bins) on audio padded to its 300 s, without the padding and
without the cut at 300 s. Work goes in pieces, so that memory stays near the size of the result.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lowvram.conversation.tokens import HOP, SAMPLE_RATE, mel_frames

WINDOW = 400
"""Samples of one window, and of its Fourier transform: 25 ms."""
_REACH = WINDOW // 2
_PIECE = 4096
"""Frames transformed at once: 13 MB of windows."""
_FLOOR = 1e-10
_RANGE = 8.0
"""Powers of ten below the loudest value of the whole recording at which features are cut off."""


def log_mel(samples: np.ndarray, bins: int) -> np.ndarray:
    """Features float32 [bins, frames] of a waveform float32 [n] at 16 kHz, n above 0."""
    frames = mel_frames(len(samples))
    out = np.empty((bins, frames), np.float32)
    for start in range(0, frames, _PIECE):
        stop = min(start + _PIECE, frames)
        windows = np.lib.stride_tricks.sliding_window_view(_stretch(samples, start, stop), WINDOW)
        spectrum = np.fft.rfft(windows[::HOP] * _hann(), axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        out[:, start:stop] = np.log10(np.maximum(_filters(bins) @ power.T, _FLOOR))
    np.maximum(out, out.max() - np.float32(_RANGE), out=out)
    out += 4.0
    out /= 4.0
    return out


def _stretch(samples: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The samples under frames [start, stop), float64: mirrored before the first, then zero."""
    first = start * HOP - _REACH
    last = (stop - 1) * HOP + _REACH
    out = np.zeros(last - first)
    inside = samples[max(first, 0) : last]
    at = max(-first, 0)
    out[at : at + len(inside)] = inside
    if first < 0:
        mirrored = samples[1 : _REACH + 1][::-1]
        out[_REACH - len(mirrored) : _REACH] = mirrored
    return out


@cache
def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)


@cache
def _filters(bins: int) -> np.ndarray:
    """Triangles on Slaney's mel scale from 0 to 8 kHz, each of unit area, float64 [bins, 201]."""
    edges = _to_hertz(np.linspace(0.0, _to_mel(SAMPLE_RATE / 2), bins + 2))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (middle - low)
    falling = (high - frequencies) / (high - middle)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


# Slaney's scale: 200/3 Hz a mel up to 1 kHz, then 27 mels to each factor of 6.4.
_LINEAR_HERTZ = 200.0 / 3
_BREAK_HERTZ = 1000.0
_BREAK_MEL = _BREAK_HERTZ / _LINEAR_HERTZ
_LOG_STEP = np.log(6.4) / 27


def _to_mel(hertz: float) -> float:
    """For frequencies above the break, which the upper end is."""
    return _BREAK_MEL + float(np.log(hertz / _BREAK_HERTZ)) / _LOG_STEP


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HERTZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, _LINEAR_HERTZ * mel, above)
