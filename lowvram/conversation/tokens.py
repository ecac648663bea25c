"""How many tokens a medium takes. Plain arithmetic, shared by prompts, towers and plans."""

from __future__ import annotations

SAMPLE_RATE = 16_000
"""Samples a second of every waveform that goes into the model."""
HOP = 160
"""Samples from one mel frame to the next: 100 frames a second."""


def mel_frames(samples: int) -> int:
    """Mel frames of a waveform: one for each begun hop."""
    return -(-samples // HOP)


def audio_tokens(frames: int) -> int:
    """Tokens of so many mel frames: the audio tower halves twice (25 tokens a second).

    Two frames or fewer give none. From `Qwen2_5OmniAudioEncoder` in transformers.
    """
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1)


def resampled(samples: int, rate: int) -> int:
    """Samples at 16 kHz of so many at `rate`, as soxr gives them."""
    return (2 * samples * SAMPLE_RATE + rate) // (2 * rate)


def grid_tokens(grid: tuple[int, int, int], merge: int) -> int:
    """Tokens of a grid of patches: `merge` x `merge` patches become one."""
    time, height, width = grid
    return time * height * width // merge**2
