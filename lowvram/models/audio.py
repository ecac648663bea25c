"""The audio tower, one window of two seconds at a time.

Neither the convolutions nor attention cross a window, so going window by window changes nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.config import AudioConfig
from lowvram.models.attention import attention

# The longest wavelength of the position table is 2 pi times this (Whisper, arXiv:2212.04356).
MAX_TIMESCALE = 10_000.0
# How far below the fp16 maximum a layer's output is kept, as in the published code.
FP16_MARGIN = 1000.0


def sinusoids(rows: int, channels: int) -> Tensor:
    """fp32 [rows, channels] on the host: sines, then cosines, of the row at falling frequencies."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu")
    frequencies = torch.exp(-math.log(MAX_TIMESCALE) / (half - 1) * steps)
    angles = torch.arange(rows, device="cpu")[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class AudioAttention(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width = config.d_model
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] -> [N, width]."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attention(q, k, v, causal=False)
        out: Tensor = self.out_proj(mixed[0].transpose(0, 1).flatten(1))
        return out


class AudioLayer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = AudioAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.self_attn(self.self_attn_layer_norm(x))
        x = attended.add_(x)
        out: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))).add_(x)
        if out.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max - FP16_MARGIN
            out.clamp_(-limit, limit)
        return out


class AudioTower(nn.Module):
    """Parameters are named as in the checkpoint, after `thinker.audio_tower.`.

    `audio_bos_eos_token` is in every published checkpoint and used by none: two rows, kept so that
    the names of the checkpoint and of this module are the same set.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.output_dim)

    def forward(self, mel: Tensor) -> Tensor:
        """Embed one window.

        Args:
            mel: [num_mel_bins, frames] of 10 ms, at most `2 * n_window` frames, unpadded.

        Returns:
            [tokens, output_dim], one token for four frames: 50 for a whole window; the end of a
            recording that is short of a token gives none.

        Raises:
            ValueError: more frames than a window has.
        """
        window = 2 * self.config.n_window
        if mel.shape[1] > window:
            raise ValueError(f"{mel.shape[1]} mel frames; a window has at most {window}")
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(0, 1)
        x = x + sinusoids(*x.shape).to(x.dtype).to(x.device)
        for layer in self.layers:
            x = layer(x)
        tokens = x.shape[0] // 2
        first, second = x[: 2 * tokens].unflatten(0, (tokens, 2)).unbind(1)
        pooled = (first + second) / 2
        out: Tensor = self.proj(self.ln_post(pooled))
        return out
