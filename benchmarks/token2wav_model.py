"""Token2wav with random weights, and the ways to run it that benchmarks compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.engine.pieces import Pass, VocodeSettings, passes
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav, Utterance

OFFICIAL_NEW, OFFICIAL_LEFT, OFFICIAL_RIGHT = 48, 24, 12
"""Codes of a pass of the official low-memory mode that are new, and that are context: four blocks,
two before them and one after (`dit_chunk_size`, `dit_left_context` and `dit_right_context` of
QwenLM/Qwen2.5-Omni, low-VRAM-mode)."""

PERIOD = 4_000_037
"""Random values after which weights repeat: no multiple of any width."""


def random_token2wav(dit: DiTConfig, bigvgan: BigVGANConfig, seed: int, std: float) -> Token2Wav:
    """Every parameter normal with this deviation, fp32 on the CPU."""
    with torch.device("meta"):
        model = Token2Wav(OmniConfig(dit=dit, bigvgan=bigvgan))
    model.to_empty(device="cpu").requires_grad_(False).eval()
    values = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)) * std
    at = 0
    for parameter in model.parameters():
        flat, done = parameter.view(-1), 0
        while done < len(flat):
            piece = values[at : at + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, at = done + len(piece), (at + len(piece)) % PERIOD
    return model


def random_voice(dit: DiTConfig, seed: int, frames: int = 300) -> Voice:
    drawn = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, dit.enc_emb_dim, generator=drawn)
    # Log-mel values of a recording lie around -4.
    mel = torch.randn(1, frames, dit.mel_dim, generator=drawn) - 4
    return Voice("random", 0, cond, mel)


def random_codes(count: int, seed: int, table: int = 8193) -> list[int]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, table, (count,), generator=drawn).tolist()


def official_pass(done: int, codes: int) -> Pass:
    """The DiT's next pass with the official constants, after `done` codes of those there are: four
    blocks if the one after them is there, else what is left."""
    start, stop = max(0, done - OFFICIAL_LEFT), done + OFFICIAL_NEW
    if codes >= stop + OFFICIAL_RIGHT:
        return Pass("mel", start, stop + OFFICIAL_RIGHT, done, stop)
    return Pass("mel", start, codes, done, codes)


def official_piece(
    model: Token2Wav, utterance: Utterance, step: Pass, codes: Sequence[int], noise: Tensor
) -> Tensor:
    """The mel frames that such a pass keeps; `codes` and `noise` are those of the pass."""
    scale = model.repeats
    mel = model.mel(utterance, codes, noise)
    return mel[(step.keep_from - step.start) * scale : (step.keep_to - step.start) * scale]


def official_mel(
    model: Token2Wav, utterance: Utterance, codes: Sequence[int], noise: Tensor
) -> Tensor:
    """[frames, mel_dim] with the official constants."""
    scale, done, pieces = model.repeats, 0, []
    while done < len(codes):
        step = official_pass(done, len(codes))
        window = noise[step.start * scale : step.stop * scale]
        pieces.append(official_piece(model, utterance, step, codes[step.start : step.stop], window))
        done = step.keep_to
    return torch.cat(pieces)


def streamed_mel(
    model: Token2Wav,
    utterance: Utterance,
    codes: Sequence[int],
    noise: Tensor,
    settings: VocodeSettings,
) -> Tensor:
    """[frames, mel_dim] in the pieces of a stream."""
    scale, past = model.repeats, model.past(utterance)
    pieces = [
        model.mel(
            utterance,
            codes[step.start : step.stop],
            noise[step.start * scale : step.stop * scale],
            past,
            step.keep_to - step.start if step.keep_to < step.stop else None,
        )
        for step in passes(settings, len(codes))
        if step.stage == "mel"
    ]
    return torch.cat(pieces)
